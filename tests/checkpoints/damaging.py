"""Small good files of every format that is read, and hundreds of ways to damage each."""

import copy
import dataclasses
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

WRONG_VALUES = (None, True, -1, 0, 1.5, math.nan, math.inf, 2**31, 2**70, "", "x", "\ud800", [], {}, [[1]], {"a": 1})


@dataclasses.dataclass(frozen=True)
class Good:
    """A file or folder that loads.

    Attributes:
        path: of the file or folder.
        load: callable from a path to what is in it, all of it read.
    """

    path: Path
    load: Callable


def files_of(path):
    """The files of a `Good`, by what follows its path."""
    return (
        {"": path} if path.is_file() else {str(f.relative_to(path)): f for f in sorted(path.rglob("*")) if f.is_file()}
    )


def damaged(content, name, seed, count):
    """Pairs of what was done and the damaged content, `count` of them for one file, different ones for each seed."""
    chance = random.Random(f"{seed} {name}")
    ways = [_cut, _flip, _flip, _overwrite, _swap, _insert, _append]
    structured = []
    if name.endswith((".json", ".zarray", "_METADATA")):
        structured = [_json_field] * 8
    elif name.endswith(".safetensors"):
        structured = [_safetensors_field] * 8
    elif name.endswith(".h5"):
        structured = [_flip_near_start] * 3
    for _ in range(count):
        way = chance.choice(ways + structured)
        yield way.__name__.strip("_"), way(content, chance)


def _position(content, chance):
    return chance.randrange(max(len(content), 1))


def _cut(content, chance):
    return content[: _position(content, chance)]


def _flip(content, chance):
    changed = bytearray(content or b"\0")
    for _ in range(chance.choice((1, 1, 4, 64))):
        changed[_position(changed, chance)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _flip_near_start(content, chance):
    head = min(len(content), 4096)
    return _flip(content[:head], chance) + content[head:]


def _overwrite(content, chance):
    start, length = _position(content, chance), chance.choice((1, 2, 4, 8, 64))
    filling = chance.choice((b"\0", b"\xff", b"[", b'"', b"\x80"))
    return content[:start] + filling * length + content[start + length :]


def _swap(content, chance):
    first, second = sorted((_position(content, chance), _position(content, chance)))
    return content[:first] + content[second:] + content[first:second]


def _insert(content, chance):
    start = _position(content, chance)
    return content[:start] + bytes(chance.randrange(256) for _ in range(chance.choice((1, 8)))) + content[start:]


def _append(content, chance):
    return content + chance.choice((b"\0", b"}", b"x" * 100, content))


def _json_field(content, chance):
    try:
        tree = json.loads(content)
    except ValueError:
        return b"{"
    return _encoded(_changed_tree(tree, chance), chance)


def _encoded(tree, chance):
    text = json.dumps(tree)
    if chance.random() < 0.05:
        text = text[:-1] + ("," + text[1:] if len(text) > 2 else "}")
    if chance.random() < 0.03:
        text = '{"a":' * 3000 + text + "}" * 3000
    return text.encode()


def _changed_tree(tree, chance):
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places or chance.random() < 0.05:
        return chance.choice(WRONG_VALUES)
    holder, key = chance.choice(places)
    kind = chance.choice(("drop", "rename", "value", "value", "value", "swap"))
    if kind == "drop":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == "swap":
        other, other_key = chance.choice(places)
        holder[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(holder[key])
    else:
        holder[key] = chance.choice(WRONG_VALUES)
    return tree


def _places(tree):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


def _safetensors_field(content, chance):
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = _encoded(_changed_tree(header, chance), chance)
    return struct.pack("<Q", len(changed)) + changed + content[8 + length :]


# === Damage that keeps HDF5 whole ===


def damaged_h5(path, seed, count):
    """Damages a copy of an HDF5 file in place; yields what was done after each, and `path` is then another file."""
    content = path.read_bytes()
    chance = random.Random(f"{seed} {path.name}")
    for _ in range(count):
        path.write_bytes(content)
        with h5py.File(path, "a") as file:
            yield _change_h5(file, chance)


def _change_h5(file, chance):
    names = []
    file.visit(names.append)
    name = chance.choice(names)
    way = chance.choice(("drop", "rename", "attribute", "text", "empty", "numbers", "group", "link", "scalar"))
    if way == "rename":
        file.move(name, f"{name}x")
    elif way == "attribute":
        file[name].attrs["dtype"] = chance.choice(("bfloat16", "float99", 3))
    else:
        del file[name]
    if way == "text":
        file[name] = "text"
    elif way == "empty":
        file[name] = h5py.Empty("f4")
    elif way == "numbers":
        file[name] = np.ones((chance.randrange(1, 5), 7), chance.choice(("f4", "i8", "c8", "?")))
    elif way == "group":
        file.create_group(name)
    elif way == "link":
        file[name] = h5py.SoftLink("/nowhere")
    elif way == "scalar":
        file[name] = np.float32(1)
    return f"h5 {way}"
