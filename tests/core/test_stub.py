"""_core.pyi, from which a type checker knows the compiled half, says of each function what pybind11 says of it."""

import ast
import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from chatlm.worker.kernels.library import _core  # noqa: E402

STUB = ast.parse((Path(__file__).resolve().parents[2] / "csrc/decode_core/_core.pyi").read_text(encoding="utf-8"))
# What pybind11 says -> the beginning of what the stub says, where C++ leaves open more than that
OPEN = {"object": "", "list": "list", "tuple": "tuple[", "str": "str"}


def documented(text):
    """A docstring of pybind11's as a function without a body."""
    line = text.strip().split("\n")[0].replace("decode_core._core.", "").replace("dc::", "").replace("collections.abc.", "")
    for name in ("Int", "Float"):
        line = re.sub(rf"typing\.Supports{name}( \| typing\.SupportsIndex)?", name.lower(), line)
    line = re.sub(r'typing\.Annotated\[(.*?), "FixedSize\(\d\)"\]', r"\1", line)
    [function] = ast.parse(f"def {line}: ...").body
    return function


def parameters(function):
    """[(name, or None where it is given by place only; type)], without self; then the type of the result."""
    by_place = function.args.posonlyargs
    names = [(None if each in by_place or re.fullmatch(r"arg\d+", each.arg) else each.arg, each) for each in by_place + function.args.args]
    types = [(name, ast.unparse(each.annotation).replace("_Buffer", "tuple[int, int]")) for name, each in names if each.arg != "self"]
    return types, function.returns and ast.unparse(function.returns)


def agree(stated, documented):
    return stated == documented or documented in OPEN and stated.startswith(OPEN[documented])


def differences(stub, name, made):
    """How the stub's function differs from the module's."""
    (ours, ours_result), (theirs, their_result) = parameters(stub), parameters(made)
    if [each for each, _ in ours] != [each for each, _ in theirs]:
        yield f"{name}: parameters {ours} instead of {theirs}"
    yield from (f"{name}: {one} instead of {other}" for (_, one), (_, other) in zip(ours, theirs) if not agree(one, other))
    if their_result and not agree(ours_result, their_result):
        yield f"{name}: returns {ours_result} instead of {their_result}"


def public(names):
    return {name for name in names if not name.startswith("_")}


def class_differences(stub, made):
    ours = {each.name: each for each in stub.body if isinstance(each, ast.FunctionDef)}
    theirs = {name: value for name, value in vars(made).items() if not name.startswith("_") or name == "__init__" and inspect.isroutine(value)
              and (value.__doc__ or "").startswith("__init__(self")}
    yield from (f"{made.__name__}.{name}: in one only" for name in ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        value = theirs[name]
        if isinstance(value, property):
            made_function = documented(f"{name}{value.fget.__doc__.strip()}".replace("arg0:", "self:"))
            if [ast.unparse(each) for each in ours[name].decorator_list] != ["property"]:
                yield f"{made.__name__}.{name}: is a property"
        else:
            made_function = documented(value.__doc__)
        yield from differences(ours[name], f"{made.__name__}.{name}", made_function)


def all_differences(stub, module):
    nodes = {each.name if hasattr(each, "name") else each.target.id: each for each in stub.body if hasattr(each, "name") or isinstance(each, ast.AnnAssign)}
    ours = {name for name in public(nodes) if module.cuda_compiled or not name.startswith("cuda_") or name == "cuda_compiled"}
    yield from (f"{name}: in one only" for name in ours ^ public(vars(module)))
    for name in ours & public(vars(module)):
        node, value = nodes[name], getattr(module, name)
        if isinstance(node, ast.ClassDef):
            yield from class_differences(node, value)
        elif isinstance(node, ast.FunctionDef):
            yield from differences(node, name, documented(value.__doc__))
        elif ast.unparse(node.annotation).partition("[")[0] != type(value).__name__:
            yield f"{name}: {ast.unparse(node.annotation)} instead of {type(value).__name__}"


def test_the_stub_says_what_the_compiled_module_has():
    assert list(all_differences(STUB, _core)) == []


@pytest.mark.parametrize("true, wrong", [
    ("isa() -> str", "isa() -> int"), ("feature: str", "feature: int"), ("feature: str", "name: str"), ("def why(", "def whom("), ("def isa(", "def isas("),
    ("    @property\n    def moves(", "    def moves("), ("REDO_US: int", "REDO_US: str"), ("def embed(self, ids: int, ", "def embed(self, ")])
def test_a_difference_is_found(true, wrong):
    text = ast.unparse(STUB)
    assert true in text and list(all_differences(ast.parse(text.replace(true, wrong)), _core))
