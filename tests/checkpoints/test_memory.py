"""Loading takes little more memory than the weights, in a process of its own that reports its peak."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from peak_memory import measured

LIMIT = 1.3
SIZE = {"float32": 4, "bfloat16": 2}
V, L, N, K, D, F, H = 4096, 6, 8, 1, 1024, 4096, 128

MEASURE = """
import sys
from keras_gemma import startup
startup.leave_out_tensorflow()
import keras
from keras_gemma.models import GemmaBackbone

keras.ops.convert_to_numpy(keras.ops.ones((2, 2)))
begin()
backbone = GemmaBackbone.from_preset(sys.argv[1], dtype=sys.argv[2])
print(peak() / (backbone.count_params() * int(sys.argv[3])))
"""

BLOCK = {
    "attention/query_dense": (N, D, H),
    "attention/key_dense": (K, D, H),
    "attention/value_dense": (K, D, H),
    "attention/output_dense": (N, H, D),
    "gating_ffw": (D, F),
    "gating_ffw_2": (D, F),
    "ffw_linear": (F, D),
    "pre_attention_norm": (D,),
    "pre_ffw_norm": (D,),
}
HUGGING_FACE_BLOCK = {
    "self_attn.q_proj": (N * H, D),
    "self_attn.k_proj": (K * H, D),
    "self_attn.v_proj": (K * H, D),
    "self_attn.o_proj": (D, N * H),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
    "input_layernorm": (D,),
    "post_attention_layernorm": (D,),
}


def _keras_preset(folder):
    config = {
        "vocabulary_size": V, "num_layers": L, "num_query_heads": N, "num_key_value_heads": K,
        "hidden_dim": D, "intermediate_dim": 2 * F, "head_dim": H,
    }  # fmt: skip
    content = {"class_name": "GemmaBackbone", "registered_name": "keras_hub>GemmaBackbone", "config": config}
    (folder / "config.json").write_text(json.dumps(content))
    with h5py.File(folder / "model.weights.h5", "w") as file:
        file["layers/reversible_embedding/vars/0"] = np.ones((V, D), "float32")
        file["layers/rms_normalization/vars/0"] = np.ones(D, "float32")
        for i in range(L):
            for name, shape in BLOCK.items():
                block = f"gemma_decoder_block_{i}" if i else "gemma_decoder_block"
                file[f"layers/{block}/{name}/vars/0"] = np.ones(shape, "float32")


def _hugging_face_folder(folder):
    from safetensors.numpy import save_file

    config = {
        "model_type": "gemma", "vocab_size": V, "num_hidden_layers": L, "num_attention_heads": N,
        "num_key_value_heads": K, "hidden_size": D, "intermediate_size": F, "head_dim": H,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": np.ones((V, D), "float32"), "model.norm.weight": np.ones(D, "float32")}
    for i in range(L):
        for name, shape in HUGGING_FACE_BLOCK.items():
            tensors[f"model.layers.{i}.{name}.weight"] = np.ones(shape, "float32")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("make, dtype", [(_keras_preset, "float32"), (_hugging_face_folder, "bfloat16")])
def test_peak_memory_of_loading(tmp_path, make, dtype):
    make(tmp_path)
    # Pages of a mapped file count for as long as the kernel leaves them there: a busy machine adds some.
    ratios = (measured(MEASURE, tmp_path, dtype, SIZE[dtype]) for _ in range(3))
    ratio = next((ratio for ratio in ratios if ratio < LIMIT), LIMIT)
    print(f"peak memory of loading: {ratio:.2f} × the weights")
    assert 0.9 < ratio < LIMIT
