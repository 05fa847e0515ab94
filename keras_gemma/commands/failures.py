"""An error of any library as one sentence that says what to do next."""

import errno

# Modules that an extra brings.
EXTRAS = {
    "array_record": "train",
    "gguf": "convert",
    "grain": "train",
    "libtpu": "plan",
    "matplotlib": "plan",
    "orbax": "train",
    "pyarrow": "train",
    "tensorboard": "tensorboard",
    "tensorflow_datasets": "train",
    "tensorstore": "train",
    "torch": "torch",
}
# Classes of network libraries by name, which are not imported to be recognised.
NETWORK_ERRORS = {
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "MaxRetryError",
    "NameResolutionError",
    "NewConnectionError",
    "ReadTimeout",
    "URLError",
    "gaierror",
}
WITHHELD = (401, 403)
OF_FILES = {
    errno.ENOENT: "No file or folder {file}.",
    errno.EACCES: "No permission to read or write {file}.",
    errno.EPERM: "No permission to read or write {file}.",
    errno.EISDIR: "{file} is a folder, not a file.",
    errno.ENOTDIR: "{file} is a file, not a folder.",
    errno.EEXIST: "{file} exists already.",
    errno.ENOSPC: "The disk is full: {file} could not be written.",
    errno.EROFS: "{file} lies on a disk that can only be read.",
    errno.EFBIG: "{file} is larger than files may be here.",
}


def sentence_of(error):
    """One line for a person, in place of an error's own text where that is meant for programmers."""
    return (
        _of_files(error) or _of_missing_package(error) or _of_memory(error) or _of_network(error) or in_one_line(error)
    )


def in_one_line(error):
    """The text of an error without its line ends; its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _of_files(error):
    # Errors that this package raises itself have a sentence and no number.
    if not isinstance(error, OSError) or error.errno not in OF_FILES or not str(error).startswith("[Errno"):
        return None
    return OF_FILES[error.errno].format(file=error.filename if error.filename is not None else "a file")


def _of_missing_package(error):
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name not in EXTRAS:
        return None
    return f"This needs the package {name}: pip install 'keras_gemma[{EXTRAS[name]}]'"


def _of_memory(error):
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
        return (
            "Not enough memory. --dtype bfloat16 takes half of it; `keras-gemma inspect` says how much a model needs. "
            f"({in_one_line(error)[:200]})"
        )
    return None


def _of_network(error):
    chain = list(_chain(error))
    if any(getattr(getattr(one, "response", None), "status_code", None) in WITHHELD for one in chain):
        return (
            "The hub hands this model out to those who accepted Gemma's terms, and does not know you. Accept them at "
            "https://www.kaggle.com/models/google/gemma and set KAGGLE_USERNAME and KAGGLE_KEY, or at "
            f"https://huggingface.co/google and set HF_TOKEN. ({in_one_line(error)[:200]})"
        )
    for one in chain:
        if type(one) is ConnectionError:
            # One of ours, which says all that there is to say.
            return in_one_line(one)
    unreachable = [one for one in chain if type(one).__name__ in NETWORK_ERRORS]
    if not unreachable:
        return None
    return (
        "The hub cannot be reached. Check the network and try again, or give a folder on this machine. "
        f"({type(unreachable[-1]).__name__}: {in_one_line(unreachable[-1])[:160]})"
    )


def _chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
