"""`keras-gemma convert`: a checkpoint of one format written in another."""

from keras_gemma.commands import checks
from keras_gemma.commands.arguments import add_command
from keras_gemma.commands.arguments import positive_float
from keras_gemma.commands.arguments import without_backend

FORMATS = ("keras", "keras_weights", "hugging_face", "flax", "gguf")
DTYPES = ("float32", "float16", "bfloat16", "q8_0")


def add(commands):
    parser = add_command(
        commands,
        "convert",
        run,
        help="write a model in another format",
        description="Writes a model in another format, a tensor at a time. Numbers keep their dtype unless --dtype "
        "asks for another. The target appears only when it is complete.",
        epilog="""\
formats:
  keras          folders of presets           flax       folders of google-deepmind/gemma, Orbax
  keras_weights  a single .weights.h5 file    pytorch    .bin of Hugging Face, .ckpt of gemma_pytorch; read only
  hugging_face   folders with safetensors     gguf       files of llama.cpp

examples:
  keras-gemma convert gemma_tiny_en tiny.gguf
  keras-gemma convert hf://google/gemma-2b gemma_2b --to keras --dtype bfloat16
  keras-gemma convert gemma-7b.gguf gemma-7b --to hugging_face --max-shard-size 5""",
    )
    parser.add_argument("source", help="file, folder, kaggle:// or hf:// handle, or name of a preset")
    parser.add_argument("target", help="path that does not exist yet")
    parser.add_argument("--to", choices=FORMATS, help="format of the target, where .gguf or .weights.h5 do not say it")
    parser.add_argument("--dtype", choices=DTYPES, help="of the numbers; q8_0 in GGUF alone (default: as they are)")
    parser.add_argument(
        "--max-shard-size",
        type=positive_float,
        metavar="GB",
        help="maximum size of a weight file of keras and hugging_face (default: 10)",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a SentencePiece model, where the source has none")


def run(args):
    checks.check_checkpoint(args.source)
    checks.check_new(args.target)
    if args.tokenizer:
        checks.check_data(args.tokenizer)
    without_backend()
    from keras_gemma.checkpoints import convert

    options = {"format": args.to, "dtype": args.dtype, "tokenizer": args.tokenizer}
    found = convert(args.source, args.target, max_shard_size=args.max_shard_size, **options)
    print(f"{args.target}: from {found.format}, {len(found.tensors)} tensors{_said_of_tokenizer(args, found)}")


def _said_of_tokenizer(args, found):
    from keras_gemma.checkpoints import gguf_file
    from keras_gemma.checkpoints import keras_weights

    if args.tokenizer or keras_weights.is_here(args.target) or found.proto() is not None:
        return ""
    is_gguf = gguf_file.is_here(args.target)
    return ", no tokenizer" + (": llama.cpp does not load it" if is_gguf else "")
