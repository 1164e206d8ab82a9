"""When is a number still valid? A run's key is a hash of plain data: code, configuration, data, seed, device.

Code counts as the set of project modules that the run can reach by import, each as its syntax tree without
comments and docstrings: editing a comment makes nothing stale, editing a function only what uses it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

#: reached by import, but without influence on a number
WITHOUT_INFLUENCE = {
    "cryobench.errors",
    "cryobench.paths",
    "cryobench.specimens.manifest",
    "cryobench.specimens.fetch",
    "cryobench.bench.tables",
    "cryobench.methods.flops",
}


#: it imports methods by their place in a folder, which no import statement shows
REGISTRY = "cryobench.methods.registry"


def digest(value: Any) -> str:
    """sha256 of plain data in canonical JSON: independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def code_hashes(*modules: str) -> dict[str, str]:
    """Hash per module for the given modules and all they import from their own package."""
    found: dict[str, str] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name in found or name in WITHOUT_INFLUENCE:
            continue
        path = _file(name)
        if path is None:
            continue
        found[name], imports = _read(path, name)
        todo.extend(imports)
    return dict(sorted(found.items()))


def notebook_hash(path: Path) -> str:
    """Hash of a notebook's code cells; its prose may change without making a result stale."""
    cells = json.loads(path.read_text())["cells"]
    return digest(["".join(c["source"]) for c in cells if c["cell_type"] == "code"])


def notebook_code(path: Path) -> dict[str, str]:
    """Hashes of the package's modules that a notebook can reach by import, or by name in the registry of methods."""
    cells = json.loads(path.read_text())["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    modules = {m for m in _imports(ast.parse(source)) if m.startswith("cryobench")}
    if REGISTRY in modules:
        folder = Path(__file__).parents[1] / "methods"
        modules |= {f"cryobench.methods.{file.stem}" for file in folder.glob("*.py") if file.stem != "__init__"}
    return code_hashes(*sorted(modules))


@cache
def _file(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@cache
def _read(path: Path, name: str) -> tuple[str, tuple[str, ...]]:
    tree = ast.parse(path.read_text())
    package = name.split(".")[0]
    imports = tuple(sorted({m for m in _imports(tree) if m.split(".")[0] == package}))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return hashlib.sha256(_text(tree).encode()).hexdigest(), imports


def _text(node: Any) -> str:
    """A syntax tree as text that is the same under every version of Python; that of ast.dump is not."""
    if isinstance(node, list):
        return f"[{', '.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.JoinedStr):  # Python 3.12 adds empty strings to formats as of f"{x:<{n}}"
        node.values = [v for v in node.values if not (isinstance(v, ast.Constant) and v.value == "")]
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({', '.join(f'{name}={_text(value)}' for name, value in fields)})"


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            # `from package import module` names a module too
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
