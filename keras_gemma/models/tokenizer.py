import os

import keras
import keras_hub
import numpy as np

from keras_gemma import checkpoints
from keras_gemma.checkpoints import tokenizer_files
from keras_gemma.damaged import reading
from keras_gemma.data import text_checks
from keras_gemma.models.backbone import GemmaBackbone
from keras_gemma.models.chat_format import END_OF_TURN
from keras_gemma.models.chat_format import START_OF_TURN
from keras_gemma.models.chat_format import dialogue_pieces
from keras_gemma.models.chat_format import refuse_turn_markers
from keras_gemma.models.presets import Presets
from keras_gemma.models.special_tokens import SpecialTokens


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaTokenizer(keras_hub.tokenizers.SentencePieceTokenizer):
    """Gemma's SentencePiece tokenizer.

    Text comes back from `detokenize` exactly as it went in: digits, bytes outside the vocabulary and white
    space included.

    A call and `encode` turn a special token that a text spells, such as `<start_of_turn>`, into its id, as keras-hub
    does. `encode(text, allow_special_tokens=False)`, the preprocessors and `apply_chat_template` keep it as text.

    Args:
        proto: path of a SentencePiece model, or its bytes. It must hold `<pad>`, `<bos>` and `<eos>`; chat needs
            `<start_of_turn>` and `<end_of_turn>` as well.
        sequence_length: optional int. Pads and cuts every row to it, which makes the output dense.
        stop_tokens: tokens that end an answer besides `<eos>` and `<end_of_turn>`, as a model that was tuned on other
            dialogues may have.
        chat_template: optional string, the Jinja template of such dialogues. It is kept and saved, and not run: where
            it writes other turns than Gemma's, dialogues are refused.

    Attributes:
        start_token_id, end_token_id, pad_token_id: int. Ids of `<bos>`, `<eos>` and `<pad>`.
        unk_token_id: int.
        start_of_turn_id, end_of_turn_id: int, or `None` for a vocabulary without dialogue.

    Returns, when called with a string or a list of strings: a list of ids a string (a ragged tensor inside
    `tf.data`), or with `sequence_length` a dense int32 array `[B, sequence_length]`.

    Raises:
        ValueError: for a vocabulary that lacks a special or a stop token, naming it; when called, for what is no text
            (see `encode`), with its number.
    """

    backbone_cls = GemmaBackbone
    presets = Presets()

    def __init__(self, proto, stop_tokens=(), chat_template=None, **kwargs):
        self.stop_tokens = tuple(stop_tokens)
        self.chat_template = chat_template
        self._add_special_token("<bos>", "start_token")
        self._add_special_token("<eos>", "end_token")
        self._add_special_token("<pad>", "pad_token")
        super().__init__(proto=proto, **kwargs)
        if missing := [token for token in self.stop_tokens if proto and self._optional_token_id(token) is None]:
            raise ValueError(f"Stop tokens are tokens of the vocabulary. Received: {missing[0]!r}")
        # What comes out of a checkpoint is not.
        self.is_new = proto is not None
        # There is nothing to build, and `quantize` of a whole model refuses layers that are not.
        self.built = True

    def set_proto(self, proto):
        """Takes a vocabulary, a path or bytes; a `DamagedFileError` says that it is none."""
        proto = os.fspath(proto) if isinstance(proto, os.PathLike) else proto
        is_path = isinstance(proto, str) and os.path.exists(proto)
        with reading(proto if is_path else "proto", "SentencePiece model"):
            super().set_proto(proto)

    # Graphs call back into Python, as in the preprocessor. TensorFlow Text would be slow to start, and its tokenizer
    # is gone as soon as `keras.utils.set_random_seed` clears TensorFlow's caches.

    def _set_proto_tf(self, proto):
        """Nothing: `_tokenize_tf` and `_detokenize_tf` use the Python tokenizer."""

    def __call__(self, *args, **kwargs):
        # Keras would end in a RecursionError.
        text_checks.refuse_deep((args, kwargs))
        return super().__call__(*args, **kwargs)

    def _tokenize_spm(self, inputs):
        texts = text_checks.plain(inputs)
        if isinstance(texts, list):
            return super()._tokenize_spm(text_checks.each(text_checks.text, texts))
        return super()._tokenize_spm(text_checks.text(texts))

    def _tokenize_tf(self, inputs):
        import tensorflow as tf

        texts = tf.convert_to_tensor(inputs)
        dtype = tf.as_dtype(self.compute_dtype)

        @tf.autograph.experimental.do_not_convert
        def tokenized(texts):
            rows = [list(row) for row in self._tokenize_spm(list(texts))]
            ids = [token for row in rows for token in row]
            return np.array(ids, dtype.as_numpy_dtype), np.array([len(row) for row in rows], "int64")

        ids, lengths = tf.numpy_function(tokenized, [tf.reshape(texts, [-1])], [dtype, tf.int64])
        ids.set_shape([None])
        lengths.set_shape([None])
        if texts.shape.rank == 0:
            return tf.ensure_shape(ids, [self.sequence_length])
        if self.sequence_length:
            return tf.ensure_shape(tf.reshape(ids, [-1, self.sequence_length]), [*texts.shape, self.sequence_length])
        return tf.RaggedTensor.from_row_lengths(ids, lengths)

    def _detokenize_tf(self, inputs):
        import tensorflow as tf

        @tf.autograph.experimental.do_not_convert
        def detokenized(ids, lengths):
            rows = np.split(ids, np.cumsum(lengths)[:-1])
            return np.array([self._detokenize_spm(row.tolist()).encode() for row in rows], object)

        rows = inputs if isinstance(inputs, tf.RaggedTensor) else tf.convert_to_tensor(inputs)
        batched = rows.shape.rank == 2
        if not isinstance(rows, tf.RaggedTensor):
            rows = tf.RaggedTensor.from_tensor(rows if batched else rows[None])
        texts = tf.numpy_function(detokenized, [rows.values, rows.row_lengths()], tf.string)
        texts.set_shape([None])
        return texts if batched else texts[0]

    def _detokenize_spm(self, inputs):
        rows, batched = self._canonicalize_detokenize_spm_inputs(inputs)
        # An embedding may have more rows than there are pieces. Their ids have no text.
        rows = [[token_id for token_id in row if token_id < self._vocabulary_size] for row in rows]
        self._maybe_initialized_spm()
        texts = self._sentence_piece_spm.Decode(rows)
        return texts if batched else texts[0]

    @property
    def unk_token_id(self):
        return self._unk_token_id

    @property
    def start_of_turn_id(self):
        return self._optional_token_id(START_OF_TURN)

    @property
    def end_of_turn_id(self):
        return self._optional_token_id(END_OF_TURN)

    def _optional_token_id(self, token):
        self._check_vocabulary()
        token_id = self.token_to_id(token)
        return None if token_id == self.unk_token_id else token_id

    @property
    def stop_token_ids(self):
        """The ids that end a generation: `<eos>`, `<end_of_turn>` where the vocabulary has it, and `stop_tokens`."""
        ids = [self.end_token_id, self.end_of_turn_id, *map(self._optional_token_id, self.stop_tokens)]
        return [i for i in ids if i is not None]

    def refuse_what_cannot_be_exported(self):
        """Raises a `ValueError` for a new vocabulary, of no checkpoint, that other formats cannot describe."""
        if self.is_new and self.proto is not None:
            tokenizer_files.refuse_what_cannot_be_exported(self.proto)
            self.is_new = False

    def encode(self, text, allow_special_tokens=True):
        """Ids of one string as a plain list, without special tokens added, padding or cutting.

        Args:
            text: string.
            allow_special_tokens: bool. `True` turns special tokens that the text spells, such as `<start_of_turn>` and
                `<mask>`, into their ids. `False` keeps them as text: the ids are those of ordinary pieces that spell
                the same. `<bos>`, `<eos>` and `<pad>` are text in both cases.

        Raises:
            ValueError: for what is no text, bytes that are not UTF-8, and lone surrogates.

        Example:

        >>> from keras_gemma.models import GemmaTokenizer
        >>> tokenizer = GemmaTokenizer.from_preset("gemma_tiny_en")
        >>> tokenizer.encode("<end_of_turn>") == [tokenizer.end_of_turn_id]
        True
        >>> ids = tokenizer.encode("<end_of_turn>", allow_special_tokens=False)
        >>> tokenizer.end_of_turn_id in ids, tokenizer.detokenize(ids)
        (False, '<end_of_turn>')
        """
        text = text_checks.text(text)
        self._check_vocabulary()
        self._maybe_initialized_spm()
        parts = [text] if allow_special_tokens else self._special_tokens.cut(text)
        encode = self._sentence_piece_spm.Encode
        return [i for part in parts for i in encode(part, out_type=int, add_bos=False, add_eos=False)]

    def special_token_in(self, text):
        """The first special token that a text spells and that `encode` would turn into its id, or `None`."""
        self._check_vocabulary()
        return self._special_tokens.first_in(text)

    @property
    def _special_tokens(self):
        proto, tokens = self.__dict__.get("_special_tokens_of", (None, None))
        if proto is not self.proto:
            # Not among the attributes that Keras tracks.
            tokens = SpecialTokens(self.proto)
            self.__dict__["_special_tokens_of"] = self.proto, tokens
        return tokens

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=True, *, allow_special_tokens=False):
        """Formats a dialogue as the instruction-tuned models were trained on it.

        Args:
            messages: list of `{"role": ..., "content": ...}`, see `keras_gemma.models.chat_format`.
            add_generation_prompt: bool. Opens the model's turn at the end.
            tokenize: bool. Returns ids, else text.
            allow_special_tokens: bool. `True` turns special tokens that a message spells into their ids, but for turn
                markers, which it refuses. By default only the roles make special tokens, and messages are text.

        Returns:
            A list of ids that opens with exactly one `<bos>`, or the same as text.

        Raises:
            ValueError: for a dialogue that the format refuses, or a vocabulary without turn markers; and with
                `tokenize=False` for a message with a turn marker, which a text cannot tell from a turn.
        """
        pieces = dialogue_pieces(messages, add_generation_prompt)
        self._check_dialogues()
        if not tokenize:
            refuse_turn_markers(pieces)
            return self.start_token + "".join(piece.text for piece in pieces)
        ids, _ = self.encode_dialogue(pieces, allow_special_tokens)
        return ids

    def encode_dialogue(self, pieces, allow_special_tokens=False):
        """Ids of a dialogue with its `<bos>`, and for each id whether the model writes it.

        Args:
            pieces: list of `Piece`s, as `dialogue_pieces` gives them.
            allow_special_tokens: as of `apply_chat_template`.
        """
        self._check_dialogues()
        if allow_special_tokens:
            refuse_turn_markers(pieces)
        if self.start_of_turn_id is None or self.end_of_turn_id is None:
            raise ValueError(
                f"Chat needs {START_OF_TURN!r} and {END_OF_TURN!r} in the vocabulary, and this one lacks them."
            )
        ids, learned = [self.start_token_id], [False]
        for piece in pieces:
            piece_ids = self._piece_ids(piece, allow_special_tokens)
            ids += piece_ids
            learned += [piece.learned] * len(piece_ids)
        return ids, learned

    def _piece_ids(self, piece, allow_special_tokens):
        content, marker = piece.content, piece.text[len(piece.content) :]
        if allow_special_tokens or not self.special_token_in(content):
            return self.encode(piece.text)
        return self.encode(content, allow_special_tokens=False) + self.encode(marker)

    def _check_dialogues(self):
        if not checkpoints.is_gemmas(self.chat_template):
            raise ValueError(
                f"This model was tuned on other dialogues than Gemma's: its chat template has no {START_OF_TURN!r} and "
                f"{END_OF_TURN!r}. Write its prompts as strings, with the turns of `tokenizer.chat_template`, and "
                "generate with `allow_special_tokens=True`."
            )

    def get_config(self):
        config = super().get_config()
        if self.stop_tokens:
            config["stop_tokens"] = list(self.stop_tokens)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return config

    @classmethod
    def from_preset(cls, preset, config_file="tokenizer.json", **kwargs):
        """Loads the tokenizer of a preset. See `GemmaCausalLM.from_preset` for what `preset` may be."""
        return checkpoints.load_tokenizer(cls, preset, config_file=config_file, **kwargs)

    def export_to_transformers(self, path):
        """Writes the files of a tokenizer for transformers into a folder, made if missing."""
        checkpoints.export_tokenizer(path, self)

    def save_to_preset(self, preset_dir):
        """Saves the tokenizer into a preset folder that keras-hub reads as well."""
        checkpoints.save_tokenizer(self, preset_dir)
