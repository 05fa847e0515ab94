"""The GGUF format of Gemma 1, llama.cpp's: settings, vocabulary and tensors in one file.

Matrices are kept as `torch.nn.Linear` keeps them, outputs first, with heads and head dim folded into one axis. Norms
are kept with the one that is added to them, in float32 whatever the matrices are in. Of a norm w, a file thus keeps
what float32 can tell of 1 + w: every bit where w is a bfloat16 of 2**-16 or more, others to 2**-24 of 1 + w.
"""

import functools
import math
import os

import ml_dtypes
import numpy as np

from keras_gemma.checkpoints import besides_tensors
from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import tokenizer_files
from keras_gemma.checkpoints.besides_tensors import NOTHING
from keras_gemma.checkpoints.besides_tensors import BesidesTensors
from keras_gemma.checkpoints.tensor_files import StoredTensor
from keras_gemma.damaged import reading

FORMAT = "gguf"
MAGIC = b"GGUF"
ARCHITECTURE = "gemma"
EMBEDDING = "token_embd.weight"
# Some files hold the output projection, which is the embedding again.
OUTPUT = "output.weight"
GEMMA_1_HAS = {"gemma.rope.freq_base": canonical.ROPE_BASE, "gemma.rope.scaling.type": "none"}

# What the types of a file are read as; those with a number in their names are quantized.
READ_AS = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "Q8_0": np.float32,
    "Q4_0": np.float32,
    "Q4_K": np.float32,
    "Q6_K": np.float32,
}
PLAIN = ("F32", "F16", "BF16")
WRITTEN_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
Q8_0_BLOCK = 32
KEEPS = (besides_tensors.STOP_TOKENS, besides_tensors.CHAT_TEMPLATE, besides_tensors.WITHOUT_BOS)
# Where a file keeps the ids of the tokens that end an answer besides <eos>: of a turn, and of a message.
STOP_KEYS = ("eot", "eom")
CHAT_TEMPLATE = "tokenizer.chat_template"
# What llama.cpp calls the settings of a `generation_config.json`.
SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
ADD_BOS = "tokenizer.ggml.add_bos_token"


def _library():
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF needs a library of its own: `pip install 'keras_gemma[convert]'`.") from error
    return gguf


def is_here(path):
    """Whether there is a GGUF file of whatever model at a path."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


# === Tensors ===


def table_of(sizes):
    """What a model of these `Sizes` has in this format, as `FileTensor`s."""
    wanted = canonical.shapes(sizes)
    return [
        canonical.as_it_is(EMBEDDING, "embedding", wanted["embedding"]),
        *canonical.of_blocks(sizes, "blk.{index}.{name}.weight", BLOCK_TENSORS),
        _one_added("output_norm.weight", "final_norm", wanted["final_norm"]),
    ]


def _one_added(name, part, shape):
    return canonical.FileTensor(
        name,
        shape,
        (part,),
        lambda array: (array - array.dtype.type(1),),
        lambda array: array.astype(np.float32) + np.float32(1),
    )


BLOCK_TENSORS = {
    "attention_norm": ("attn_norm", _one_added),
    "query": ("attn_q", canonical.heads_first),
    "key": ("attn_k", canonical.heads_first),
    "value": ("attn_v", canonical.heads_first),
    "output": ("attn_output", canonical.heads_last),
    "ffw_norm": ("ffn_norm", _one_added),
    "gate": ("ffn_gate", canonical.transposed),
    "up": ("ffn_up", canonical.transposed),
    "down": ("ffn_down", canonical.transposed),
}


# === In ===


def checkpoint(path):
    """The `Checkpoint` of a GGUF file.

    Quantized tensors are read as float32. An output projection must repeat the embedding.

    Args:
        path: path of the file.

    Raises:
        ImportError: without the package `gguf`.
        ValueError: for a truncated or damaged file, an architecture other than Gemma 1, a missing setting, and a type
            of tensor that is not read; each is named.
    """
    settings, stored = _header(path)
    with reading(path, "GGUF file"):
        _check_gemma_1(path, settings)
        sizes = _sizes(path, settings, stored)
    return canonical.Checkpoint(
        path=path,
        format=FORMAT,
        sizes=sizes,
        table=table_of(sizes),
        stored=stored,
        where=path,
        ignored=(OUTPUT,) if OUTPUT in stored else (),
        copies={OUTPUT: EMBEDDING} if OUTPUT in stored else {},
        proto=functools.partial(_proto, path, settings),
        besides=functools.partial(_besides, path, settings),
    )


def _header(path):
    """Settings by their keys, and `StoredTensor`s by their names."""
    with reading(path, "GGUF file"):
        reader = _reader(path)
        settings = {key: field.contents() for key, field in reader.fields.items()}
    if reader.byte_order != "I":
        raise ValueError(f"`{path}` was written for machines of the other byte order.")
    return settings, {tensor.name: _stored(path, tensor) for tensor in reader.tensors}


def _reader(path):
    class Reader(_library().GGUFReader):
        # The library cuts three slices a piece of the vocabulary. Those of a plain array, which shares the mapped file,
        # take a third of the time that those of `np.memmap` take, and half of the memory.
        @property
        def data(self):
            return self._data

        @data.setter
        def data(self, mapped):
            self._data = np.asarray(mapped)

    return Reader(path)


def _stored(path, tensor):
    kind, shape = tensor.tensor_type, tuple(reversed(tensor.shape.tolist()))
    if kind.name not in READ_AS:
        raise ValueError(
            f"Tensors of a GGUF file are read where their type is one of {', '.join(READ_AS)}. "
            f"Received: {kind.name} for `{tensor.name}` in `{path}`"
        )
    read = functools.partial(_read, path, tensor.name, int(tensor.data_offset), int(tensor.n_bytes), kind, shape)
    kept_as = None if kind.name in PLAIN else kind.name
    return StoredTensor(path, tensor.name, shape, np.dtype(READ_AS[kind.name]), read, kept_as)


def _read(path, name, offset, length, kind, shape):
    with reading(path, place=name):
        return _numbers(path, offset, length, kind, shape)


def _numbers(path, offset, length, kind, shape):
    if kind.name in PLAIN:
        return np.fromfile(path, READ_AS[kind.name], count=math.prod(shape), offset=offset).reshape(shape)
    # Some rows at a time: the library would make all of them twice.
    gguf = _library()
    array = np.empty((math.prod(shape[:-1]), shape[-1]), np.float32)
    packed = np.fromfile(path, np.uint8, count=length, offset=offset).reshape(len(array), -1)
    for rows in canonical.some_rows(array):
        array[rows] = gguf.quants.dequantize(packed[rows], kind)
    return array.reshape(shape)


def _check_gemma_1(path, settings):
    if settings.get("split.count", 1) > 1:
        raise ValueError(f"`{path}` is one of {settings['split.count']} parts. A model must be merged into one file.")
    architecture = _setting(path, settings, "general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"Gemma 1 ({ARCHITECTURE!r}) is the architecture that loads from GGUF. Received: `{path}` of architecture "
            f"{architecture!r}"
        )
    head_dim = _setting(path, settings, "gemma.attention.key_length")
    same = dict.fromkeys(("gemma.attention.value_length", "gemma.rope.dimension_count"), head_dim)
    for key, value in {**GEMMA_1_HAS, **same}.items():
        if settings.get(key, value) != value:
            raise ValueError(f"Gemma 1 has `{key}` = {value}. Received: {settings[key]} in `{path}`")


def _sizes(path, settings, stored):
    setting = functools.partial(_setting, path, settings)
    rows = stored[EMBEDDING].shape[0] if EMBEDDING in stored else 0
    if rows and settings.get("gemma.vocab_size", rows) != rows:
        raise ValueError(f"`{path}` says `gemma.vocab_size` = {settings['gemma.vocab_size']}, and has {rows} rows.")
    epsilon = np.float32(setting("gemma.attention.layer_norm_rms_epsilon"))
    sizes = canonical.Sizes(
        # A file without an embedding is refused for that.
        vocabulary_size=rows or 1,
        num_layers=setting("gemma.block_count"),
        num_query_heads=setting("gemma.attention.head_count"),
        num_key_value_heads=setting("gemma.attention.head_count_kv"),
        hidden_dim=setting("gemma.embedding_length"),
        intermediate_dim=2 * setting("gemma.feed_forward_length"),
        head_dim=setting("gemma.attention.key_length"),
        # 1e-06 is meant where float32 has 9.99999997e-07.
        layer_norm_epsilon=float(str(epsilon)),
    )
    return canonical.checked(sizes, path)


def _setting(path, settings, key):
    if key not in settings:
        raise ValueError(f"`{path}` lacks the setting `{key}`.")
    return settings[key]


# === Out ===


def write(target, sizes, tensors, proto, dtype=None, besides=NOTHING):
    """Writes a GGUF file of Gemma 1, with one tensor at a time in memory.

    Args:
        target: path of the file, which need not exist yet.
        sizes: `Sizes`.
        tensors: dict of `StoredTensor`, of a `Checkpoint`.
        proto: bytes of the SentencePiece model, or `None` to write no vocabulary, which llama.cpp refuses to load.
        dtype: one of `"float32"`, `"float16"`, `"bfloat16"` and `"q8_0"`; norms are in float32 whatever it is. `None`
            leaves each tensor as it is.
        besides: `BesidesTensors` without a head.

    Raises:
        ImportError: without the package `gguf`.
        ValueError: for a dtype or a vocabulary that the format cannot keep, before anything is written; for a number
            that is not finite or becomes infinite in `dtype`, naming the tensor.
    """
    gguf = _library()
    planned = _planned(gguf, sizes, tensors, dtype)
    vocabulary = None if proto is None else _vocabulary(proto)
    stops = None if proto is None else _stops(vocabulary, besides.stop_tokens)
    writer = gguf.GGUFWriter(target, ARCHITECTURE)
    try:
        _add_settings(gguf, writer, sizes, planned)
        _add_sampling(writer, besides.generation)
        if vocabulary is not None:
            _add_vocabulary(writer, vocabulary, sizes.vocabulary_size)
            _add_dialogue(writer, vocabulary, stops, besides)
        for tensor, kind in planned:
            length = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kind))
            writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, length, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in planned:
            writer.write_tensor_data(_packed(gguf, tensor, kind))
    finally:
        writer.close()


def _planned(gguf, sizes, tensors, dtype):
    """Pairs of a `StoredTensor` as the file has it and the type that it gets there."""
    if dtype is not None and dtype not in WRITTEN_AS:
        raise ValueError(f"GGUF files are written with dtype one of {', '.join(WRITTEN_AS)}. Received: dtype={dtype!r}")
    planned = []
    for entry in table_of(sizes):
        is_norm = len(entry.shape) == 1
        cast_to = "float32" if is_norm else None if dtype == "q8_0" else dtype
        (tensor,) = canonical.arranged([entry], tensors, cast_to)
        planned.append((tensor, gguf.GGMLQuantizationType[_kind(tensor, dtype, is_norm)]))
    return planned


def _kind(tensor, dtype, is_norm):
    if dtype == "q8_0" and not is_norm:
        if tensor.shape[-1] % Q8_0_BLOCK:
            raise ValueError(
                f"q8_0 keeps numbers in blocks of {Q8_0_BLOCK}, so that every row must be a multiple of {Q8_0_BLOCK} "
                f"long. Received: rows of {tensor.shape[-1]} for `{tensor.name}`. The other dtypes have no such limit."
            )
        return "Q8_0"
    if tensor.dtype.name not in WRITTEN_AS:
        raise ValueError(
            f"GGUF files of Gemma keep float32, float16 and bfloat16. Received: {tensor.dtype} for `{tensor.name}` "
            f"from `{tensor.file}`. Choose a dtype to cast to."
        )
    return WRITTEN_AS[tensor.dtype.name]


def _packed(gguf, tensor, kind):
    """The array that a file keeps of a tensor."""
    array = tensor.read()
    if kind.name in PLAIN:
        return array
    packed = np.empty(gguf.quant_shape_to_byte_shape(array.shape, kind), np.uint8)
    # What overflows is found and named.
    with np.errstate(over="ignore", invalid="ignore"):
        for rows in canonical.some_rows(array):
            packed[rows] = gguf.quants.quantize(array[rows], kind)
            if not np.isfinite(gguf.quants.dequantize(packed[rows], kind)).all():
                raise ValueError(f"`{tensor.file}` has numbers that are too large for {kind.name} in `{tensor.name}`.")
    return packed


def _add_settings(gguf, writer, sizes, planned):
    kinds = {tensor.name: kind.name for tensor, kind in planned}
    writer.add_name("Gemma")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kinds[EMBEDDING]]])
    if kinds[EMBEDDING] not in PLAIN:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(tokenizer_files.CONTEXT_LENGTH)
    writer.add_embedding_length(sizes.hidden_dim)
    writer.add_block_count(sizes.num_layers)
    writer.add_feed_forward_length(sizes.intermediate_dim // 2)
    writer.add_head_count(sizes.num_query_heads)
    writer.add_head_count_kv(sizes.num_key_value_heads)
    writer.add_layer_norm_rms_eps(sizes.layer_norm_epsilon)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)


def _add_sampling(writer, generation):
    for name, key in SAMPLING.items():
        if isinstance(generation.get(name), (int, float)):
            value = generation[name]
            getattr(writer, f"add_sampling_{key}")(int(value) if key == "top_k" else float(value))


def _sampling(settings):
    """Settings of `generation_config.json` among a file's own: as many decimals as float32 keeps."""
    keys = {name: f"general.sampling.{key}" for name, key in SAMPLING.items()}
    found = {name: settings[key] for name, key in keys.items() if key in settings}
    return {name: value if name == "top_k" else float(str(np.float32(value))) for name, value in found.items()}


# === Vocabulary ===

# GGUF numbers the types of pieces as SentencePiece does.
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
NO_VOCABULARY = (None, "none", "no_vocab")


def _vocabulary(proto):
    """The parsed SentencePiece model, if the format can keep it."""
    model = tokenizer_files.parsed(proto)
    tokenizer_files.check_rules(model)
    ids = {name: getattr(model.trainer_spec, f"{name}_id") for name in SPECIAL_IDS}
    if min(ids.values()) < 0:
        raise ValueError(f"Gemma's vocabulary has pieces for the ids of {', '.join(ids)}. Received: {ids}")
    return model


def _add_vocabulary(writer, model, rows):
    # llama.cpp wants as many tokens as there are rows.
    unused = range(len(model.pieces), rows)
    pieces = [piece.piece for piece in model.pieces]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces + [tokenizer_files.placeholder(index) for index in unused])
    writer.add_token_scores([piece.score for piece in model.pieces] + [-10_000.0 for _ in unused])
    writer.add_token_types([piece.type for piece in model.pieces] + [tokenizer_files.UNUSED for _ in unused])
    for name, key in SPECIAL_IDS.items():
        writer.add_uint32(_id_key(key), getattr(model.trainer_spec, f"{name}_id"))
    writer.add_add_space_prefix(False)


def _stops(model, stop_tokens):
    """Ids of the tokens that end an answer besides `<eos>`, by their keys."""
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    stops = [ids[token] for token in (tokenizer_files.END_OF_TURN, *stop_tokens) if token in ids]
    if len(stops) > len(STOP_KEYS):
        raise ValueError(
            f"A GGUF file names {len(STOP_KEYS)} tokens that end an answer besides <eos>. Received: {len(stops)}, "
            f"{', '.join(map(repr, stop_tokens))} among them"
        )
    return dict(zip(STOP_KEYS, stops))


def _add_dialogue(writer, model, stops, besides):
    for name, index in stops.items():
        writer.add_uint32(_id_key(name), index)
    writer.add_add_bos_token(besides.opens_with_bos)
    # Without one, llama.cpp talks to every model as if it were tuned on ChatML.
    if template := besides.chat_template or tokenizer_files.chat_template_of(model):
        writer.add_chat_template(template)


def _id_key(name):
    return f"tokenizer.ggml.{name}_token_id"


def _proto(path, settings):
    """Bytes of a SentencePiece model, or `None` for a file without vocabulary."""
    kind = settings.get("tokenizer.ggml.model")
    if kind in NO_VOCABULARY:
        return None
    if kind != "llama":
        raise ValueError(f"Gemma's vocabulary is of type 'llama' in GGUF. Received: {kind!r} in `{path}`")
    with reading(path, place="tokenizer.ggml"):
        pieces = _pieces(path, settings)
        return tokenizer_files.built(pieces, _special_ids(path, settings, len(pieces)))


def _pieces(path, settings):
    lists = [_setting(path, settings, f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")]
    if len({len(values) for values in lists}) > 1:
        raise ValueError(f"`{path}` has {[len(values) for values in lists]} tokens, scores and types of tokens.")
    pieces = list(zip(*lists))
    while pieces and _is_placeholder(len(pieces) - 1, *pieces[-1]):
        pieces.pop()
    return [
        (
            piece,
            score,
            tokenizer_files.CONTROL if _is_placeholder(index, piece, score, of_type) else _type_of(piece, of_type),
        )
        for index, (piece, score, of_type) in enumerate(pieces)
    ]


def _is_placeholder(index, piece, score, of_type):
    return piece == tokenizer_files.placeholder(index) and of_type == tokenizer_files.UNUSED


def _type_of(piece, of_type):
    # llama.cpp's converter declares the turns' control pieces, which text can not contain. In Gemma's own it can.
    is_turn = piece in tokenizer_files.TURNS and of_type == tokenizer_files.CONTROL
    return tokenizer_files.USER_DEFINED if is_turn else of_type


def _besides(path, settings):
    """The file's `BesidesTensors`."""
    generation = _sampling(settings)
    if settings.get("tokenizer.ggml.model") in NO_VOCABULARY:
        return BesidesTensors(generation=generation)
    pieces = [piece for piece, _, _ in _pieces(path, settings)]
    ids = [settings[_id_key(name)] for name in STOP_KEYS if _id_key(name) in settings]
    template = settings.get(CHAT_TEMPLATE)
    return BesidesTensors(
        stop_tokens=besides_tensors.stop_tokens_of(pieces, ids, said_by=f"`{path}`"),
        chat_template=None if template in (None, tokenizer_files.CHAT_TEMPLATE) else template,
        preprocessor={} if settings.get(ADD_BOS, True) else {"add_start_token": False},
        generation=generation,
    )


def _special_ids(path, settings, pieces):
    ids = {name: _setting(path, settings, _id_key(key)) for name, key in SPECIAL_IDS.items()}
    for name, index in ids.items():
        if index >= pieces:
            raise ValueError(f"`{path}` has {pieces} tokens, but `{_id_key(SPECIAL_IDS[name])}` = {index}.")
    return ids
