import warnings
from dataclasses import dataclass

import keras
import keras_hub
import numpy as np

from keras_gemma import checkpoints
from keras_gemma.data import record_formats
from keras_gemma.data import text_checks
from keras_gemma.data.long_texts import Cuts
from keras_gemma.data.long_texts import check_choice
from keras_gemma.data.long_texts import windows
from keras_gemma.models.backbone import GemmaBackbone
from keras_gemma.models.chat_format import dialogue_pieces
from keras_gemma.models.chat_format import merge_system_message
from keras_gemma.models.chat_format import without_turn_markers
from keras_gemma.models.preprocessor_outputs import as_outputs
from keras_gemma.models.preprocessor_outputs import in_tf_graph
from keras_gemma.models.presets import Presets
from keras_gemma.models.tokenizer import GemmaTokenizer
from keras_gemma.settings import check_preprocessor


@dataclass(frozen=True)
class Row:
    """One example as token ids, and for each id whether the model learns to predict it."""

    ids: list
    learned: list


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Turns text into what `GemmaCausalLM` trains on and generates from.

    Every row opens with exactly one `<bos>`, whether or not the text spells it. `<eos>` ends a text that fits
    into the row; a text that is cut gets none. A call gives as many rows as examples, so it cuts what is longer than
    `sequence_length`, warns of it once and counts it in `cuts`; `GemmaCausalLM.fit` and `data.training_batches` make
    several rows of such texts instead.

    What users write is text. Turns and their markers come from the roles of dialogues; where a string, prompt, response
    or message spells a special token such as `<start_of_turn>`, it is encoded as the characters that it has.

    Args:
        tokenizer: a `GemmaTokenizer`.
        sequence_length: int, `T`. Length of the rows.
        add_start_token: bool. `False` leaves `<bos>` out.
        add_end_token: bool. `False` leaves `<eos>` out.
        allow_special_tokens: bool. `True` turns special tokens that a text spells into their ids, as in keras-hub, for
            prompts put together by hand: `"<start_of_turn>user\\nHi<end_of_turn>\\n<start_of_turn>model\\n"`. Messages
            of dialogues may not spell turn markers then. By default all of them stay text, and a warning says so once.
        merge_system_messages: bool. `True` puts a system message in front of the first user message. By default it is
            refused: Gemma 1 has no system role.

    The last two are not part of a preset.

    Attributes:
        cuts: `keras_gemma.data.long_texts.Cuts`, what calls have cut so far.

    Call arguments:
        x: for pretraining strings; for tuning `{"prompts": [...], "responses": [...]}` or dialogues, each a
            list of `{"role", "content"}` messages (or `{"messages": [...]}`); or records of TRL, Alpaca and ShareGPT,
            see `keras_gemma.data.record_formats`. A single example gives a single row. Works on Python and NumPy input,
            and inside Grain and `tf.data` pipelines.
        y: must be `None`; the labels are the next tokens.
        sample_weight: optional float `[B]`, a weight for each example.
        sequence_length: optional int in place of the layer's own.

    Returns:
        `(x, y, sample_weight)` of tensors, in Grain pipelines of NumPy arrays: `x` with `token_ids` and
            `padding_mask`, each `[B, T]`, `y` the next token ids `[B, T]`, and float32 weights `[B, T]`: 1 where a
            real token is predicted, and with prompts and dialogues only where it is the response's, its end token
            included.

    Raises:
        ValueError: for labels, unknown fields, fields of different lengths, and dialogues that Gemma's format
            refuses.
    """

    backbone_cls = GemmaBackbone
    tokenizer_cls = GemmaTokenizer
    presets = Presets()

    def __init__(
        self,
        tokenizer,
        sequence_length=1024,
        add_start_token=True,
        add_end_token=True,
        allow_special_tokens=False,
        merge_system_messages=False,
        **kwargs,
    ):
        check_preprocessor(
            sequence_length,
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            allow_special_tokens=allow_special_tokens,
            merge_system_messages=merge_system_messages,
        )
        super().__init__(
            tokenizer,
            sequence_length=sequence_length,
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )
        self.allow_special_tokens = allow_special_tokens
        self.merge_system_messages = merge_system_messages
        self._spelled_token_was_told = False
        self.cuts = Cuts()

    def get_config(self):
        return {
            **super().get_config(),
            "allow_special_tokens": self.allow_special_tokens,
            "merge_system_messages": self.merge_system_messages,
        }

    def build(self, input_shape):
        self.built = True

    def __call__(self, *args, **kwargs):
        # Keras would end in a RecursionError.
        text_checks.refuse_deep((args, kwargs))
        return super().__call__(*args, **kwargs)

    def call(self, x, y=None, sample_weight=None, sequence_length=None):
        if y is not None:
            raise ValueError("Labels are the next tokens of `x`, so `y` must be None. Received labels.")
        length = sequence_length or self.sequence_length
        if in_tf_graph():
            return self._call_in_tf_graph(x, sample_weight, length)
        return as_outputs(self._training_batch(x, sample_weight, length))

    def _training_batch(self, x, sample_weight, length):
        examples, batched = examples_of(x)
        rows = [row for _, row in self._training_rows(examples, length, "truncate", self.cuts)]
        self.cuts.tell(length, so_far=True)
        batch = self.batch_of_rows(rows, sample_weight, length)
        return batch if batched else keras.tree.map_structure(lambda array: array[0], batch)

    def batch_of_rows(self, rows, sample_weight=None, sequence_length=None):
        """A batch of `Row`s as a call gives it: `(x, y, sample_weight)`. Longer rows are cut."""
        length = sequence_length or self.sequence_length
        token_ids, padding_mask = self._pad([row.ids for row in rows], length + 1)
        learned, _ = self._pad([row.learned for row in rows], length + 1, value=0)
        weights = learned[:, 1:].astype("float32")
        if sample_weight is not None:
            weights *= np.reshape(np.asarray(sample_weight, "float32"), (len(rows), -1))
        features = {"token_ids": token_ids[:, :-1], "padding_mask": padding_mask[:, :-1]}
        return features, token_ids[:, 1:], weights

    def _training_rows(self, examples, length, long_texts, cuts):
        """Pairs of an example's number and a `Row` of at most `length + 1` tokens."""
        found = text_checks.each(lambda example: self._rows_of(example, length, long_texts, cuts), examples)
        cuts.examples += len(examples)
        return [(number, row) for number, rows in enumerate(found) for row in rows]

    def _rows_of(self, example, length, long_texts, cuts):
        row = self.row(example)
        count = len(row.ids)
        if count <= length + 1:
            return [row]
        if long_texts == "refuse":
            raise ValueError(
                f"An example fits into a row of {length} tokens, since `long_texts='refuse'`. Received one of "
                f"{count - 1}: raise `sequence_length`, or give `long_texts='split'` for texts."
            )
        if long_texts == "split" and isinstance(example, str):
            rows = self.split(row, length)
            cuts.add_split(count, len(rows))
            return rows
        kept = Row(row.ids[: length + 1], row.learned[: length + 1])
        cuts.add_truncated(count, length + 1, learns=any(kept.learned) or not any(row.learned))
        return [kept]

    def split(self, row, length):
        """A text's `Row` as several of at most `length + 1` tokens. See `keras_gemma.data.long_texts`."""
        # A row of one token has no room for a `<bos>` and something to learn.
        opened = self.add_start_token and length > 1
        first, *others = windows(len(row.ids), length, opened)
        start = [self.tokenizer.start_token_id] if opened else []
        rows = [Row(row.ids[slice(*first)], row.learned[slice(*first)])]
        for begin, end in others:
            # The row before has learned its first token.
            learned = [False] * (len(start) + 1) + row.learned[begin + 1 : end]
            rows.append(Row(start + row.ids[begin:end], learned))
        return rows

    def rows(self, x, sequence_length=None, long_texts="split", cuts=None):
        """A batch of examples as rows of token ids, of which a long text has several.

        Args:
            x, sequence_length: as of a call. `x` is a batch.
            long_texts: string, as of `unpadded`.
            cuts: optional `keras_gemma.data.long_texts.Cuts`, to count what is cut.

        Returns:
            A list of pairs of an int, the number of the example, and a `Row` of at most `sequence_length + 1` tokens.

        Raises:
            ValueError: as a call, for a single example, an unknown `long_texts`, and what it refuses.
        """
        check_choice(long_texts)
        length = sequence_length or self.sequence_length
        examples, batched = examples_of(x)
        if not batched:
            raise ValueError(
                f"A batch of examples is expected; wrap a single one in a list. Received: {text_checks.shown(x)}"
            )
        return self._training_rows(examples, length, long_texts, Cuts() if cuts is None else cuts)

    def unpadded(self, x, sample_weight=None, sequence_length=None, long_texts="truncate", cuts=None):
        """A batch of examples as a call gives them, each without its padding: what packing starts from.

        Args:
            x, sample_weight, sequence_length: as of a call. `x` is a batch.
            long_texts: string, what becomes of a text that is longer than `sequence_length`: `"truncate"` cuts it as a
                call does, `"split"` gives several dicts, one after the other (see `keras_gemma.data.long_texts`), and
                `"refuse"` raises, also for prompts with responses and for dialogues, which are cut otherwise.
            cuts: optional `keras_gemma.data.long_texts.Cuts`, to count what is cut. Without it, it is told at once.

        Returns:
            A list with one dict an example, or several: int32 `token_ids` `[n]`, int32 `targets` `[n]`, the next
            tokens, and float32 `weights` `[n]`, where `n` is one less than the number of tokens and at most
            `sequence_length`.

        Raises:
            ValueError: as a call, for a single example, an unknown `long_texts` and what it refuses, and for weights of
                columns beside a text that is split.
        """
        length = sequence_length or self.sequence_length
        counted = Cuts() if cuts is None else cuts
        rows = self.rows(x, length, long_texts, counted)
        if cuts is None:
            counted.tell(length)
        weights = self.weights_of_rows(rows, sample_weight)
        return [_shifted(row, length, weight) for (_, row), weight in zip(rows, weights)]

    @staticmethod
    def weights_of_rows(rows, sample_weight):
        """The weight of each of `rows`, that of its example, float32 `[rows, 1]` or `[rows, T]`.

        Raises:
            ValueError: for weights of columns where an example has several rows.
        """
        numbers = [number for number, _ in rows]
        if sample_weight is None:
            return np.ones((len(rows), 1), "float32")
        weights = np.reshape(np.asarray(sample_weight, "float32"), (numbers[-1] + 1, -1))
        if weights.shape[1] > 1 and len(numbers) > len(weights):
            raise ValueError(
                "A weight for each column says nothing of a text that is cut into several rows: give one weight for "
                "each text, or `long_texts='truncate'`."
            )
        return weights[numbers]

    def unpadded_parts(self, example, sequence_length):
        """A text as `unpadded` gives it without cutting, as several such dicts of at most `sequence_length` tokens."""
        ids = [*example["token_ids"].tolist(), int(example["targets"][-1])]
        rows = self.split(Row(ids, [True] * len(ids)), sequence_length)
        return [_shifted(row, sequence_length, np.ones(1, "float32")) for row in rows]

    def _call_in_tf_graph(self, x, sample_weight, length):
        leaves = keras.tree.flatten(x)
        example_weights = [] if sample_weight is None else [sample_weight]

        def training_batch(*arrays):
            x_arrays = keras.tree.pack_sequence_as(x, arrays[: len(leaves)])
            weight_array = arrays[len(leaves)] if example_weights else None
            features, y, weights = self._training_batch(x_arrays, weight_array, length)
            return features["token_ids"], features["padding_mask"], y, weights

        token_ids, padding_mask, y, weights = call_python_from_tf_graph(
            training_batch,
            leaves + example_weights,
            dtypes=["int32", "bool", "int32", "float32"],
            shape=[*leaves[0].shape[:1], length],
        )
        return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weights

    def row(self, example):
        """The `Row` of one example.

        Args:
            example: a string; `{"prompts", "responses"}`, a string and a string, or a dialogue that ends with the user
                and the answer to it, which alone is learned; or a list of messages, where all turns of the model are.
        """
        if isinstance(example, str):
            ids = self._text_ids(example)
            return self._ended(Row(ids, [True] * len(ids)))
        if isinstance(example, dict):
            if "responses" not in example:
                raise ValueError("Training on 'prompts' needs their 'responses'. Received 'prompts' only.")
            if not isinstance(example["prompts"], str):
                return self._answer_row(example["prompts"], example["responses"])
            prompt = self._text_ids(example["prompts"])
            response = self._encode(example["responses"], self.allow_special_tokens)
            return self._ended(Row(prompt + response, [False] * len(prompt) + [True] * len(response)))
        return self._dialogue_row(example)

    def _answer_row(self, messages, answer):
        """Of a dialogue and the answer to it, which alone is learned."""
        row = self._dialogue_row([*messages, {"role": "model", "content": answer}])
        end = len(row.ids) - row.learned[::-1].index(True)
        start = end - (row.learned[:end][::-1] + [False]).index(False)
        return Row(row.ids, [start <= place < end for place in range(len(row.ids))])

    def _dialogue_row(self, messages, allow_special_tokens=None, add_generation_prompt=False):
        allow = self.allow_special_tokens if allow_special_tokens is None else allow_special_tokens
        messages = merge_system_message(messages) if self.merge_system_messages else messages
        pieces = dialogue_pieces(messages, add_generation_prompt)
        ids, learned = self.tokenizer.encode_dialogue(pieces, allow)
        # That a message is no turn goes without saying.
        contents = [] if allow else [without_turn_markers(piece.content) for piece in pieces]
        self._tell_of_spelled(next(filter(None, map(self.tokenizer.special_token_in, contents)), None))
        return Row(ids, learned) if self.add_start_token else Row(ids[1:], learned[1:])

    def _text_ids(self, text, allow_special_tokens=None):
        marker, begin = self.tokenizer.start_token, 0
        while text.startswith(marker, begin):
            begin += len(marker)
        text = text[begin:]
        start = [self.tokenizer.start_token_id] if self.add_start_token else []
        allow = self.allow_special_tokens if allow_special_tokens is None else allow_special_tokens
        return start + self._encode(text, allow)

    def _encode(self, text, allow_special_tokens):
        text = text_checks.text(text)
        if not allow_special_tokens:
            self._tell_of_spelled(self.tokenizer.special_token_in(text))
        return self.tokenizer.encode(text, allow_special_tokens=allow_special_tokens)

    def _tell_of_spelled(self, token):
        if token is None or self._spelled_token_was_told:
            return
        self._spelled_token_was_told = True
        warnings.warn(
            f"A text spells the special token {token!r}, which is read as plain text. For turns pass messages, a list "
            "of {'role', 'content'}; to turn what texts spell into special tokens, as keras-hub does, set "
            "`allow_special_tokens=True`, on the preprocessor or in `generate`. This is said once.",
            stacklevel=3,
        )

    def _ended(self, row):
        if not self.add_end_token:
            return row
        return Row(row.ids + [self.tokenizer.end_token_id], row.learned + [True])

    def _pad(self, rows, length, value=None):
        value = self.tokenizer.pad_token_id if value is None else value
        padded = np.full((len(rows), length), value, "int32")
        mask = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            cut = row[:length]
            padded[i, : len(cut)] = cut
            mask[i, : len(cut)] = True
        return padded, mask

    def prompt_ids(self, prompt, allow_special_tokens=None):
        """Ids that generation starts from.

        Args:
            prompt: a string, or a list of messages, behind which the model's turn is opened.
            allow_special_tokens: optional bool in place of the preprocessor's own.
        """
        prompt = prompt["prompts"] if isinstance(prompt, dict) else prompt
        if isinstance(prompt, str):
            return self._text_ids(prompt, allow_special_tokens)
        return self._dialogue_row(prompt, allow_special_tokens, add_generation_prompt=True).ids

    def generate_preprocess(self, x, sequence_length=None):
        """Token ids and padding mask `[B, T]` of prompts, with room left to generate.

        Args:
            x: a prompt or a list of prompts: strings, or dialogues.
            sequence_length: optional int, `T`. Length of prompt and generated text together.

        Raises:
            ValueError: for a prompt that leaves no room.
        """
        length = sequence_length or self.sequence_length
        if in_tf_graph():
            leaves = keras.tree.flatten(x)
            token_ids, padding_mask = call_python_from_tf_graph(
                lambda *arrays: tuple(self._prompts(keras.tree.pack_sequence_as(x, arrays), length).values()),
                leaves,
                dtypes=["int32", "bool"],
                shape=[*leaves[0].shape[:1], length],
            )
            return {"token_ids": token_ids, "padding_mask": padding_mask}
        return as_outputs(self._prompts(x, length))

    def _prompts(self, x, length):
        examples, batched = examples_of(x)
        rows = [self.prompt_ids(example) for example in examples]
        for row in rows:
            check_room(len(row), length)
        token_ids, padding_mask = self._pad(rows, length)
        batch = {"token_ids": token_ids, "padding_mask": padding_mask}
        return batch if batched else {name: array[0] for name, array in batch.items()}

    def generate_postprocess(self, x):
        """Text of generated `token_ids` where `padding_mask` is set, without `<bos>`, `<eos>` and padding."""
        if in_tf_graph():
            (text,) = call_python_from_tf_graph(
                lambda token_ids, mask: (np.array(self._texts(token_ids, mask), dtype=object),),
                [x["token_ids"], x["padding_mask"]],
                dtypes=["string"],
                shape=x["token_ids"].shape[:-1],
            )
            return text
        return self._texts(x["token_ids"], x["padding_mask"])

    def _texts(self, token_ids, mask):
        token_ids = _as_numpy(token_ids)
        mask = _as_numpy(mask).astype(bool)
        if token_ids.ndim == 1:
            return self.decode(token_ids[mask])
        return self.decode_rows([row[row_mask] for row, row_mask in zip(token_ids, mask)])

    def decode(self, ids):
        """Text of one row of ids, without `<bos>`, `<eos>`, padding and a closing `<end_of_turn>`."""
        return self.decode_rows([ids])[0]

    def decode_rows(self, rows):
        """Texts of rows of ids, as of `decode`: a list of strings."""
        special = set(self.tokenizer.special_token_ids)
        kept = [[int(i) for i in row if int(i) not in special] for row in rows]
        for ids in kept:
            if ids and ids[-1] == self.tokenizer.end_of_turn_id:
                ids.pop()
        # In one call: SentencePiece starts threads at each.
        return self.tokenizer.detokenize(kept) if kept else []

    def export_to_transformers(self, path):
        """Writes the files of the tokenizer for transformers into a folder, made if missing."""
        checkpoints.export_tokenizer(path, self.tokenizer, self.add_start_token)

    @classmethod
    def from_preset(cls, preset, config_file="preprocessor.json", **kwargs):
        """Loads the preprocessor of a preset. See `GemmaCausalLM.from_preset` for what `preset` may be."""
        return checkpoints.load_preprocessor(cls, preset, config_file=config_file, **kwargs)

    def save_to_preset(self, preset_dir):
        """Saves preprocessor and tokenizer into a preset folder that keras-hub reads as well."""
        checkpoints.save_preprocessor(self, preset_dir)


def _shifted(row, length, weight):
    token_ids = np.asarray(row.ids[: length + 1], "int32")
    learned = np.asarray(row.learned[1 : length + 1], "float32")
    # One weight for all tokens, or one for each column.
    weights = learned * (weight if len(weight) == 1 else weight[: len(learned)])
    return {"token_ids": token_ids[:-1], "targets": token_ids[1:], "weights": weights}


def check_room(prompt_length, max_length):
    """Raises a `ValueError` unless a prompt of so many tokens leaves room for one more."""
    if prompt_length >= max_length:
        raise ValueError(
            f"A prompt must be shorter than the whole sequence, or nothing can be generated. "
            f"Received a prompt of {prompt_length} tokens for a length of {max_length}: "
            "pass a larger `max_length`, or `max_new_tokens`."
        )


def examples_of(x):
    """Reads user input as a list of examples.

    Args:
        x: a string, a dialogue (list of messages), a dict of `prompts` and `responses` or of `messages`, or a
            batch of any of these as a list, an array or a column of a table, or a dict or a table of these. See
            `keras_gemma.data.text_checks` for what is a text, a list and a table.

    Returns:
        A list of examples, each a string, a dict of strings or a list of messages; and whether `x` was a batch.

    Raises:
        ValueError: for fields of different lengths, unknown fields and anything else.
        ExampleError: for what is no example among several, with its number.
    """
    x = text_checks.plain(x)
    if isinstance(x, dict):
        return _examples_of_fields(x)
    if not isinstance(x, list):
        return [text_checks.text(x)], False
    if not x:
        raise ValueError("A batch needs at least one example. Received an empty one.")
    if record_formats.is_dialogue(x):
        return [record_formats.messages(x)], False
    return text_checks.each(_example, x), True


def _example(element):
    if record_formats.is_dialogue(element):
        return record_formats.messages(element)
    if isinstance(element, dict):
        examples, batched = _examples_of_fields(element)
        if not batched:
            return examples[0]
    elif not isinstance(element, list):
        return text_checks.text(element)
    raise ValueError(
        "An example is a string, {'prompts': ..., 'responses': ...}, or a list of {'role', 'content'} messages. "
        f"Received: {text_checks.shown(element)}"
    )


def _examples_of_fields(fields):
    fields = record_formats.tuning_fields(fields)
    if set(fields) == {"messages"}:
        return examples_of(fields["messages"])
    if not {"prompts"} <= set(fields) <= {"prompts", "responses"}:
        raise ValueError(
            f"The fields of an example are 'prompts' and 'responses', or 'messages'; {record_formats.KNOWN}. "
            f"Received: {', '.join(map(repr, fields))}"
        )
    columns = {name: examples_of(value) for name, value in fields.items()}
    lengths = {name: len(examples) for name, (examples, _) in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"Every prompt needs its response. Received: {lengths}")
    rows = zip(*(examples for examples, _ in columns.values()))
    return [dict(zip(columns, row)) for row in rows], columns["prompts"][1]


def _as_numpy(x):
    return np.asarray(x.numpy() if hasattr(x, "numpy") else x)


def call_python_from_tf_graph(function, arguments, dtypes, shape):
    # The graph calls back into Python: one implementation, and no TensorFlow Text needed.
    import tensorflow as tf

    outputs = tf.numpy_function(tf.autograph.experimental.do_not_convert(function), arguments, dtypes)
    for output in outputs:
        output.set_shape(shape)
    return outputs
