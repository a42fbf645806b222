"""The seam to decode_core as a digest: if it differs, decode_core was built for another chat_server.

chat_server's side states all of it: what a backend has (`Backend`, `Steps`), the ops (`Kernels`), the
parameters of their references, and what decode_core gets (`for_decode_core`). chat_server reads the digest
off its own modules.
setup.py reads the same modules next to it, and compiles the digest into decode_core. Only names count, so a
changed meaning needs a new name. The fields of the classes passed across do not count, since they grow with
every family: those that decode_core reads keep their names.
"""

import ast
import hashlib
import re
from collections.abc import Callable, Iterator

KERNELS = "chatlm/worker/model/kernels.py"
REFERENCES = "chatlm/worker/ops/references.py"


def seam_digest(read: Callable[[str], str]) -> str:
    """The digest of the modules; `read` returns the text at a path."""
    return hashlib.sha256("\n".join(sorted(seam_names(read))).encode()).hexdigest()[:12]


def seam_names(read: Callable[[str], str]) -> Iterator[str]:
    body = ast.parse(read(KERNELS)).body
    classes = {node.name: node.body for node in body if isinstance(node, ast.ClassDef)}
    for name in ("Backend", "Steps"):
        for node in classes[name]:
            for member in names_in(node):
                if not member.startswith("__"):
                    yield f"{name}.{member}"
    ops = [node.target.id for node in classes["Kernels"]
           if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    [given] = (node for node in body
               if isinstance(node, ast.FunctionDef) and node.name == "for_decode_core")
    handed = []  # the keyword arguments of all its calls
    for node in ast.walk(given):
        if isinstance(node, ast.Call):
            handed += node.keywords
    yield from (f"Kernels.{name}" for name in ops)
    yield from (f"for_decode_core.{keyword.arg}" for keyword in handed)
    yield from imported(read, body, {each.value.id for each in handed if isinstance(each.value, ast.Name)})
    yield from imported(read, ast.parse(read(REFERENCES)).body)


def imported(read: Callable[[str], str], body: list[ast.stmt],
             wanted: set[str] | None = None) -> Iterator[str]:
    """The functions that a module imports, with their parameters; all, or those with `wanted` names."""
    for node in body:
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if wanted is not None:
                names &= wanted
            if names:
                yield from functions(read(f"{(node.module or '').replace('.', '/')}.py"), names)


def names_in(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a class defines: attributes, or a method with its parameters."""
    if isinstance(node, ast.FunctionDef):
        yield signature(node)
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    for target in filter(None, targets):
        yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))


def functions(text: str, names: set[str]) -> Iterator[str]:
    """The functions with these names, with their parameters. Only heads are parsed: all would take 20 ms."""
    head = r"^def (\w+)(\(.*?\))(?: ->[^\n]*)?:\n"
    for name, parameters in re.findall(head, text, re.MULTILINE | re.DOTALL):
        if name in names:
            [node] = ast.parse(f"def {name}{parameters}: ...").body
            assert isinstance(node, ast.FunctionDef)
            yield signature(node)


def signature(node: ast.FunctionDef) -> str:
    """Its name and parameters: * before keyword-only ones, = after those with a default."""
    given = node.args
    positional = [each.arg for each in (*given.posonlyargs, *given.args)]
    optional = {*positional[len(positional) - len(given.defaults):],
                *(each.arg for each, default in zip(given.kwonlyargs, given.kw_defaults) if default)}
    words = [*positional, *(f"*{each.arg}" for each in (*given.kwonlyargs, given.vararg) if each),
             *(f"**{each.arg}" for each in (given.kwarg,) if each)]
    return f"{node.name}({', '.join(word + '=' * (word.lstrip('*') in optional) for word in words)})"
