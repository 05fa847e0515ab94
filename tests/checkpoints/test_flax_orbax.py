"""What Orbax wrote as Flax' Gemma has it is read to the bit, Orbax reads what is written, the rest is refused."""

import functools
import json
import sys
import weakref

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from canonical_tensors import DTYPES
from canonical_tensors import SIZES
from canonical_tensors import assert_logits
from canonical_tensors import assert_same
from canonical_tensors import canonical_arrays
from canonical_tensors import stored_in_memory

from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import flax_orbax
from keras_gemma.checkpoints.tensor_files import StoredTensor

ATTENTION = {"2b": {"q_einsum", "kv_einsum", "attn_vec_einsum"}, "7b": {"qkv_einsum", "attn_vec_einsum"}}
LAYOUTS = {
    "flat": {"use_ocdbt": True},
    "nested": {"use_ocdbt": True, "nested": True},
    "a folder a tensor": {"use_ocdbt": False, "nested": True},
    "flat, a folder a tensor": {"use_ocdbt": False},
    "arrays of JAX": {"use_ocdbt": True, "convert": jnp.asarray},
    "zarr 3": {"use_ocdbt": True, "use_zarr3": True},
    "feed-forward one level higher": {"use_ocdbt": True, "nested": True, "mlp_leaf": False},
}


@pytest.fixture(params=SIZES)
def shape(request):
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def _tree(sizes, arrays):
    """The tree that Flax' Gemma saves, by its keys and leaf, with slashes."""
    tree = {
        "transformer/embedder/input_embedding": arrays["embedding"],
        "transformer/final_norm/scale": arrays["final_norm"],
    }
    for index in range(sizes.num_layers):
        layer, block = f"transformer/layer_{index}/", f"blocks.{index}."
        query, key, value, gate, up = (arrays[block + part] for part in ("query", "key", "value", "gate", "up"))
        tree[layer + "pre_attention_norm/scale"] = arrays[block + "attention_norm"]
        tree[layer + "pre_ffw_norm/scale"] = arrays[block + "ffw_norm"]
        tree[layer + "attn/attn_vec_einsum/w"] = arrays[block + "output"]
        tree[layer + "mlp/gating_einsum/w"] = np.stack([gate, up])
        tree[layer + "mlp/linear/w"] = arrays[block + "down"]
        if len(query) == len(key):
            tree[layer + "attn/qkv_einsum/w"] = np.stack([query, key, value])
        else:
            tree[layer + "attn/q_einsum/w"] = query
            tree[layer + "attn/kv_einsum/w"] = np.stack([key, value])
    return tree


def _flat(tree):
    flat = {}
    for name, array in tree.items():
        path, _, leaf = name.rpartition("/")
        flat.setdefault(path, {})[leaf] = array
    return flat


def _nested(tree, mlp_leaf):
    nested = {}
    for name, array in tree.items():
        *path, leaf = (name if mlp_leaf or "/mlp/" not in name else name.removesuffix("/w")).split("/")
        place = functools.reduce(lambda place, key: place.setdefault(key, {}), path, nested)
        place[leaf] = array
    return nested


def _save(folder, tree, nested=False, mlp_leaf=True, convert=np.asarray, **settings):
    tree = {name: convert(array) for name, array in tree.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**settings)) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(_nested(tree, mlp_leaf) if nested else _flat(tree)))
    return folder


# === Reading ===


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_orbax_wrote_is_read_to_the_bit(tmp_path, shape, dtype, layout):
    arrays = canonical_arrays(SIZES[shape], dtype)
    folder = _save(tmp_path / "2b", _tree(SIZES[shape], arrays), **LAYOUTS[layout])
    checkpoint = flax_orbax.checkpoint(folder)
    assert flax_orbax.is_here(folder) and checkpoint.format == "flax"
    assert checkpoint.sizes == SIZES[shape]
    assert type(next(iter(checkpoint.tensors.values())).read()) is np.ndarray
    assert_same(checkpoint.tensors, arrays)


def test_without_the_file_that_describes_the_tree(tmp_path):
    arrays = canonical_arrays(SIZES["2b"])
    for use_ocdbt in (True, False):
        folder = _save(tmp_path / str(use_ocdbt), _tree(SIZES["2b"], arrays), use_ocdbt=use_ocdbt, nested=not use_ocdbt)
        (folder / "_METADATA").unlink()
        (folder / "_CHECKPOINT_METADATA").unlink()
        assert flax_orbax.is_here(folder)
        assert_same(flax_orbax.checkpoint(folder).tensors, arrays)


def test_the_folder_around_it_and_the_tokenizer_beside_it(tmp_path):
    folder = _save(tmp_path / "2b", _tree(SIZES["2b"], canonical_arrays(SIZES["2b"])))
    assert flax_orbax.is_here(tmp_path)
    assert flax_orbax.checkpoint(tmp_path).proto() is None
    (tmp_path / "tokenizer.model").write_bytes(b"around")
    assert flax_orbax.checkpoint(tmp_path).proto() == flax_orbax.checkpoint(folder).proto() == b"around"
    (folder / "tokenizer.model").write_bytes(b"inside")
    assert flax_orbax.checkpoint(folder).proto() == b"inside"
    (tmp_path / "other").mkdir()
    assert not flax_orbax.is_here(tmp_path / "other")
    assert not flax_orbax.is_here(tmp_path / "tokenizer.model")


def test_a_preset_with_checkpoints_beside_it_stays_a_preset(tmp_path):
    (tmp_path / "10").mkdir()
    (tmp_path / "10" / "_METADATA").touch()
    assert flax_orbax.is_here(tmp_path)
    (tmp_path / "config.json").touch()
    assert not flax_orbax.is_here(tmp_path)


def test_logits_of_the_einsums_of_flax(tmp_path, shape):
    sizes = SIZES[shape]
    tree = _tree(sizes, canonical_arrays(sizes))
    checkpoint = flax_orbax.checkpoint(_save(tmp_path / "saved", tree))
    blocks = [_einsums(tree, f"transformer/layer_{index}/") for index in range(sizes.num_layers)]
    embedding, final_norm = tree["transformer/embedder/input_embedding"], tree["transformer/final_norm/scale"]
    assert_logits(checkpoint, embedding, blocks, final_norm)


def _einsums(tree, layer):
    def project(x):
        if layer + "attn/qkv_einsum/w" in tree:
            return np.einsum("BTD,SNDH->SBTNH", x, tree[layer + "attn/qkv_einsum/w"])
        keys_and_values = np.einsum("BSD,CKDH->CBSKH", x, tree[layer + "attn/kv_einsum/w"])
        return np.einsum("BTD,NDH->BTNH", x, tree[layer + "attn/q_einsum/w"]), *keys_and_values

    gating = tree[layer + "mlp/gating_einsum/w"]
    return {
        "attention_norm": tree[layer + "pre_attention_norm/scale"],
        "project": project,
        "output": lambda x: np.einsum("BTNH,NHD->BTD", x, tree[layer + "attn/attn_vec_einsum/w"]),
        "ffw_norm": tree[layer + "pre_ffw_norm/scale"],
        "gate": lambda x: np.dot(x, gating[0]),
        "up": lambda x: np.dot(x, gating[1]),
        "down": lambda x: np.dot(x, tree[layer + "mlp/linear/w"]),
    }


# === Writing ===


def test_orbax_reads_what_is_written(tmp_path, shape, dtype):
    arrays = canonical_arrays(SIZES[shape], dtype)
    flax_orbax.write(tmp_path / "written", SIZES[shape], stored_in_memory(arrays), b"pieces")
    expected = _flat(_tree(SIZES[shape], arrays))
    assert {path.split("/")[-1] for path in expected if "/layer_0/attn/" in path} == ATTENTION[shape]
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "written")
    assert restored.keys() == expected.keys()
    for path, leaves in expected.items():
        assert restored[path].keys() == leaves.keys()
        for leaf, array in leaves.items():
            assert restored[path][leaf].dtype == array.dtype
            assert restored[path][leaf].tobytes() == array.tobytes()
    assert (tmp_path / "written" / "tokenizer.model").read_bytes() == b"pieces"


def test_round_trip(tmp_path, shape, dtype):
    first = flax_orbax.checkpoint(_save(tmp_path / "saved", _tree(SIZES[shape], canonical_arrays(SIZES[shape], dtype))))
    flax_orbax.write(tmp_path / "written", first.sizes, first.tensors, None)
    again = flax_orbax.checkpoint(tmp_path / "written")
    assert again.sizes == first.sizes and again.proto() is None
    assert_same(again.tensors, {name: tensor.read() for name, tensor in first.tensors.items()})


def test_large_tensors_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(flax_orbax, "BYTES_OF_CHUNK", 256)
    arrays = canonical_arrays(SIZES["2b"])
    arrays["final_norm"][:] = 0
    flax_orbax.write(tmp_path / "written", SIZES["2b"], stored_in_memory(arrays), None)
    assert len(list((tmp_path / "written/transformer/layer_0/attn/q_einsum.w").iterdir())) > 4
    assert_same(flax_orbax.checkpoint(tmp_path / "written").tensors, arrays)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "written")
    np.testing.assert_array_equal(restored["transformer/embedder"]["input_embedding"], arrays["embedding"])


def test_cast(tmp_path):
    arrays = canonical_arrays(SIZES["2b"])
    flax_orbax.write(tmp_path / "written", SIZES["2b"], stored_in_memory(arrays), None, dtype=ml_dtypes.bfloat16)
    cast = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    assert_same(flax_orbax.checkpoint(tmp_path / "written").tensors, cast)


def test_memory_holds_the_parts_of_one_tensor(tmp_path):
    alive, most = weakref.WeakSet(), 0

    class Counted(np.ndarray):
        __hash__ = object.__hash__

    def read(array):
        nonlocal most
        made = np.copy(array).view(Counted)
        alive.add(made)
        most = max(most, len(alive))
        return made

    arrays = canonical_arrays(SIZES["7b"])
    stored = {n: StoredTensor("memory", n, a.shape, a.dtype, functools.partial(read, a)) for n, a in arrays.items()}
    flax_orbax.write(tmp_path / "written", SIZES["7b"], stored, None)
    # Queries, keys and values are one; the array before them may be on its way out.
    assert most <= 4


def test_rows_are_trimmed_and_padded(tmp_path):
    sizes = canonical.Sizes(256_000, 1, 2, 1, 2, 4, 2)
    arrays = canonical_arrays(sizes, ml_dtypes.bfloat16)
    padded = np.concatenate([arrays["embedding"], np.zeros((128, 2), ml_dtypes.bfloat16)])
    checkpoint = flax_orbax.checkpoint(_save(tmp_path / "saved", _tree(sizes, {**arrays, "embedding": padded})))
    assert checkpoint.sizes == sizes
    assert_same(checkpoint.tensors, arrays)
    flax_orbax.write(tmp_path / "written", sizes, checkpoint.tensors, None)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "written")["transformer/embedder"]["input_embedding"]
    assert restored.shape == (256_128, 2) and restored.tobytes() == padded.tobytes()
    unpadded = flax_orbax.checkpoint(_save(tmp_path / "unpadded", _tree(sizes, arrays)))
    assert unpadded.sizes == sizes
    assert_same(unpadded.tensors, arrays)


# === What is refused ===


def _refuses(folder, *parts):
    with pytest.raises(ValueError) as raised:
        for tensor in flax_orbax.checkpoint(folder).tensors.values():
            tensor.read()
    for part in (str(folder), *parts):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    "name", ["transformer/layer_1/attn/q_einsum/w", "transformer/layer_0/mlp/linear/w", "transformer/final_norm/scale"]
)
def test_a_missing_tensor_is_named(tmp_path, name):
    tree = _tree(SIZES["2b"], canonical_arrays(SIZES["2b"]))
    del tree[name]
    _refuses(_save(tmp_path / "saved", tree), "lacks", name.replace("/", "."))


def test_a_missing_embedding_and_a_missing_layer_are_named(tmp_path):
    tree = _tree(SIZES["2b"], canonical_arrays(SIZES["2b"]))
    without_layer = {name: array for name, array in tree.items() if "layer_0" not in name}
    _refuses(_save(tmp_path / "layer", without_layer), "lacks", "transformer.layer_0.pre_attention_norm.scale")
    del tree["transformer/embedder/input_embedding"]
    _refuses(_save(tmp_path / "saved", tree), "lacks `transformer.embedder.input_embedding` of shape (V, D)")
    _refuses(_save(tmp_path / "state", {"step/count": np.zeros(3, "float32")}), "transformer.embedder.input_embedding")


@pytest.mark.parametrize("name", ["post_attention_norm/scale", "attn/query_norm/scale", "attn/lora/a"])
def test_an_additional_tensor_is_named(tmp_path, name):
    tree = _tree(SIZES["2b"], canonical_arrays(SIZES["2b"]))
    tree["transformer/layer_1/" + name] = np.zeros(4, np.float32)
    _refuses(_save(tmp_path / "saved", tree), ("transformer/layer_1/" + name).replace("/", "."), "Gemma 1")


def test_a_misshapen_tensor_is_named(tmp_path):
    tree = _tree(SIZES["2b"], canonical_arrays(SIZES["2b"]))
    name = "transformer/layer_1/attn/kv_einsum/w"
    _refuses(
        _save(tmp_path / "saved", {**tree, name: tree[name][:1]}),
        name.replace("/", "."), "(1, 1, 16, 4)", "(2, 1, 16, 4)",
    )  # fmt: skip
    _refuses(_save(tmp_path / "axes", {**tree, name: tree[name][0]}), name.replace("/", "."), "(1, 16, 4)")


def test_the_misshapen_one_is_told_from_the_others(tmp_path):
    sizes = SIZES["2b"]._replace(num_layers=3)
    tree = _tree(sizes, canonical_arrays(sizes))
    name = "transformer/layer_0/attn/q_einsum/w"
    wrong = {**tree, name: np.zeros((5, 16, 4), np.float32)}
    _refuses(_save(tmp_path / "saved", wrong), name.replace("/", "."), "(5, 16, 4)", "(4, 16, 4)")


def test_integers_are_refused(tmp_path):
    tree = _tree(SIZES["2b"], canonical_arrays(SIZES["2b"]))
    name = "transformer/layer_1/mlp/linear/w"
    _refuses(_save(tmp_path / "saved", {**tree, name: tree[name].astype("int8")}), name.replace("/", "."), "int8")


def test_damage_is_refused(tmp_path):
    tree = _tree(SIZES["2b"], canonical_arrays(SIZES["2b"]))
    name = "transformer.layer_1.mlp.linear.w"
    folder = _save(tmp_path / "folders", tree, use_ocdbt=False, nested=True)
    chunk, header = folder / name / "0.0", folder / name / ".zarray"
    content = chunk.read_bytes()
    chunk.write_bytes(content[: len(content) // 2])
    _refuses(folder, "damaged", name)
    chunk.unlink()
    _refuses(folder, "damaged", name)
    header.write_bytes(header.read_bytes()[:20])
    _refuses(folder, "damaged", name)
    (folder / "_METADATA").write_text('{"tree')
    _refuses(folder, "_METADATA", "JSON")
    folder = _save(tmp_path / "database", tree)
    manifest = folder / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:40])
    _refuses(folder, "damaged")


def test_truncated_data_of_a_database_is_refused(tmp_path):
    folder = _save(tmp_path / "saved", _tree(SIZES["2b"], canonical_arrays(SIZES["2b"])))
    largest = max(folder.glob("**/d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:200])
    _refuses(folder, "damaged")


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    arrays = canonical_arrays(SIZES["2b"])
    arrays["blocks.1.up"][3, 2] = np.nan
    with pytest.raises(ValueError, match=r"not finite in `blocks\.1\.up`"):
        flax_orbax.write(tmp_path / "written", SIZES["2b"], stored_in_memory(arrays), None)


def test_what_the_format_cannot_say_is_not_written(tmp_path):
    sizes = SIZES["2b"]._replace(layer_norm_epsilon=1e-5)
    with pytest.raises(ValueError, match="1e-05"):
        flax_orbax.write(tmp_path / "written", sizes, stored_in_memory(canonical_arrays(sizes)), None)
    assert not (tmp_path / "written").exists()


def test_one_folder_of_several_is_to_be_named(tmp_path):
    for name in ("2b", "2b-it"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "_METADATA").write_text(json.dumps({}))
    assert flax_orbax.is_here(tmp_path)
    _refuses(tmp_path, "2b-it")


def test_the_missing_library_is_named(tmp_path, monkeypatch):
    folder = _save(tmp_path / "saved", _tree(SIZES["2b"], canonical_arrays(SIZES["2b"])))
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ImportError, match=r"keras_gemma\[train\]"):
        flax_orbax.checkpoint(folder)
    with pytest.raises(ImportError, match=r"keras_gemma\[train\]"):
        flax_orbax.write(tmp_path / "written", SIZES["2b"], {}, None)
