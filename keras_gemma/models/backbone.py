import keras
import keras_hub
import numpy as np
from keras import ops

from keras_gemma import checkpoints
from keras_gemma import distribution
from keras_gemma import kernels
from keras_gemma import settings
from keras_gemma.models import lora
from keras_gemma.models import quantization
from keras_gemma.models.decoder_block import GemmaDecoderBlock
from keras_gemma.models.description import described
from keras_gemma.models.packed_inputs import PACKED_INPUTS
from keras_gemma.models.packed_inputs import is_packed
from keras_gemma.models.packed_inputs import without_absent
from keras_gemma.models.presets import Presets
from keras_gemma.models.reversible_embedding import ReversibleEmbedding
from keras_gemma.models.rms_normalization import RMSNormalization
from keras_gemma.models.rotary_embedding import RotaryEmbedding

INPUTS = ("token_ids", "padding_mask", *PACKED_INPUTS)
# keras-hub's constructor serves Gemma 2 too. Gemma 1 has these values and no others.
GEMMA_1_ONLY = {
    "query_head_dim_normalize": True,
    "use_post_ffw_norm": False,
    "use_post_attention_norm": False,
    "attention_logit_soft_cap": None,
    "final_logit_soft_cap": None,
    "use_sliding_window_attention": False,
}
SIZES = (
    "vocabulary_size",
    "num_layers",
    "num_query_heads",
    "num_key_value_heads",
    "hidden_dim",
    "intermediate_dim",
    "head_dim",
    "layer_norm_epsilon",
    "dropout",
    "sliding_window_size",
)


@keras.saving.register_keras_serializable(package="keras_gemma")
class SegmentIds(keras.layers.Layer):
    """Segment ids `[B, T]` with 0 where padded, from a padding mask and optional packed segment ids."""

    def call(self, padding_mask, segment_ids=None):
        real = ops.cast(padding_mask, "int32")
        return real if segment_ids is None else real * ops.cast(segment_ids, "int32")

    def compute_output_spec(self, padding_mask, segment_ids=None):
        return keras.KerasTensor(padding_mask.shape, "int32")


@keras.saving.register_keras_serializable(package="keras_gemma")
class EmbeddingScale(keras.layers.Layer):
    """Multiplies by sqrt(D), rounded to the dtype of the activations as the reference rounds it."""

    def call(self, x):
        return x * ops.cast(np.sqrt(x.shape[-1]), x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape


@kernels.with_torch_parameters
@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaBackbone(keras_hub.models.Backbone):
    """The Gemma 1 network from token ids to final hidden states (arXiv 2403.08295).

    Arguments, layer names and weight files are those of `keras_hub.models.GemmaBackbone`.

    Args:
        vocabulary_size: int, `V`.
        num_layers: int, `L`.
        num_query_heads: int, `N`.
        num_key_value_heads: int, `K`; divides `N`.
        hidden_dim: int, the width `D`.
        intermediate_dim: int. Both branches of the GeGLU together, `2F`.
        head_dim: int, `H`; even.
        layer_norm_epsilon: float.
        dropout: float. Share of attention weights dropped in training.
        recompute: what training keeps of every block for the backward pass, the rest being computed once more:
            `"none"` keeps everything, `"dots"` the results of products with weights (the speed of JAX suffers little
            from it), `"block"` only the block's input. Or a JAX checkpoint policy, which may choose among the names
            `"query"`, `"key"`, `"value"`, `"attended"` and `"gated"`. TensorFlow and torch take `"dots"` and policies
            for `"block"`. May be set later, too, before `compile`. Not part of a preset.
        scan_layers: bool or `"auto"`. Whether compiled training on JAX runs the blocks as one scanned program, whose
            size and compile time do not grow with their number; variables stay those of each block. `"auto"` does so
            on accelerators, and on a CPU where something is recomputed. Not part of a preset.
        dtype: a dtype policy or its name. Norms, rotary embedding, softmax and logits are float32 under
            every policy.
        query_head_dim_normalize, use_post_ffw_norm, use_post_attention_norm, attention_logit_soft_cap,
            final_logit_soft_cap, use_sliding_window_attention, sliding_window_size: as in keras-hub, with the
            values of Gemma 1 only.

    Call arguments:
        inputs: dict of int tensors `[B, T]`: `token_ids`, `padding_mask` (1 where a token stands), and for
            packed rows optionally `segment_ids` (from 1; tokens of different segments do not see each other)
            and `positions` (from 0 in every segment).

    Returns:
        Hidden states `[B, T, D]` in the compute dtype.

    Raises:
        ValueError: for a value that Gemma 1 does not have, sizes that are no positive whole numbers or more than 1000
            layers, heads that do not divide, an epsilon or a dropout that is none.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.models import GemmaBackbone
    >>> backbone = GemmaBackbone(
    ...     vocabulary_size=64, num_layers=2, num_query_heads=4, num_key_value_heads=1,
    ...     hidden_dim=16, intermediate_dim=64, head_dim=8,
    ... )
    >>> ones = np.ones((2, 5), "int32")
    >>> backbone({"token_ids": ones, "padding_mask": ones}).shape
    (2, 5, 16)
    """

    presets = Presets()

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_query_heads,
        num_key_value_heads,
        hidden_dim,
        intermediate_dim,
        head_dim,
        query_head_dim_normalize=True,
        use_post_ffw_norm=False,
        use_post_attention_norm=False,
        attention_logit_soft_cap=None,
        final_logit_soft_cap=None,
        use_sliding_window_attention=False,
        sliding_window_size=4096,
        layer_norm_epsilon=1e-6,
        dropout=0,
        recompute="none",
        scan_layers="auto",
        dtype=None,
        **kwargs,
    ):
        _refuse_later_gemmas(
            query_head_dim_normalize=query_head_dim_normalize,
            use_post_ffw_norm=use_post_ffw_norm,
            use_post_attention_norm=use_post_attention_norm,
            attention_logit_soft_cap=attention_logit_soft_cap,
            final_logit_soft_cap=final_logit_soft_cap,
            use_sliding_window_attention=use_sliding_window_attention,
        )
        recompute = keras.saving.deserialize_keras_object(recompute) if isinstance(recompute, dict) else recompute
        _check_training_settings(recompute, scan_layers)
        of_block = {
            "num_query_heads": num_query_heads,
            "num_key_value_heads": num_key_value_heads,
            "hidden_dim": hidden_dim,
            "intermediate_dim": intermediate_dim,
            "head_dim": head_dim,
            "layer_norm_epsilon": layer_norm_epsilon,
            "dropout": dropout,
        }
        sizes = {
            "vocabulary_size": vocabulary_size,
            "num_layers": num_layers,
            "sliding_window_size": sliding_window_size,
        }
        settings.check_backbone({**sizes, **of_block})
        _check_weights(vocabulary_size, **of_block)

        # === Layers ===
        self.token_embedding = ReversibleEmbedding(
            input_dim=vocabulary_size,
            output_dim=hidden_dim,
            tie_weights=True,
            embeddings_initializer=keras.initializers.VarianceScaling(1.0, "fan_in", "untruncated_normal"),
            dtype=dtype,
            name="token_embedding",
        )
        self.embedding_scale = EmbeddingScale(dtype=dtype, name="embedding_scale")
        self.rotary_embedding = RotaryEmbedding(head_dim, dtype=dtype, name="rotary_embedding")
        self.segment_ids = SegmentIds(dtype=dtype, name="segments")
        self.transformer_layers = [
            GemmaDecoderBlock(**of_block, dtype=dtype, name=f"decoder_block_{i}") for i in range(num_layers)
        ]
        self.layer_norm = RMSNormalization(layer_norm_epsilon, dtype=dtype, name="final_normalization")

        # === Functional model ===
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=self._hidden_states(token_ids, padding_mask),
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.sliding_window_size = sliding_window_size
        self.recompute = recompute
        self.scan_layers = scan_layers
        for name, value in {**of_block, **GEMMA_1_ONLY}.items():
            setattr(self, name, value)

    def _hidden_states(self, token_ids, padding_mask, segment_ids=None, positions=None, training=None):
        apart = kernels.tokens_apart
        sine, cosine = (apart(x) for x in self.rotary_embedding(token_ids, positions=positions))
        segments = apart(self.segment_ids(padding_mask, segment_ids=segment_ids))
        x = kernels.look_up(self.token_embedding, token_ids, cut_columns=True)
        x = kernels.stream_apart(self.embedding_scale(x))
        if training:
            kernels.refuse_uneven_columns(x.shape[1])
            how = {"recompute": self.recompute, "scan": self.scan_layers}
            x = kernels.run_layers(self.transformer_layers, x, sine, cosine, segments, **how)
        else:
            for block in self.transformer_layers:
                x = kernels.stream_apart(block(x, sine, cosine, segments))
        return kernels.out_of_stream(self.layer_norm(x))

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(without_absent(inputs), *args, **kwargs)

    def __repr__(self):
        return described(self, self)

    def call(self, inputs, training=None, mask=None):
        # `stateless_call`, and so `fit` on JAX, comes here without passing `__call__`.
        inputs = without_absent(inputs)
        # Keras' graph of the layers does not say where the rows lie.
        if training or is_packed(inputs) or keras.distribution.distribution() is not None:
            inputs = {name: ops.convert_to_tensor(inputs[name]) for name in INPUTS if name in inputs}
            return self._hidden_states(**inputs, training=training)
        return super().call(inputs, training=training, mask=mask)

    def compute_output_spec(self, inputs, training=None, mask=None):
        if is_packed(inputs):
            return keras.KerasTensor((*inputs["token_ids"].shape, self.hidden_dim), self.compute_dtype)
        return super().compute_output_spec(without_absent(inputs), training=training, mask=mask)

    def export(self, filepath, format="tf_saved_model", verbose=None, input_signature=None, **kwargs):
        """As `keras.Model.export`. On JAX and TensorFlow a SavedModel takes any batch size and length by default."""
        kwargs = kernels.export_arguments(self.input, format, input_signature, kwargs)
        super().export(filepath, format=format, verbose=verbose, input_signature=input_signature, **kwargs)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return kernels.with_flags_bound(super().rematerialized_call)(layer_call, *args, **kwargs)

    # === Quantisation ===

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """Quantises the weights in place. See `keras.Model.quantize`.

        Args:
            mode: `"int8"`, `"int4"` or `"float8"`; with a `config` of `keras.quantizers` also `"gptq"` and `"awq"`,
                which measure texts first: `GPTQConfig(dataset=texts, tokenizer=preprocessor.tokenizer)`.
            config: optional configuration of `keras.quantizers`.
            filters: optional regular expression of the names of layers, or several of them, or a callable.

        Raises:
            ValueError: for float8, GPTQ and AWQ of a backbone with adapters.
        """
        with quantization.quantizing(self, mode, config, filters) as filters:
            super().quantize(mode, config=config, filters=filters, **kwargs)

    def get_quantization_layer_structure(self, mode=None):
        """Which layers GPTQ and AWQ go through, in their order. `None` for other modes."""
        return quantization.structure_of(self, mode)

    # === Adapters ===

    def enable_lora(self, rank, target_layer_names=None, lora_alpha=None):
        """Freezes all weights and trains LoRA adapters (Hu et al., arXiv 2106.09685) in their place.

        Call `compile` afterwards: an optimizer keeps its state for the weights that it was made for.

        Args:
            rank: int, at least 1.
            target_layer_names: optional list of some of `"query"`, `"key"`, `"value"`, `"attention_output"`,
                `"ffw_gating"`, `"ffw_gating_2"`, `"ffw_linear"` and `"token_embedding"`. By default query and value,
                as in keras-hub.
            lora_alpha: optional float. What adapters add is scaled by `lora_alpha / rank`. By default the rank.

        Raises:
            ValueError: for a rank below 1, names that no layer has, a backbone that has adapters, and for weights in
                float8, GPTQ or AWQ; nothing is changed then.

        Example:

        >>> from keras_gemma.models import GemmaBackbone
        >>> backbone = GemmaBackbone(
        ...     vocabulary_size=64, num_layers=2, num_query_heads=4, num_key_value_heads=1,
        ...     hidden_dim=16, intermediate_dim=64, head_dim=8,
        ... )
        >>> backbone.enable_lora(rank=4, target_layer_names=["query", "value", "ffw_linear"], lora_alpha=8)
        >>> len(backbone.trainable_weights)
        12
        >>> backbone.merge_lora()
        >>> len(backbone.trainable_weights)
        20
        """
        names = self.default_lora_layer_names() if target_layer_names is None else target_layer_names
        lora.refuse_adapters(self, rank, names)
        lora.enable(self, rank, names, lora_alpha)

    def default_lora_layer_names(self):
        """Names of the layers that `enable_lora` gives adapters to unless told."""
        return ["query", "value"]

    def disable_lora(self):
        """Takes the adapters away: weights are as before `enable_lora`, and those that can train do so again.

        Raises:
            ValueError: for a backbone without adapters.
        """
        lora.refuse_without_adapters(self)
        lora.disable(self)

    def merge_lora(self):
        """Adds to the weights what the adapters add, and takes these away. Weights that can train do so again.

        Sums of int8 and int4 weights are quantised anew, as in a preset that is saved with adapters: each then has
        another scale, and the outputs change by the rounding.

        Raises:
            ValueError: for a backbone without adapters.
        """
        lora.refuse_without_adapters(self)
        lora.merge(self)

    @distribution.written_once
    def save_lora_weights(self, filepath):
        """Writes the adapters to a file, with the names of their layers, rank and alpha.

        keras-hub's Gemma reads it too, where alpha is the rank and the layers are query and value.

        Args:
            filepath: path that ends with `.lora.h5`. A file that exists is replaced when the new one is complete.

        Raises:
            ValueError: for a backbone without adapters, and for another ending.
            OSError: for a disk without room.
        """
        lora.refuse_without_adapters(self)
        checkpoints.save_lora(self, filepath, lora.adapted_layers(self))

    def load_lora_weights(self, filepath):
        """Takes adapters from a file that `save_lora_weights` wrote here or in keras-hub.

        A backbone without adapters gets them, as by `enable_lora`, for the layers and with the rank of the file.

        Args:
            filepath: path.

        Raises:
            FileNotFoundError: for a missing file.
            ValueError: for a damaged file, adapters of a model with other blocks or shapes, and a backbone that has
                adapters of another rank or of other layers. The backbone is as it was then.
        """
        lora.load(self, checkpoints.read_lora(self, filepath, lora.adaptable_layers(self)))

    @staticmethod
    def get_layout_map(
        device_mesh,
        model_parallel_dim_name="model",
        data_parallel_dim_name="batch",
        num_query_heads=8,
        num_key_value_heads=1,
    ):
        """Layouts of the weights for `keras.distribution.ModelParallel`.

        Vocabulary, feed-forward and heads are cut along the model axis and the width along the data axis, in
        adapters and 8-bit weights too. Heads that the model axis does not divide stay whole. What an optimizer keeps
        of a weight lies where the weight lies. The table is `keras_gemma.distribution.layouts`.

        Args:
            device_mesh: a `keras.distribution.DeviceMesh` with both axes.
            model_parallel_dim_name: string. Name of the model axis.
            data_parallel_dim_name: string. Name of the data axis.
            num_query_heads: int, `N`. With the default every mesh suits Gemma 2B and 7B.
            num_key_value_heads: int, `K`. Pass 7B's 16 to cut its keys and values too.

        Returns:
            A `keras.distribution.LayoutMap`.

        Raises:
            ValueError: for anything but a mesh, or a mesh without one of the axes.
        """
        heads = {"N": num_query_heads, "K": num_key_value_heads}
        return distribution.layout_map(device_mesh, model_parallel_dim_name, data_parallel_dim_name, heads)

    def get_config(self):
        config = super().get_config()
        config.update(GEMMA_1_ONLY)
        config.update({name: getattr(self, name) for name in SIZES})
        recompute = self.recompute
        config["recompute"] = (
            recompute if isinstance(recompute, str) else keras.saving.serialize_keras_object(recompute)
        )
        config["scan_layers"] = self.scan_layers
        return config

    @distribution.written_once
    def export_to_transformers(self, path):
        """Writes configuration and weights for transformers.

        Args:
            path: string. The folder to write, made if missing. Files of the same names are replaced at the end.

        Raises:
            ValueError: for quantised weights, and for numbers that are not finite.
        """
        checkpoints.export_model(path, self)

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Loads the backbone of a preset.

        Args:
            preset: as of `GemmaCausalLM.from_preset`.
            load_weights: bool. `False` initialises at random.
            **kwargs: constructor arguments that replace the preset's, `dtype` for instance.

        Returns:
            A `GemmaBackbone`.

        Raises:
            ValueError, FileNotFoundError: as of `GemmaCausalLM.from_preset`.
        """
        return checkpoints.load_backbone(cls, preset, load_weights=load_weights, **kwargs)

    @distribution.written_once
    def save_to_preset(self, preset_dir, max_shard_size=10):
        """Saves the backbone as a preset. See `GemmaCausalLM.save_to_preset`."""
        checkpoints.save_backbone(self, preset_dir, max_shard_size=max_shard_size)

    save_weights = distribution.written_once(checkpoints.save_weights)


def _check_weights(vocabulary_size, num_query_heads, num_key_value_heads, hidden_dim, intermediate_dim, head_dim, **_):
    shapes = distribution.shapes_of_weights(
        V=vocabulary_size,
        D=hidden_dim,
        N=num_query_heads,
        K=num_key_value_heads,
        H=head_dim,
        F=intermediate_dim // 2,
    )
    distribution.check_weights(shapes)


def _check_training_settings(recompute, scan_layers):
    if not callable(recompute) and recompute not in kernels.RECOMPUTE_POLICIES:
        names = ", ".join(map(repr, kernels.RECOMPUTE_POLICIES))
        raise ValueError(f"`recompute` is one of {names}, or a JAX checkpoint policy. Received: {recompute!r}")
    if scan_layers not in (True, False, "auto"):
        raise ValueError(f"`scan_layers` is True, False or 'auto'. Received: {scan_layers!r}")


def _refuse_later_gemmas(**received):
    for name, value in received.items():
        if value != GEMMA_1_ONLY[name]:
            raise ValueError(
                f"Gemma 1 has `{name}={GEMMA_1_ONLY[name]}` only. Received: {name}={value}. "
                "For Gemma 2 use `keras_hub.models.GemmaBackbone`."
            )
