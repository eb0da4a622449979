"""llmc compiles a transformer ahead of time into one shared library, and generates text from it.

    import llmc
    model = llmc.from_hf("path/to/model", dtype="int4")    # compiles once, then loads from a cache
    print(model.generate("def fibonacci("))

    from llmc import Runtime                                # needs no compiler, no torch and no TVM
    print(Runtime.load("model.so").generate("def fibonacci("))

Names are loaded when they are first used, so that the runtime does not pull in the compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmc.api import compile, from_hf, quantize
    from llmc.errors import LlmcError
    from llmc.runtime.runtime import Runtime

    __version__: str

__all__ = ["LlmcError", "Runtime", "__version__", "compile", "from_hf", "quantize"]

_HOMES = {
    "LlmcError": "llmc.errors",
    "Runtime": "llmc.runtime.runtime",
    "compile": "llmc.api",
    "from_hf": "llmc.api",
    "quantize": "llmc.api",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: object = version("llmc")
        except PackageNotFoundError:  # a source tree that is on the path but not installed
            value = "unknown"
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
