import keras
import keras_hub
import numpy as np
from keras import ops

from keras_gemma import checkpoints
from keras_gemma import data
from keras_gemma import distribution
from keras_gemma import generation
from keras_gemma import kernels
from keras_gemma.models import cloning
from keras_gemma.models import generating
from keras_gemma.models import quantization
from keras_gemma.models import scoring
from keras_gemma.models import text_generation
from keras_gemma.models.backbone import GemmaBackbone
from keras_gemma.models.causal_lm_preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.models.description import described
from keras_gemma.models.packed_inputs import is_packed
from keras_gemma.models.packed_inputs import without_absent
from keras_gemma.models.preprocessor_outputs import numpy_outputs
from keras_gemma.models.presets import Presets
from keras_gemma.models.tokenizer import GemmaTokenizer
from keras_gemma.training import NextTokenLoss
from keras_gemma.training import Perplexity
from keras_gemma.training import TokenAccuracy
from keras_gemma.training import TokenCount
from keras_gemma.training import exact_resume_among
from keras_gemma.training import in_whole_steps
from keras_gemma.training import refuse_uncompiled
from keras_gemma.training import step
from keras_gemma.training import with_progress_bar
from keras_gemma.training.objective import is_of_token_sums
from keras_gemma.training.optimizers import warn_of_accumulation_by_batches
from keras_gemma.training.optimizers import warn_of_weights_that_cannot_move
from keras_gemma.training.trained_weights import made_for_another_structure
from keras_gemma.training.trained_weights import refuse_other_weights_than_compiled
from keras_gemma.training.trained_weights import refuse_what_does_not_train


@kernels.with_torch_parameters
@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaCausalLM(keras_hub.models.CausalLM):
    """Gemma as a language model: trains with `fit`, writes with `generate`.

    Args:
        backbone: a `GemmaBackbone`.
        preprocessor: a `GemmaCausalLMPreprocessor`, or `None` to feed and receive token ids.

    Call arguments:
        inputs: as of `GemmaBackbone`.

    Returns:
        Float32 logits `[B, T, V]`.
    """

    backbone_cls = GemmaBackbone
    preprocessor_cls = GemmaCausalLMPreprocessor
    presets = Presets()

    def __init__(self, backbone, preprocessor=None, **kwargs):
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional model ===
        inputs = backbone.input
        logits = backbone.token_embedding(backbone(inputs), reverse=True)
        super().__init__(inputs=inputs, outputs=logits, **kwargs)

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(without_absent(inputs), *args, **kwargs)

    def __repr__(self):
        return described(self, self.backbone)

    def call(self, inputs, training=None, mask=None):
        inputs = without_absent(inputs)
        if is_packed(inputs):
            return self.backbone.token_embedding(self.backbone(inputs, training=training), reverse=True)
        return super().call(inputs, training=training, mask=mask)

    def compute_output_spec(self, inputs, training=None, mask=None):
        if is_packed(inputs):
            return keras.KerasTensor((*inputs["token_ids"].shape, self.backbone.vocabulary_size), "float32")
        return super().compute_output_spec(without_absent(inputs), training=training, mask=mask)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return kernels.with_flags_bound(super().rematerialized_call)(layer_call, *args, **kwargs)

    # === Training ===

    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        weighted_metrics="auto",
        sampler="greedy",
        gradient_accumulation_steps=1,
        **kwargs,
    ):
        """Configures training and sampling.

        With the loss `keras_gemma.training.NextTokenLoss` and no metrics but `Perplexity` and `TokenAccuracy`, as by
        default, `fit` and `evaluate` never form the logits of a whole batch. With any other loss or metric they do.

        Args:
            optimizer: as of `keras.Model.compile`; `"auto"` is Adam at 2e-5.
            loss: as of `keras.Model.compile`; `"auto"` is `NextTokenLoss()`, the cross-entropy of the next token,
                divided by the sum of the weights (not by the number of positions).
            weighted_metrics: as of `keras.Model.compile`; `"auto"` is `perplexity` and `token_accuracy` (where
                keras-hub has `sparse_categorical_accuracy` alone).
            sampler: a keras-hub sampler or its name.
            gradient_accumulation_steps: int. Into how many microbatches every batch is cut. One at a time is in memory;
                their gradients make one step of the optimizer, equal to that of the whole batch, however the weights
                are spread over the rows. (`gradient_accumulation_steps` of Keras' optimizers averages over batches
                instead, whatever weight each has, which is warned of.)
            **kwargs: passed to `keras.Model.compile`.

        Raises:
            ValueError: for fewer than one accumulation step, and for a sampler that makes no distribution.
        """
        if gradient_accumulation_steps < 1:
            raise ValueError(
                "`gradient_accumulation_steps` cuts a batch into at least 1 part. "
                f"Received: {gradient_accumulation_steps}"
            )
        generation.resolve_sampler(sampler, self.backbone.vocabulary_size)
        if loss == "auto":
            loss = NextTokenLoss()
        if weighted_metrics == "auto":
            weighted_metrics = [Perplexity(), TokenAccuracy()]
        needs_no_logits = (
            isinstance(loss, NextTokenLoss)
            and not kwargs.get("metrics")
            and all(is_of_token_sums(metric) for metric in weighted_metrics or ())
        )
        # Not among the attributes that Keras tracks: it would list them as metrics for good.
        self.__dict__["_token_metrics"] = list(weighted_metrics or ()) if needs_no_logits else None
        self.__dict__["_token_count"] = TokenCount()
        self.gradient_accumulation_steps = gradient_accumulation_steps
        super().compile(
            optimizer=optimizer,
            loss=loss,
            weighted_metrics=None if needs_no_logits else weighted_metrics,
            sampler=sampler,
            **kwargs,
        )
        warn_of_accumulation_by_batches(self.optimizer)

    def get_compile_config(self):
        config = super().get_compile_config()
        if not config:
            return config
        if self._token_metrics is not None:
            config["weighted_metrics"] = keras.saving.serialize_keras_object(self._token_metrics)
        return cloning.with_own_arguments(
            self,
            config,
            sampler=keras_hub.samplers.serialize(self.sampler),
            gradient_accumulation_steps=self.gradient_accumulation_steps,
        )

    def compile_from_config(self, config):
        # Keras skips this for a class with its own `compile`; ours takes what `get_compile_config` gives.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self):
        own = [self._token_count] if "_token_count" in self.__dict__ else []
        return [*super().metrics, *(self.__dict__.get("_token_metrics") or ()), *own]

    def train_step(self, *args):
        return step.train_step(self, *args, microbatches=self.gradient_accumulation_steps)

    def test_step(self, *args):
        return step.test_step(self, *args)

    def outcome_of(self, batch, total_weight, share, training):
        """The forward pass of a step. See `keras_gemma.training.step`.

        Args:
            batch: a `Microbatch`.
            total_weight: float scalar, the sum of the weights of the whole batch.
            share: float scalar, the part of it that this microbatch has.
            training: bool.

        Returns:
            The microbatch's part of the loss, and `TokenSums`, or logits where loss or metrics want them.
        """
        if self._trains_without_logits:
            loss, outcome = self._loss_and_token_sums(batch, total_weight, training)
            return loss + sum((ops.sum(added) for added in self.losses), start=0.0) * share, outcome
        logits = self(batch.x, training=training)
        loss = self.compute_loss(
            x=batch.x, y=batch.y, y_pred=logits, sample_weight=batch.sample_weight, training=training
        )
        return loss * share, logits

    def logs_with(self, loss, outcome, batch, total_weight):
        """Adds the outcome of a microbatch to the metrics and returns their results. See `keras_gemma.training.step`.

        The mean loss of an epoch is that of its tokens, not of its batches.
        """
        self._loss_tracker.total.assign_add(loss * total_weight)
        self._loss_tracker.count.assign_add(step.weight_of(batch))
        self._token_count.update_state(batch.y, sample_weight=batch.x["padding_mask"])
        if not self._trains_without_logits:
            return self.compute_metrics(batch.x, batch.y, outcome, batch.sample_weight)
        for metric in self._token_metrics:
            metric.add(outcome)
        return self.get_metrics_result()

    @property
    def _trains_without_logits(self):
        # A subclass that overrides either expects logits there.
        cls = type(self)
        overridden = (
            cls.compute_loss is not GemmaCausalLM.compute_loss
            or cls.compute_metrics is not GemmaCausalLM.compute_metrics
        )
        return self._token_metrics is not None and not overridden

    def _loss_and_token_sums(self, batch, total_weight, training):
        weights = ops.cast(step.weights_of(batch), "float32")
        if len(weights.shape) < len(batch.y.shape):
            weights = ops.broadcast_to(weights[:, None], ops.shape(batch.y))
        # Divided before and not after: the gradient of the embeddings, the largest there is, then needs no division.
        weights = weights / total_weight
        embedding = self.backbone.token_embedding
        hidden = self.backbone(batch.x, training=training)
        if embedding.quantization_mode is None:
            sums = kernels.vocabulary_loss(hidden, embedding.embeddings, batch.y, weights, self.loss.z_loss)
        else:
            sums = kernels.logits_loss(embedding(hidden, reverse=True), batch.y, weights, self.loss.z_loss)
        return sums.objective, kernels.TokenSums(*(value * total_weight for value in sums))

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        validation_data=None,
        validation_split=0.0,
        validation_batch_size=None,
        shuffle=True,
        pack=False,
        long_texts="split",
        **kwargs,
    ):
        """Trains the model on text or token ids.

        Args:
            x: strings, `{"prompts", "responses"}` or dialogues as lists (see `GemmaCausalLMPreprocessor`); a
                `tf.data.Dataset`, Grain data set, `keras.utils.PyDataset`, generator or torch `DataLoader` of
                such batches; without a preprocessor, the model's own inputs. Batches `(x, y, sample_weight)` of
                token ids, such as `data.training_batches` makes, pass as they are.
            shuffle: bool. Draws a new order of listed examples (packed, of their rows), or of a `PyDataset`'s batches,
                each epoch.
            pack: bool. Puts several examples into each row, where none attends to another: less padding, the same loss.
                `x` and `validation_data` are then examples as lists or arrays, or Grain data sets of single examples,
                and `batch_size` counts rows.
            long_texts: string, what becomes of strings that are longer than the preprocessor's `sequence_length`, with
                lists, arrays and Grain data sets to pack: `"split"` makes several rows of each, which learn all of it
                once and share its `sample_weight` (`batch_size` counts rows); `"truncate"` drops what goes beyond the
                first row; `"refuse"` raises, also for prompts with responses and dialogues, whose end is dropped
                otherwise. A warning counts what is cut. Batches of data sets are cut, and warned of.
            y, batch_size, sample_weight, validation_data, validation_split, validation_batch_size, **kwargs: as of
                `keras.Model.fit`.

        Several processes (see `keras_gemma.distribution.initialize`) call `fit` alike. Lists, arrays, `PyDataset`,
        `tf.data`, generators and `DataLoader`s are the same on all of them, `batch_size` counts the rows of all, and
        each process trains the rows of its own devices. A Grain data set is the share of this process, as
        `data.mixture` makes it, and so is anything under a distribution with `auto_shard_dataset=False`: batches count
        its own rows, and a data set of one's own is cut by `distribution.share_of_data()`. Give `steps_per_epoch` with
        shares of unknown length: without it the processes wait for each other before each batch.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: where processes hand over different batches that should be the same, or shares that do not
                fit together; for texts that are none and those that `long_texts` refuses, with their number; and for a
                new vocabulary that no other format can describe, so that the model could not be exported.
        """
        refuse_uncompiled(self, "fit")
        refuse_what_does_not_train(self)
        warn_of_weights_that_cannot_move(self)
        if isinstance(getattr(self.preprocessor, "tokenizer", None), GemmaTokenizer):
            self.preprocessor.tokenizer.refuse_what_cannot_be_exported()
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = data.split_off_validation(x, y, sample_weight, validation_split)
        if validation_data is not None:
            validation_data = _unpacked(validation_data)
            # A validation set in batches keeps their size.
            sized = not pack and data.yields_batches(validation_data[0])
            validation_size = None if sized else validation_batch_size or batch_size
            validation_data = self._batches(*validation_data, validation_size, pack=pack, long_texts=long_texts)
        # Listed examples are shuffled one by one below; Keras can shuffle whole batches only.
        shuffle_batches = shuffle and isinstance(x, keras.utils.PyDataset)
        x = self._batches(x, y, sample_weight, batch_size, shuffle, pack, long_texts)
        if validation_data is not None:
            validation_data = distribution.filled_up(validation_data, steps=kwargs.get("validation_steps"))
            validation_data = data.checked(validation_data, self.token_rules)
        kwargs["callbacks"] = with_progress_bar(kwargs.get("callbacks"), kwargs.get("verbose", "auto"))
        if exact_resume := exact_resume_among(kwargs.get("callbacks")):
            return exact_resume.fit(self, x, validation_data=validation_data, shuffle=shuffle_batches, **kwargs)
        x = distribution.filled_up(x, shuffle_batches, kwargs.get("class_weight"), kwargs.get("steps_per_epoch"))
        x = data.checked(x, self.token_rules, shuffle_batches, kwargs.get("class_weight"))
        return in_whole_steps(keras.Model.fit)(
            self, x, validation_data=validation_data, shuffle=shuffle_batches, **kwargs
        )

    def evaluate(self, x=None, y=None, batch_size=None, sample_weight=None, pack=False, long_texts="split", **kwargs):
        """Loss and metrics on anything that `fit` takes. See `keras.Model.evaluate`."""
        refuse_uncompiled(self, "evaluate")
        if not kwargs.get("_use_cached_eval_dataset"):
            x = self._batches(x, y, sample_weight, batch_size, pack=pack, long_texts=long_texts)
            y, sample_weight = None, None
            x = data.checked(distribution.filled_up(x, steps=kwargs.get("steps")), self.token_rules)
            kwargs["callbacks"] = with_progress_bar(kwargs.get("callbacks"), kwargs.get("verbose", "auto"))
        return in_whole_steps(keras.Model.evaluate)(self, x, y, sample_weight=sample_weight, **kwargs)

    def predict(self, x=None, batch_size=None, **kwargs):
        """Logits `[B, T, V]` of anything that `fit` takes. See `keras.Model.predict`.

        On several processes all rows on each of them; of a share that a process reads, its own.
        """
        batches = distribution.filled_up(self._batches(x, None, None, batch_size), steps=kwargs.get("steps"))
        rows = data.checked(batches, self.token_rules)
        return distribution.own_rows(batches, in_whole_steps(keras.Model.predict)(self, rows, **kwargs))

    @property
    def token_rules(self):
        """What batches must keep to, a `data.TokenRules`."""
        # Targets of a loss of one's own may be anything.
        own_loss = type(self).compute_loss is not GemmaCausalLM.compute_loss
        of_ids = isinstance(getattr(self, "loss", None), keras.losses.SparseCategoricalCrossentropy)
        return data.TokenRules(self.backbone.vocabulary_size, has_labels=of_ids and not own_loss)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        """As in keras-hub, and refuses what is no token of the model."""
        with numpy_outputs():
            samples = super().preprocess_samples(x, y, sample_weight)
        self.token_rules.refuse(*keras.utils.unpack_x_y_sample_weight(samples))
        return samples

    train_on_batch = in_whole_steps(keras_hub.models.CausalLM.train_on_batch)
    test_on_batch = in_whole_steps(keras_hub.models.CausalLM.test_on_batch)
    predict_on_batch = in_whole_steps(keras_hub.models.CausalLM.predict_on_batch)

    def make_train_function(self, force=False):
        refuse_other_weights_than_compiled(self)
        super().make_train_function(force or made_for_another_structure(self, "train_function"))

    def make_test_function(self, force=False):
        super().make_test_function(force or made_for_another_structure(self, "test_function"))

    def make_predict_function(self, force=False):
        force = made_for_another_structure(self, "predict_function") or force
        if self.predict_function is None or force:
            super().make_predict_function(force)
            if keras.backend.backend() == "jax":
                self.predict_function = distribution.with_whole_outputs(self.predict_function)

    def score(self, token_ids, padding_mask=None, scoring_mode="logits", layer_intercept_fn=None, target_ids=None):
        """Logits or losses of given tokens, with a look at every layer on the way.

        Args:
            token_ids: int tensor `[B, T]`.
            padding_mask: optional tensor `[B, T]`, true where a token stands. All of them if left out.
            scoring_mode: `"logits"` or `"loss"`.
            layer_intercept_fn: optional callable `(activations [B, T, D], index) → activations`, called with the
                token embeddings before they are scaled (index -1) and with the output of every decoder block
                (from 0). What it returns goes on to the next layer.
            target_ids: int tensor `[B, T]`, the tokens that `"loss"` compares with.

        Returns:
            Float32 logits `[B, T, V]`, or losses `[B, T]`.

        Raises:
            ValueError: for an unknown mode, `"loss"` without `target_ids`, and ids outside the vocabulary in lists and
                NumPy arrays.
        """
        if scoring_mode not in ("logits", "loss"):
            raise ValueError(f"`scoring_mode` is 'logits' or 'loss'. Received: {scoring_mode!r}")
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError("`scoring_mode='loss'` compares with `target_ids`. Received: target_ids=None")
        for name, ids in (("token_ids", token_ids), ("target_ids", target_ids)):
            if isinstance(ids, (list, tuple, np.ndarray)):
                data.refuse_ids_outside(np.asarray(ids), self.backbone.vocabulary_size, name)
        intercept = layer_intercept_fn or (lambda x, index: x)
        backbone = self.backbone
        token_ids = ops.convert_to_tensor(token_ids, "int32")
        padding_mask = ops.ones_like(token_ids) if padding_mask is None else ops.convert_to_tensor(padding_mask)

        sine, cosine = backbone.rotary_embedding(token_ids)
        segments = backbone.segment_ids(padding_mask)
        x = backbone.embedding_scale(intercept(backbone.token_embedding(token_ids), -1))
        for index, block in enumerate(backbone.transformer_layers):
            x = intercept(block(x, sine, cosine, segments), index)
        logits = backbone.token_embedding(backbone.layer_norm(x), reverse=True)
        if scoring_mode == "logits":
            return logits
        return keras.losses.sparse_categorical_crossentropy(target_ids, logits, from_logits=True)

    def score_texts(self, texts, batch_size=8, max_length=scoring.LONGEST, stride=None):
        """What the model thinks of texts: log-probability, perplexity, bits per byte.

        Args:
            texts: a string or a list of strings; or `{"prompts", "responses"}`, of which the responses are scored.
                `<eos>` is not part of what is scored.
            batch_size: int, texts that are scored at once.
            max_length: int, tokens that are scored as one. By default those that Gemma was trained on.
            stride: optional int. A longer text is scored in windows of `max_length` tokens, each of which scores
                `stride` tokens more than the one before. `None` refuses it.

        Returns:
            A `TextScore`, or a list of them: `log_prob`, `tokens`, `perplexity` and `bits_per_byte`, and `log_probs`
            `[n]` and `token_ids` `[n]` token by token.

        Raises:
            ValueError: for a text without a token or too long, and without a preprocessor.
        """
        return scoring.score_texts(self, texts, batch_size, max_length, stride)

    def embed(self, texts, pooling="mean", batch_size=8, max_length=scoring.LONGEST, normalize=False):
        """A vector for each text, from the final hidden states of its tokens.

        Args:
            texts: a string or a dialogue, or a list of either.
            pooling: `"mean"` or `"max"` of all tokens, `<bos>` included, or `"last"`, the state of the last token.
            batch_size: int, texts that are embedded at once.
            max_length: int, most tokens of a text.
            normalize: bool. Divides each vector by its length.

        Returns:
            Float32 NumPy array `[N, D]`; for a single text `[D]`.

        Raises:
            ValueError: for an unknown pooling, a text that is too long, and without a preprocessor.
        """
        return scoring.embed(self, texts, pooling, batch_size, max_length, normalize)

    def _batches(self, x, y, sample_weight, batch_size, shuffle=False, pack=False, long_texts="truncate"):
        if pack:
            return data.packed(x, y, sample_weight, batch_size, self.preprocessor, shuffle, long_texts)
        # A preprocessor of one's own makes of examples what it likes.
        makes_rows = getattr(type(self.preprocessor), "call", None) is GemmaCausalLMPreprocessor.call
        if makes_rows and not data.yields_batches(x):
            preprocess = self.preprocess_samples
            return data.padded(x, y, sample_weight, batch_size, self.preprocessor, preprocess, shuffle, long_texts)
        return data.preprocessed(x, y, sample_weight, batch_size, self.preprocess_samples, shuffle)

    # === Generating ===

    def generate(
        self,
        inputs,
        max_length=None,
        stop_token_ids="auto",
        strip_prompt=False,
        *,
        max_new_tokens=None,
        sampler=None,
        seed=None,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        repetition_penalty=None,
        stop=None,
        num_return_sequences=None,
        return_log_probs=False,
        allow_special_tokens=None,
    ):
        """Continues prompts.

        Rows of a batch decode in step whatever their lengths. Sizes are rounded up to buckets, so that calls of new
        lengths rarely compile anything; beam and contrastive search compile for every new length.

        `temperature`, `top_k`, `top_p` and `min_p` draw tokens by chance. They take the place of the model's sampler
        for this call, and work together in this order, as in transformers. Other numbers compile nothing new.

        Args:
            inputs: a string; a dialogue, that is a list of `{"role", "content"}` messages, which the model answers;
                a list of either; `{"prompts": ...}` of these; token ids `{"token_ids", "padding_mask"}`, each
                `[B, T]` and padded on the right; or a `tf.data.Dataset`, Grain data set or generator of such batches.
            max_length: optional int. Most tokens of prompt and continuation together. By default the preprocessor's
                `sequence_length`, unless `max_new_tokens` is given; for token ids `T`.
            stop_token_ids: ids that end a row, `None` for none, or `"auto"`: `<eos>`, and `<end_of_turn>` where the
                vocabulary has it.
            strip_prompt: bool. Leaves the prompt out of what is returned.
            max_new_tokens: optional int. Most tokens of the continuation. Where `max_length` is given too, the
                smaller limit holds.
            sampler: a keras-hub sampler or its name for this call, in place of the one the model was compiled with.
                One of temperature 0 takes the likeliest token.
            seed: optional int. Equal seeds give equal samples. Without one the sampler goes on from call to call.
            temperature: optional float. Divides the logits: below 1 likely tokens become likelier; 0 always takes the
                likeliest. 1 unless given.
            top_k: optional int. Draws from that many of the likeliest tokens.
            top_p: optional float, above 0 and at most 1. Draws from the likeliest tokens that together reach this
                probability.
            min_p: optional float from 0 to 1. Draws from tokens at least so likely, compared with the likeliest.
            repetition_penalty: optional float. Above 1, tokens that prompt or continuation already have become less
                likely. It goes with any sampler that chooses token by token.
            stop: optional string or list of strings. A row ends where its new text comes to one of them, which is left
                out of the text. Rows of token ids end with the token that completes it.
            num_return_sequences: optional int. Returns a list of so many texts for each prompt, which is run once for
                all of them. Rows of token ids stand beside each other.
            return_log_probs: bool. Returns a `GeneratedText` in place of each string, with the new token ids and the
                log-probability of each under the model itself; for token ids a further float32 array `"log_probs"`
                `[B, T]`, 0 where nothing was generated.
            allow_special_tokens: optional bool. Whether special tokens that a prompt spells, such as `<start_of_turn>`,
                become their ids or stay text. By default as the preprocessor does, which keeps them as text.

        Returns:
            A string or a list of strings; for token ids a dict of NumPy arrays as `inputs`, whose mask runs up to the
            stop token, that one included.

        Raises:
            ValueError: for a prompt that leaves no room, an empty batch, an unknown sampler, a limit below 1, settings
                that make no distribution, `sampler` beside the settings that take its place, several sequences of a
                sampler that would repeat itself, and token ids without `stop_token_ids` when there is no preprocessor.

        Example:

        >>> import numpy as np
        >>> from keras_gemma.models import GemmaBackbone, GemmaCausalLM
        >>> backbone = GemmaBackbone(
        ...     vocabulary_size=64, num_layers=2, num_query_heads=4, num_key_value_heads=1,
        ...     hidden_dim=16, intermediate_dim=64, head_dim=8,
        ... )
        >>> model = GemmaCausalLM(backbone, preprocessor=None)
        >>> prompt = {"token_ids": np.array([[2, 7, 0, 0, 0]]), "padding_mask": np.array([[1, 1, 0, 0, 0]])}
        >>> model.generate(prompt, stop_token_ids=None)["padding_mask"].sum()
        np.int64(5)
        """
        options = generating.options_of(
            self,
            stop_token_ids=stop_token_ids,
            stop=stop,
            sampler=sampler,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            strip_prompt=strip_prompt,
            num_return_sequences=num_return_sequences,
            return_log_probs=return_log_probs,
            allow_special_tokens=allow_special_tokens,
        )
        return generating.generate(self, inputs, options)

    def overrides(self, *names):
        """Whether a subclass has a method of its own in place of one of these of `GemmaCausalLM`."""
        return any(getattr(getattr(self, n), "__func__", None) is not getattr(GemmaCausalLM, n) for n in names)

    @property
    def engine(self):
        """The `keras_gemma.generation.Engine` of this model's backbone, which continues prompts of token ids."""
        # Compiled programs are no state of the model: they are neither saved nor copied with it.
        if "_generation_engine" not in self.__dict__:
            self.__dict__["_generation_engine"] = self._make_engine()
        engine = self.__dict__["_generation_engine"]
        # At each use: another preprocessor may have taken the place of the first.
        engine.vocabulary_size = text_generation.vocabulary_size_of(self.preprocessor)
        return engine

    def _make_engine(self):
        own = self.overrides("call_with_cache")
        return generation.OverriddenEngine(self) if own else generation.Engine(self.backbone)

    def stream(
        self,
        prompt,
        max_length=None,
        stop_token_ids="auto",
        *,
        max_new_tokens=None,
        sampler=None,
        seed=None,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        repetition_penalty=None,
        stop=None,
        allow_special_tokens=None,
    ):
        """Continues prompts and yields the new text as it comes.

        The pieces together are what `generate(prompt, strip_prompt=True)` returns with the same arguments. No piece
        ends inside a character.

        Args:
            prompt: a string or a dialogue, or a list of either.
            max_length, stop_token_ids, max_new_tokens, sampler, seed, temperature, top_k, top_p, min_p,
                repetition_penalty, stop, allow_special_tokens: as of `generate`.

        Returns:
            An iterator over strings; for a list of prompts, over pairs of a prompt's index and a string. Arguments are
            checked at once, not when the first string is drawn.

        Raises:
            ValueError: as `generate`, and for a sampler that does not choose token by token.
        """
        options = generating.options_of(
            self,
            stop_token_ids=stop_token_ids,
            stop=stop,
            sampler=sampler,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            allow_special_tokens=allow_special_tokens,
        )
        return generating.stream(self, prompt, options)

    def astream(self, prompt, max_length=None, stop_token_ids="auto", **kwargs):
        """As `stream`, for `async for`: the event loop goes on while a thread decodes.

        Args:
            prompt, max_length, stop_token_ids, **kwargs: as of `stream`.

        Returns:
            An asynchronous iterator. Leaving it early ends the generation.

        Raises:
            ValueError: as `stream`, at once.
        """
        return generating.in_thread(self.stream(prompt, max_length, stop_token_ids, **kwargs))

    def chat(self, messages, max_length=None, stop_token_ids="auto", **kwargs):
        """The model's reply to a dialogue.

        Args:
            messages: list of `{"role", "content"}` messages, the last by the user; or the user's message, a string.
            max_length, stop_token_ids, **kwargs: as of `generate`.

        Returns:
            The reply as a string, without turn markers.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.generate(messages, max_length, stop_token_ids, strip_prompt=True, **kwargs)

    def make_generate_function(self):
        """As in keras-hub; programs are compiled and kept where `generate_step` runs."""
        return self.generate_step

    def generate_step(self, inputs, stop_token_ids=None):
        """Continues one batch of token ids with the model's own sampler.

        Args:
            inputs: dict of `token_ids` and `padding_mask`, each `[B, T]`, padded on the right.
            stop_token_ids: optional ids that end a row.

        Returns:
            A dict as `inputs`, filled up to `T` or the first stop token.
        """
        return generating.generate_step(self, inputs, stop_token_ids)

    def call_with_cache(self, token_ids, cache, cache_update_index):
        """Runs new tokens over the keys and values of earlier ones.

        Args:
            token_ids: int tensor `[B, T]`, the tokens at the columns from `cache_update_index` on.
            cache: of `build_cache`, or as returned by this method: `{"layers": ((key, value), …), "first_column"}`
                with `[B, K, S, H]` and `[B]`. Not to be used again afterwards: where the backend allows, it is
                changed in place.
            cache_update_index: int, or int scalar tensor.

        Returns:
            Float32 logits `[B, T, V]`, final hidden states `[B, T, D]`, and the new cache.

        Raises:
            ValueError: for keras-hub's array cache, and for tokens beyond the cache's end where the index is an int.
        """
        generation.check_cache(cache, ops.shape(token_ids)[1], cache_update_index)
        token_ids = ops.convert_to_tensor(token_ids, "int32")
        return self.engine.forward(token_ids, cache, ops.convert_to_tensor(cache_update_index, "int32"))

    def build_cache(self, batch_size, max_length):
        """An empty cache with room for `max_length` tokens a row, for `call_with_cache`."""
        return generation.empty_cache(self.backbone, batch_size, max_length)

    def export(self, filepath, format="tf_saved_model", verbose=None, input_signature=None, **kwargs):
        """As `keras.Model.export`. On JAX and TensorFlow a SavedModel takes any batch size and length by default."""
        kwargs = kernels.export_arguments(self.input, format, input_signature, kwargs)
        super().export(filepath, format=format, verbose=verbose, input_signature=input_signature, **kwargs)

    def _run_through_graph(self, inputs, operation_fn=lambda layer: layer, call_fn=None):
        return super()._run_through_graph(inputs, cloning.tied(self, operation_fn), call_fn)

    # === Quantisation ===

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """Quantises the weights in place. Arguments and errors are those of `GemmaBackbone.quantize`."""
        with quantization.quantizing(self.backbone, mode, config, filters) as filters:
            super().quantize(mode, config=config, filters=filters, **kwargs)

    def get_quantization_layer_structure(self, mode=None):
        """As of `GemmaBackbone`."""
        return quantization.structure_of(self.backbone, mode)

    # === Presets ===

    @distribution.written_once
    def export_to_transformers(self, path):
        """As `GemmaBackbone.export_to_transformers`, with the tokenizer, its chat template and what ends an answer."""
        checkpoints.export_model(path, self.backbone, self.preprocessor)

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Loads a model with its preprocessor.

        Args:
            preset: a name in `GemmaCausalLM.presets`; a handle such as `"kaggle://keras/gemma/keras/gemma_2b_en"` or
                `"hf://google/gemma-2b"`; or a local folder, saved by `save_to_preset` here or in keras-hub, or in the
                Hugging Face format (`config.json`, safetensors, `tokenizer.model`).
            load_weights: bool. `False` initialises at random. A name then needs a download for its vocabulary only,
                and with `preprocessor=None` none at all.
            **kwargs: `dtype` of the backbone, by default the current Keras dtype policy; `sequence_length` of the
                preprocessor; `backbone` and `preprocessor` in place of the preset's; and constructor arguments.

        Returns:
            A `GemmaCausalLM`.

        Raises:
            ValueError: for an unknown name, another architecture, and damaged or mismatched files.
            FileNotFoundError: for a missing file, naming it.
        """
        return checkpoints.load_task(cls, preset, load_weights=load_weights, **kwargs)

    @distribution.written_once
    def save_to_preset(self, preset_dir, max_shard_size=10):
        """Saves model and preprocessor as a preset, which `keras_hub.models.GemmaCausalLM` loads as well.

        An interrupted save leaves the old preset, the new one, or a folder that does not load, never a mixture.

        Args:
            preset_dir: path of the folder, made if missing.
            max_shard_size: int or float. Gigabytes (2³⁰ bytes) above which the weights are split into several files,
                each no larger; `None` never splits.

        Raises:
            ValueError: for what cannot be saved, before anything is touched.
        """
        checkpoints.save_task(self, preset_dir, max_shard_size=max_shard_size)

    save_weights = distribution.written_once(checkpoints.save_weights)


def _unpacked(validation_data):
    if isinstance(validation_data, tuple):
        return keras.utils.unpack_x_y_sample_weight(validation_data)
    return validation_data, None, None
