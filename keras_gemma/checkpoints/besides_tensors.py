"""What a model has besides the tensors of its backbone, and which format has a place for it.

                                    keras    hugging_face   gguf       flax         keras_weights
    vocabulary with added tokens    yes      yes            yes        yes          no, and by design
    tokens that end an answer       yes      yes            yes (1)    refused      as the vocabulary
    chat template                   yes      yes            yes        refused (2)  as the vocabulary
    whether texts open with <bos>   yes      yes            yes        refused      as the vocabulary
    sampling settings (3)           yes      yes            yes (4)    no           no
    rows' length, ends of rows      yes      not a model's  (a setting of training, which other formats do not have)
    head of a reward model          yes      yes            refused    refused      refused
    LoRA adapters                   merged by whoever saves; a folder with adapters beside its weights is refused
    quantisation scales             read where a format has them; written by `dtype="q8_0"` of GGUF

(1) two besides <eos>; (2) Gemma's own follows from the vocabulary everywhere; (3) of `generation_config.json`, for the
programs that read it; (4) those that llama.cpp has.
"""

import dataclasses

from keras_gemma.checkpoints.tensor_files import StoredTensor
from keras_gemma.checkpoints.tokenizer_files import TURNS


@dataclasses.dataclass(frozen=True)
class BesidesTensors:
    """What a model has besides the tensors of its backbone and its vocabulary.

    Attributes:
        stop_tokens: tuple of strings, pieces that end an answer besides `<eos>` and `<end_of_turn>`.
        chat_template: optional string, Jinja. `None`: Gemma's, where the vocabulary has turn markers.
        preprocessor: dict, settings of the preprocessor that are not its defaults.
        head: optional `StoredTensor` `[D, 1]`, what a reward model multiplies the last hidden state by.
        generation: dict, what `generation_config.json` says besides ids of tokens.
        doubts: tuple of strings, where files differ in a setting and one of them is followed.
        sampler: optional dict, the serialised sampler of a Keras preset, which no other format has a place for.
        other_head: optional string, the class of a task whose own weights no format takes, such as a classifier.
    """

    stop_tokens: tuple = ()
    chat_template: str | None = None
    preprocessor: dict = dataclasses.field(default_factory=dict)
    head: StoredTensor | None = None
    generation: dict = dataclasses.field(default_factory=dict)
    doubts: tuple = ()
    sampler: dict | None = None
    other_head: str | None = None

    @property
    def opens_with_bos(self):
        return self.preprocessor.get("add_start_token", True)


NOTHING = BesidesTensors()
GENERATION_FILE = "generation_config.json"
HEAD, STOP_TOKENS, CHAT_TEMPLATE, WITHOUT_BOS = "head", "stop_tokens", "chat_template", "without_bos"
NAMES = {
    HEAD: "the head of a reward model",
    STOP_TOKENS: "tokens that end an answer besides <eos> and <end_of_turn>",
    CHAT_TEMPLATE: "a chat template other than Gemma's",
    WITHOUT_BOS: "texts without <bos> (`add_start_token=False`)",
}


def check_kept(besides, format, keeps, others):
    """Refuses to lose what a format has no place for.

    Args:
        besides: `BesidesTensors`.
        format: string, the target's.
        keeps: tuple of keys of `NAMES`, what it has a place for.
        others: dict from names of formats to what they have a place for.

    Raises:
        ValueError: naming what would be lost, and the formats that keep it.
    """
    if besides.other_head is not None:
        raise ValueError(
            f"The format {format!r} has no place for the weights that a `{besides.other_head}` has besides its "
            "backbone. Convert a preset of the backbone alone: `model.backbone.save_to_preset(...)`"
        )
    has = {
        HEAD: besides.head is not None,
        STOP_TOKENS: bool(besides.stop_tokens),
        CHAT_TEMPLATE: besides.chat_template is not None,
        WITHOUT_BOS: not besides.opens_with_bos,
    }
    for part, is_there in has.items():
        if is_there and part not in keeps:
            valid = ", ".join(name for name, kept in others.items() if part in kept)
            raise ValueError(
                f"The format {format!r} has no place for {NAMES[part]}, which this model has. Valid: {valid}"
            )


def stop_tokens_of(pieces, ids, tokens=(), said_by="the files"):
    """Tokens that end an answer besides `<eos>` and `<end_of_turn>`.

    Args:
        pieces: list of strings, the vocabulary.
        ids: iterable of ints that end an answer.
        tokens: iterable of strings that do.
        said_by: string, for messages.

    Returns:
        A tuple of strings.

    Raises:
        ValueError: for an id without a piece.
    """
    ids = list(ids)
    for index in ids:
        if not isinstance(index, int) or not 0 <= index < len(pieces):
            raise ValueError(f"A text ends at one of {len(pieces):,} pieces. Received: the id {index!r} in {said_by}")
    spelled = dict.fromkeys([*(pieces[index] for index in ids), *tokens])
    return tuple(token for token in spelled if token not in ("<eos>", TURNS[1]))


def generation_settings(config):
    """What the content of a `generation_config.json` says besides ids of tokens and who wrote it."""
    others = ("transformers_version", "bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value for name, value in config.items() if name not in others and not name.startswith("_")}


def is_gemmas(chat_template):
    """Whether a template writes the turns that `GemmaTokenizer` writes, as far as its markers tell."""
    return chat_template is None or all(marker in chat_template for marker in TURNS)
