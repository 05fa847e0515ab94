"""Text that every Python brings along: what its standard library says and does.

    prose_and_code()         {"prose": documentation of modules, classes and functions, "code": functions without it}
    names_and_summaries()    {"prompts": ["textwrap.dedent(text)", ...], "responses": ["Remove any ...", ...]}

The order is random, and the same for the same version of Python. No text comes twice.
"""

import ast
import hashlib
import sysconfig
from pathlib import Path

SHORTEST_TEXT = 120
LONGEST_TEXT = 1000
LONGEST_SUMMARY = 100
LONGEST_SIGNATURE = 60


def prose_and_code():
    """Two lists of texts of `SHORTEST_TEXT` to `LONGEST_TEXT` characters."""
    prose, code = [], []
    for name, tree in modules():
        prose += [ast.get_docstring(node) or "" for node in [tree, *nodes(tree, ast.ClassDef), *functions(tree)]]
        code += [f"# {name}\n{without_docstring(function)}" for function in functions(tree)]
    return {"prose": scattered(filter(is_of_fair_length, prose)), "code": scattered(filter(is_of_fair_length, code))}


def names_and_summaries():
    """Functions with their arguments, and the first line of what their documentation says."""
    function_of = {}
    for name, tree in modules():
        for function in functions(tree):
            summary = (ast.get_docstring(function) or "").partition("\n")[0]
            signature = f"{name}.{function.name}({ast.unparse(function.args)})"
            if summary.endswith(".") and len(summary) <= LONGEST_SUMMARY and len(signature) <= LONGEST_SIGNATURE:
                function_of.setdefault(summary, signature)
    summaries = scattered(function_of)
    return {"prompts": [function_of[summary] for summary in summaries], "responses": summaries}


def modules():
    """Names and syntax trees of the modules that are no packages."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.stem, ast.parse(path.read_bytes())


def nodes(tree, kind):
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def functions(tree):
    return nodes(tree, ast.FunctionDef)


def without_docstring(function):
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:] or [ast.Pass()]
    return ast.unparse(function)


def is_of_fair_length(text):
    return SHORTEST_TEXT <= len(text) <= LONGEST_TEXT


def scattered(texts):
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
