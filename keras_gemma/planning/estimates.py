"""What training needs, estimated before anything is compiled: only good enough to choose what to compile."""

from keras_gemma.training.flops import forward_flops_per_token

BYTES_OF_COMPUTATION, BYTES_OF_STATE = 2, 4
# The weight, its gradient, and the two moments of Adam.
STATES_OF_A_WEIGHT = 4
# Tokens whose logits a chip holds at a time; a logit is there in float32 twice, and as an error.
LOGITS_AT_ONCE, BYTES_OF_A_LOGIT = 2048, 10
# Forward passes that recomputation adds, and passes in which weights are gathered and activations summed up.
PASSES_ADDED = {"none": 0.0, "dots": 0.1, "block": 1.0}
PASSES = {"none": 2, "dots": 2, "block": 3}


class Estimates:
    """Memory and time of candidates. What the compiler says of some corrects the memory of those that are like them.

    Args:
        sizes: dict, of `GemmaBackbone.get_config`.
        length: int, tokens of a row.
        pods, chips: ints. Chips are those of a pod.
        chip: a `topology.Chip`.
    """

    def __init__(self, sizes, length, pods, chips, chip):
        self._sizes = sizes
        self._length = length
        self._pods = pods
        self._chips = chips
        self._chip = chip
        self._corrections = {}
        heads = 2 * sizes["num_query_heads"] + 2 * sizes["num_key_value_heads"]
        self._heads = heads * sizes["head_dim"]
        self._ffw = sizes["intermediate_dim"]
        self._width = sizes["hidden_dim"]
        self._layers = sizes["num_layers"]
        self._block = self._width * (self._heads + self._ffw * 3 // 2)
        self._table = sizes["vocabulary_size"] * self._width

    def bytes_needed(self, candidate):
        """Of a chip."""
        return self._kept() + self._correction(candidate) * self._temporaries(candidate)

    def learn(self, candidate, plan):
        """Takes note of what the compiler says of a candidate."""
        self._corrections[candidate.recompute] = (plan.memory["peak"] - self._kept()) / self._temporaries(candidate)

    def _correction(self, candidate):
        # What was seen of another way of recomputing is better than nothing.
        seen = self._corrections
        return seen.get(candidate.recompute, sum(seen.values()) / len(seen) if seen else 1.0)

    def _kept(self):
        weights = self._layers * self._block + self._table
        return weights * BYTES_OF_STATE * STATES_OF_A_WEIGHT / self._chips

    def _temporaries(self, candidate):
        model, tokens = candidate.model, candidate.rows * self._length
        of_stream, within_branches = 3 * self._width, (self._heads + self._ffw) / model
        # Between branches a chip has its columns only.
        of_products = of_stream / model + within_branches
        saved = {"block": self._width / model, "dots": of_products, "none": 2 * of_products}[candidate.recompute]
        of_one_block = 2 * (of_stream + within_branches) * tokens + 2 * self._block / model
        activations = (self._layers * saved * tokens + of_one_block) * BYTES_OF_COMPUTATION
        logits = LOGITS_AT_ONCE * BYTES_OF_A_LOGIT * self._sizes["vocabulary_size"] / model
        table = self._table / model * (BYTES_OF_COMPUTATION + BYTES_OF_STATE)
        return activations + logits + table

    def tokens_per_second(self, candidate):
        """Of all chips together, if computing and sending hide each other."""
        tokens = candidate.rows * candidate.accumulate * self._length
        seconds = max(self._computing(candidate, tokens), self._sending(candidate, tokens), self._across_pods())
        return tokens * self._pods * self._chips / candidate.model / seconds

    def _computing(self, candidate, tokens):
        forward = forward_flops_per_token(self._sizes, (self._length + 1) / 2)
        return tokens / candidate.model * forward * (3 + PASSES_ADDED[candidate.recompute]) / self._chip.flops

    def _sending(self, candidate, tokens):
        model, passes = candidate.model, PASSES[candidate.recompute]
        others = 1 - model / self._chips
        gathered = passes * self._layers * self._block + 2 * self._table
        of_weights = (gathered + self._layers * self._block + 2 * self._table) / model * others * candidate.accumulate
        # Two sums a block and pass over the chips that share its weights, each sent twice.
        of_activations = passes * self._layers * 2 * 2 * (1 - 1 / model) * tokens * self._width
        return (of_weights + of_activations) * BYTES_OF_COMPUTATION / self._chip.link_bandwidth

    def _across_pods(self):
        weights = (self._layers * self._block + self._table) / self._chips
        return 2 * (1 - 1 / self._pods) * weights * BYTES_OF_STATE / self._chip.pod_bandwidth
