"""Gemma as the Flax code of google-deepmind/gemma keeps it: a folder of Orbax, in which each tensor is a zarr array.

V vocabulary, D width, N query heads, K key-value heads, H head dim, F feed-forward. Keys of the tree, and its leaves:

    transformer/embedder                         input_embedding    V, D
    transformer/layer_0/pre_attention_norm       scale              D
    transformer/layer_0/attn/q_einsum            w                  N, D, H
    transformer/layer_0/attn/kv_einsum           w                  2, K, D, H
    transformer/layer_0/attn/attn_vec_einsum     w                  N, H, D
    transformer/layer_0/pre_ffw_norm             scale              D
    transformer/layer_0/mlp/gating_einsum        w                  2, D, F
    transformer/layer_0/mlp/linear               w                  F, D
    transformer/final_norm                       scale              D

Where N = K there is `qkv_einsum`, (3, N, D, H), in place of the two. Orbax joins keys with dots; keys are nested as
dicts, or flat with slashes as the released ones are, so that here all names are read with dots. The feed-forward's
leaves may lie one level higher, as `mlp.linear`.
"""

import functools
import itertools
import json
import math
import pathlib
from typing import NamedTuple

import numpy as np

from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints.json_files import parsed_json
from keras_gemma.checkpoints.json_files import read_json
from keras_gemma.checkpoints.tensor_files import StoredTensor
from keras_gemma.checkpoints.tokenizer_files import VOCABULARY_FILE
from keras_gemma.checkpoints.tokenizer_folder import tokenizer_model
from keras_gemma.damaged import reading

FORMAT = "flax"
TREE_FILE = "_METADATA"
OCDBT_FILE = "manifest.ocdbt"
# What describes an array, and the driver that reads it.
DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}
# One folder a tensor, of nested and of flat keys, in the years before Orbax put all into one OCDBT database.
TENSOR_FOLDERS = ("transformer.embedder.input_embedding", "transformer/embedder.input_embedding")
BYTES_OF_CHUNK = 64 * 1024**2
LAYER = "transformer.layer_{index}."
EMBEDDING = "transformer.embedder.input_embedding"


class Layout(NamedTuple):
    """What the files of one model may differ in.

    Attributes:
        rows: int, of the embedding.
        has_qkv: bool. Queries, keys and values are one tensor.
        mlp_leaf: string, what follows the names of the feed-forward.
    """

    rows: int
    has_qkv: bool
    mlp_leaf: str


def is_here(path):
    """Whether a folder, or a single one inside it, is of this format, by the names of its files."""
    return bool(_folders(path))


def checkpoint(path):
    """The model in a folder.

    Args:
        path: the folder that Orbax wrote, or the one around it, as releases are packed.

    Returns:
        A `Checkpoint`.

    Raises:
        ImportError: without the library that reads Orbax's arrays.
        ValueError: for damaged files, and for another architecture than Gemma 1.
    """
    folder = _only_folder(path)
    stored = _stored(folder)
    sizes, layout = _sizes(stored, str(folder))
    return canonical.Checkpoint(
        path=str(path),
        format=FORMAT,
        sizes=sizes,
        table=table_of(sizes, layout),
        stored=stored,
        where=str(folder),
        proto=functools.partial(tokenizer_model, folder, folder.absolute().parent),
    )


def _folders(path):
    path = pathlib.Path(path)
    if _is_orbax(path):
        return [path]
    # A preset may well have checkpoints of its training beside it.
    if not path.is_dir() or (path / "config.json").exists():
        return []
    return [child for child in sorted(path.iterdir()) if _is_orbax(child)]


def _is_orbax(folder):
    return any((folder / name).exists() for name in (TREE_FILE, OCDBT_FILE, *TENSOR_FOLDERS))


def _only_folder(path):
    folders = _folders(path)
    if len(folders) != 1:
        names = canonical.listed([folder.name for folder in folders]) if folders else "none"
        raise ValueError(f"A Flax checkpoint is one folder of Orbax. Received: `{path}`, which has {names}")
    return folders[0]


# === Names and sizes ===


def _sizes(stored, where):
    usual = functools.partial(canonical.usual_shape, stored, where)
    has_qkv = any(name.endswith(".attn.qkv_einsum.w") for name in stored)
    mlp_leaf = ".w" if any(name.endswith(".mlp.linear.w") for name in stored) else ""
    rows, width = usual(EMBEDDING, "VD")
    if has_qkv:
        _, heads, _, head_dim = usual(LAYER + "attn.qkv_einsum.w", "3NDH")
        key_value_heads = heads
    else:
        heads, _, head_dim = usual(LAYER + "attn.q_einsum.w", "NDH")
        _, key_value_heads, _, _ = usual(LAYER + "attn.kv_einsum.w", "2KDH")
    feed_forward, _ = usual(LAYER + "mlp.linear" + mlp_leaf, "FD")
    sizes = canonical.Sizes(
        vocabulary_size=canonical.ROWS if rows == canonical.ROWS_WITH_PADDING else rows,
        num_layers=canonical.number_of_blocks(stored, r"transformer\.layer_(\d+)\."),
        num_query_heads=heads,
        num_key_value_heads=key_value_heads,
        hidden_dim=width,
        intermediate_dim=2 * feed_forward,
        head_dim=head_dim,
    )
    return canonical.checked(sizes, where), Layout(rows, has_qkv, mlp_leaf)


def layout_of(sizes):
    """The `Layout` that Flax' Gemma of these `Sizes` wants."""
    rows = canonical.ROWS_WITH_PADDING if sizes.vocabulary_size == canonical.ROWS else sizes.vocabulary_size
    return Layout(rows, sizes.num_query_heads == sizes.num_key_value_heads, ".w")


def table_of(sizes, layout):
    """What a model of these `Sizes` has in this format, as `FileTensor`s."""
    wanted = canonical.shapes(sizes)
    table = [_padded(EMBEDDING, "embedding", wanted["embedding"], layout.rows)]
    for index in range(sizes.num_layers):
        table += _block(index, wanted, layout)
    return [*table, canonical.as_it_is("transformer.final_norm.scale", "final_norm", wanted["final_norm"])]


def _block(index, wanted, layout):
    names = {
        "pre_attention_norm.scale": ["attention_norm"],
        **(
            {"attn.qkv_einsum.w": ["query", "key", "value"]}
            if layout.has_qkv
            else {"attn.q_einsum.w": ["query"], "attn.kv_einsum.w": ["key", "value"]}
        ),
        "attn.attn_vec_einsum.w": ["output"],
        "pre_ffw_norm.scale": ["ffw_norm"],
        "mlp.gating_einsum" + layout.mlp_leaf: ["gate", "up"],
        "mlp.linear" + layout.mlp_leaf: ["down"],
    }
    for name, parts in names.items():
        name, parts = LAYER.format(index=index) + name, [f"blocks.{index}.{part}" for part in parts]
        shape = wanted[parts[0]]
        yield _stacked(name, parts, shape) if len(parts) > 1 else canonical.as_it_is(name, parts[0], shape)


def _stacked(name, parts, shape):
    return canonical.FileTensor(name, (len(parts), *shape), tuple(parts), tuple, lambda *arrays: np.stack(arrays))


def _padded(name, part, shape, rows):
    padding = ((0, rows - shape[0]), (0, 0))
    return canonical.FileTensor(
        name,
        (rows, shape[1]),
        (part,),
        lambda array: (array[: shape[0]],),
        lambda array: np.pad(array, padding) if rows > shape[0] else array,
    )


# === Reading ===


def _tensorstore():
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(
            "Flax checkpoints are read and written with tensorstore, which comes with orbax-checkpoint: "
            "`pip install 'keras_gemma[train]'`."
        ) from error
    return tensorstore


def _stored(folder):
    with reading(folder, "Orbax checkpoint"):
        store, must_have_data = _open_folder(folder)
        keys = [key.decode() for key in store.list().result()]
    arrays = [key.rpartition("/") for key in sorted(keys)]
    stored = [
        _stored_tensor(folder, functools.partial(_open_array, folder, store, key, file, must_have_data), key)
        for key, _, file in arrays
        if file in DRIVERS
    ]
    return {tensor.name: tensor for tensor in stored}


def _open_folder(folder):
    """Its key-value store, and whether an array that lacks data is a damaged one."""
    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    spec = {"driver": "ocdbt", "base": base} if (folder / OCDBT_FILE).exists() else base
    must_have_data = _tree(folder).get("store_array_data_equal_to_fill_value", False)
    return _tensorstore().KvStore.open(spec).result(), must_have_data


def _tree(folder):
    return read_json(folder / TREE_FILE) if (folder / TREE_FILE).exists() else {}


def _stored_tensor(folder, open_array, key):
    name, array = key.replace("/", "."), open_array()
    dtype = np.dtype(array.dtype.numpy_dtype)
    return StoredTensor(str(folder), name, tuple(array.shape), dtype, functools.partial(_read, folder, open_array, key))


def _open_array(folder, store, key, file, must_have_data):
    with reading(folder, place=key):
        # TensorStore itself ends the process where brackets are nested too deeply.
        parsed_json(store.read(f"{key}/{file}").result().value, folder / key / file)
        kvstore = (store / f"{key}/").spec().to_json()
        spec = {"driver": DRIVERS[file], "kvstore": kvstore, "fill_missing_data_reads": not must_have_data}
        array = _tensorstore().open(spec, open=True, read=True).result()
        chunk = array.chunk_layout.write_chunk.shape
        if any(length > max(size, 1) for length, size in zip(chunk, array.shape)):
            # It would be made whole in memory.
            raise ValueError(f"chunks of {chunk} are larger than the tensor of {tuple(array.shape)}")
        return array


def _read(folder, open_array, key):
    array = open_array()
    with reading(folder, place=key):
        return array.read().result()


# === Writing ===


def write(target, sizes, tensors, proto, dtype=None):
    """Writes a folder that Orbax and Flax' Gemma load, one tensor at a time.

    A vocabulary of 256,000 is padded with rows of zeros, as Flax' Gemma has it.

    Args:
        target: path of a folder that does not exist yet.
        sizes: `Sizes`.
        tensors: dict of `StoredTensor`, as of a `Checkpoint`.
        proto: bytes of the SentencePiece model, or `None`.
        dtype: optional NumPy dtype to cast to.

    Raises:
        ImportError: without the library that writes Orbax's arrays.
        ValueError: for another epsilon than Flax' Gemma has, and as `arranged`.
    """
    canonical.check_epsilon(sizes, FORMAT)
    _tensorstore()
    folder = pathlib.Path(target)
    folder.mkdir()
    arranged = canonical.arranged(table_of(sizes, layout_of(sizes)), tensors, dtype)
    for tensor in arranged:
        _write_array(folder, tensor)
    if proto:
        (folder / VOCABULARY_FILE).write_bytes(proto)
    (folder / TREE_FILE).write_text(json.dumps(_tree_of(arranged)))


def _keys(name):
    """The key and the leaf: flat, since Flax' Gemma wants them so."""
    path, _, leaf = name.rpartition(".")
    return path.replace(".", "/"), leaf


def _write_array(folder, tensor):
    tensorstore = _tensorstore()
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder.absolute()}/{'.'.join(_keys(tensor.name))}/"},
        "metadata": {"compressor": {"id": "zstd", "level": 1}},
    }
    elements = min(BYTES_OF_CHUNK // tensor.dtype.itemsize, math.prod(tensor.shape))
    array = tensorstore.open(
        spec,
        create=True,
        dtype=tensorstore.dtype(tensor.dtype),
        shape=tensor.shape,
        chunk_layout=tensorstore.ChunkLayout(write_chunk=tensorstore.ChunkLayout.Grid(elements=elements)),
    ).result()
    _write_chunks(array, tensor.read())


def _write_chunks(array, values):
    # All at once would hold the compressed form of the whole, too.
    steps = array.chunk_layout.write_chunk.shape
    starts = [range(0, size, step) for size, step in zip(values.shape, steps)]
    for corner in itertools.product(*starts):
        piece = tuple(slice(s, min(s + step, size)) for s, step, size in zip(corner, steps, values.shape))
        array[piece].write(values[piece]).result()


def _tree_of(tensors):
    return {
        "tree_metadata": {str(_keys(tensor.name)): _leaf_of(*_keys(tensor.name)) for tensor in tensors},
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _leaf_of(*keys):
    of_a_dict = 2
    return {
        "key_metadata": [{"key": key, "key_type": of_a_dict} for key in keys],
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
    }
