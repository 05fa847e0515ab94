"""Bits per byte of the bundled model in float32 and in every quantisation, on text that neither training nor
calibration saw:

    KERAS_BACKEND=torch python tests/benchmarks/quantization.py

Half of the texts of Python's manual calibrate, the other half is held out. Keras' GPTQ and AWQ go through the columns
one by one; on JAX each is compiled, which takes minutes longer than on PyTorch and gives the same.
"""

import argparse
import math
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pydoc_data.topics import topics

from keras.quantizers import AWQConfig
from keras.quantizers import GPTQConfig

from keras_gemma import GemmaCausalLM

CALIBRATED = {"gptq": GPTQConfig, "awq": AWQConfig}
MODES = (None, "int8", "int4", *CALIBRATED)
LONGEST = 1500


def texts(count):
    """`count` texts for calibration and as many others, each the beginning of a page."""
    pages = [page[:LONGEST] for _, page in sorted(topics.items()) if len(page) >= LONGEST][: 2 * count]
    return pages[::2], pages[1::2]


def quantized(preset, mode, calibration, group_size):
    """The model of a preset in a quantisation."""
    model = GemmaCausalLM.from_preset(preset)
    if mode in CALIBRATED:
        settings = {"num_samples": 32, "sequence_length": 128, "group_size": group_size}
        tokenizer = model.preprocessor.tokenizer
        model.quantize(mode, config=CALIBRATED[mode](dataset=calibration, tokenizer=tokenizer, **settings))
    elif mode:
        model.quantize(mode)
    return model


def bits_per_byte(model, held_out):
    """Of several texts together."""
    log_probs = sum(score.log_prob for score in model.score_texts(held_out))
    return -log_probs / math.log(2) / sum(len(text.encode()) for text in held_out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gemma_tiny_en")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()
    calibration, held_out = texts(args.texts)
    for mode in MODES:
        model = quantized(args.preset, mode, calibration, args.group_size)
        print(f"{mode or 'float32':8} {bits_per_byte(model, held_out):.4f} bits per byte", flush=True)


if __name__ == "__main__":
    main()
