"""Gemma in float64, and how far from it float32 may be: never a number that was fitted to one machine.

B batch, T query length, S key length, N query heads, K key-value heads, H head dim.
"""

import numpy as np

FLOAT32_EPSILON = np.finfo("float32").eps


def rounding(scale, units=64):
    """How far two float32 programs may be apart that sum up the same some hundred products, each in its own order.

    Args:
        scale: array or float; its largest absolute value is that of the results.
        units: int, of float32's epsilon.
    """
    return units * FLOAT32_EPSILON * np.abs(scale).max()


def assert_as_exact(received, peer, exact, name=""):
    """That `received` is no further from a float64 computation than twice the peer's error, at worst and on average.

    Two float32 programs differ by their order of summation, which is another on every machine, and the angle of a large
    position turns one unit in the last place of an inverse frequency into 1e-4. The error of a peer has all of that.
    A few units in the last place of the largest value are allowed where the peer happens to be exact.
    """
    scale = np.abs(exact).max()
    for measure, units in ((_worst, 16), (_root_mean_square, 2)):
        of_peer, error = measure(peer - exact), measure(received - exact)
        assert of_peer < 1e-3 * scale, f"{name}: the peer computes something else, {of_peer} from {scale}"
        allowed = 2 * of_peer + units * FLOAT32_EPSILON * scale
        assert error <= allowed, f"{name}: {error} from float64, the peer {of_peer}; allowed are {allowed}"


def _worst(errors):
    return np.abs(errors).max()


def _root_mean_square(errors):
    return np.sqrt(np.mean(np.square(errors, dtype="float64")))


def exact_logits(state, shape, token_ids, positions=None):
    """Logits of whole rows in float64.

    Args:
        state: arrays by transformers' names.
        shape: constructor arguments of a backbone.
        token_ids: int array `[B, T]`.
        positions: optional int array `[B, T]`.

    Returns:
        A float64 array `[B, T, vocabulary_size]`. What stands behind right padding means nothing.
    """
    import torch

    with torch.no_grad():
        return _logits(_as_float64(state), shape, token_ids, positions).numpy()


def exact_gradients(state, shape, token_ids, targets, weights):
    """Gradients in float64 of the weighted mean cross-entropy, by transformers' names."""
    import torch

    parameters = {name: value.requires_grad_() for name, value in _as_float64(state).items()}
    losses = torch.nn.functional.cross_entropy(
        _logits(parameters, shape, token_ids).flatten(0, 1), torch.tensor(targets).long().flatten(), reduction="none"
    )
    weights = torch.tensor(weights, dtype=torch.float64).flatten()
    ((losses * weights).sum() / weights.sum()).backward()
    return {name: parameter.grad.numpy() for name, parameter in parameters.items()}


def _as_float64(state):
    import torch

    return {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}


def _logits(state, shape, token_ids, positions=None):
    import torch

    token_ids = torch.tensor(token_ids).long()
    positions = torch.arange(token_ids.shape[1]).expand_as(token_ids) if positions is None else torch.tensor(positions)
    embedding = state["model.embed_tokens.weight"]
    x = embedding[token_ids] * shape["hidden_dim"] ** 0.5
    for index in range(shape["num_layers"]):
        x = _block(_of_layer(state, index), x, positions, shape["head_dim"])
    return _normed(x, state["model.norm.weight"]) @ embedding.T


def _of_layer(state, index):
    prefix = f"model.layers.{index}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _block(weights, x, positions, head_dim):
    import torch

    normed = _normed(x, weights["input_layernorm.weight"])
    query, key, value = (
        (normed @ weights[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for name in "qkv"
    )
    attended = _attended(_rotated(query, positions) * head_dim**-0.5, _rotated(key, positions), value)
    x = x + attended.flatten(2) @ weights["self_attn.o_proj.weight"].T
    normed = _normed(x, weights["post_attention_layernorm.weight"])
    gate, up = (normed @ weights[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (torch.nn.functional.gelu(gate, approximate="tanh") * up) @ weights["mlp.down_proj.weight"].T


def _normed(x, scale):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + scale)


def _rotated(x, positions):
    import torch

    half = x.shape[-1] // 2
    angles = positions[..., None] * 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    cosine, sine = angles.cos()[:, :, None], angles.sin()[:, :, None]
    first, second = x.split(half, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _attended(query, key, value, rows=1024):
    # A few rows of scores at a time: all of a long row's would take gigabytes.
    import torch

    key, value = (heads.repeat_interleave(query.shape[2] // heads.shape[2], dim=2) for heads in (key, value))
    parts = []
    for start in range(0, query.shape[1], rows):
        some = query[:, start : start + rows]
        seen = start + some.shape[1]
        scores = torch.einsum("btnh,bsnh->bnts", some, key[:, :seen])
        hidden = torch.ones(some.shape[1], seen, dtype=torch.bool).triu(start + 1)
        parts.append(
            torch.einsum("bnts,bsnh->btnh", scores.masked_fill(hidden, -torch.inf).softmax(-1), value[:, :seen])
        )
    return torch.cat(parts, dim=1)
