"""Which source files decide what a module does: its own, and those of everything of llmc's that it imports.

Found by reading import statements, wherever they stand: a template may import in a function. What stands under
`if TYPE_CHECKING:` never runs. Packages run when a module in them is imported, so they count, with what they import
then; what their functions import counts where the package itself is imported.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = "llmc"

# The source file of a module by its name; None where there is none.
Locate = Callable[[str], "Path | None"]

# Where statements stand in others. No expression has any, and expressions are nearly all of a tree.
_BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")


@functools.cache
def locate(name: str) -> Path | None:
    """The source file that a module was imported from, or would be."""
    if name in sys.modules:
        known = getattr(sys.modules[name], "__file__", None)
        return Path(known) if known is not None else None
    found = importlib.util.find_spec(name)
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


def closure(name: str, locate: Locate = locate) -> dict[str, Path]:
    """The modules that importing `name` and calling what is in it may import, with their files: its own, and llmc's."""
    found: dict[str, Path] = {}
    whole: dict[str, bool] = {}  # whether its functions count
    waiting = [(name, True)]
    while waiting:
        module, called = waiting.pop()
        if module in whole and whole[module] >= called:
            continue
        path = _find(module, locate)
        if path is None:
            continue
        found[module], whole[module] = path, called
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for imported in _imports(path.read_bytes(), package, called):
            waiting += [(imported, True), *((around, False) for around in _packages(imported))]
        waiting += [(around, False) for around in _packages(module)]
    return found


@functools.cache
def closure_hash(name: str, locate: Locate = locate) -> str:
    """Changes when a source file of the module's closure does; another one every time where it has none."""
    found = closure(name, locate)
    digest = hashlib.sha256(b"" if name in found else os.urandom(32))
    for module, path in sorted(found.items()):
        digest.update(f"{module}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def _find(module: str, locate: Locate) -> Path | None:
    """A module's source file; None for a name in a module, not in a package."""
    around = module.rpartition(".")[0]
    parent = locate(around) if around else None
    return None if around and (parent is None or parent.name != "__init__.py") else locate(module)


def _packages(module: str) -> list[str]:
    """The packages around a module, where they are llmc's."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))] if parts[0] == ROOT else []


@functools.cache
def _imports(source: bytes, package: str, functions: bool) -> list[str]:
    """Names of llmc's that may be modules: what a module imports, or takes from one; within functions too, or not."""
    names: list[str] = []
    for node in _running(ast.parse(source), functions):
        if isinstance(node, ast.Import):  # `import a.b` makes a known by its name
            names += [name for alias in node.names for name in (alias.name, *_packages(alias.name))]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] == ROOT]


def _running(node: ast.AST, functions: bool) -> Iterator[ast.AST]:
    """A tree's statements but those of `if TYPE_CHECKING:`; and of functions, unless they count."""
    yield node
    for name in _BLOCKS:
        for child in getattr(node, name, ()):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                for other in child.orelse:
                    yield from _running(other, functions)
            elif functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _running(child, functions)
