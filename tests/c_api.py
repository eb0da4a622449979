"""The structs of llmc.h as ctypes has them, for tests that call an artifact as a C program does."""

from __future__ import annotations

import ctypes
from pathlib import Path

I64, TEXT = ctypes.c_int64, ctypes.c_char_p


def struct(*fields: tuple[str, object]) -> type[ctypes.Structure]:
    """A ctypes struct of (name, type) pairs."""
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


Layer = struct(*((name, I64) for name in ("kv_heads", "head_dim", "value_dim", "element_bytes", "window")))
Feature = struct(("name", TEXT), ("flag", TEXT))
Output = struct(("name", TEXT), ("dtype", TEXT), ("per", I64), ("elements", I64))
Adapted = struct(("inputs", I64), ("outputs", I64), ("parts", I64))
AdapterTable = struct(("ranks", ctypes.c_void_p), ("a", ctypes.c_void_p), ("b", ctypes.c_void_p))
NUMBERS = (
    "bytes", "task", "state", "vocabulary", "max_context", "max_step", "page", "tile", "max_splits", "part",
    "row_kinds", "arena_bytes", "weights_bytes", "tile_registers",
)  # fmt: skip
LISTS = (("feature", Feature), ("layer", Layer), ("regime", I64), ("failure", TEXT), ("output", Output))
Facts = struct(
    *((name, I64) for name in NUMBERS),
    ("architecture", TEXT),
    *(
        field
        for name, kind in LISTS
        for field in ((f"{name}_count", I64), (f"{name}s", ctypes.POINTER(kind)))  # type: ignore[arg-type]
    ),
    ("encoder_output", I64),
    ("max_tokens", I64),
    ("adapter_count", I64),
    ("adapter_rank", I64),
    ("adapter_table_count", I64),
    ("adapter_tables", ctypes.POINTER(Adapted)),
)
Options = struct(("bytes", I64), ("threads", I64), ("cache_bytes", I64), ("weights", TEXT), ("copy_weights", I64))
Sampling = struct(
    ("bytes", I64), ("temperature", ctypes.c_double), ("top_k", I64), ("top_p", ctypes.c_double),
    ("min_p", ctypes.c_double), ("repetition_penalty", ctypes.c_double), ("random", ctypes.POINTER(ctypes.c_uint64)),
)  # fmt: skip
POINTER, INT = ctypes.c_void_p, ctypes.c_int
_OUT = ctypes.POINTER(POINTER)
_FUNCTIONS = {
    "error": (TEXT,),
    "open": (INT, TEXT, ctypes.POINTER(Options), _OUT),
    "close": (None, POINTER),
    "sequence": (INT, POINTER, I64, _OUT),
    "fork": (INT, POINTER, _OUT),
    "end": (None, POINTER),
    "length": (I64, POINTER),
    "feed": (INT, POINTER, POINTER, I64),
    "feed_all": (INT, POINTER, POINTER, POINTER, I64),
    "rollback": (INT, POINTER, I64),
    "next": (INT, POINTER, ctypes.POINTER(Sampling), ctypes.POINTER(ctypes.c_int32)),
    "logits": (POINTER, POINTER),
    "encode": (INT, POINTER, POINTER, POINTER, I64, POINTER),
    "adopt": (INT, POINTER, POINTER, I64, ctypes.POINTER(I64)),
    "load_adapter": (INT, POINTER, I64, POINTER),
    "unload_adapter": (INT, POINTER, I64),
    "adapt": (INT, POINTER, I64),
}
Api = struct(
    ("bytes", I64),
    ("facts", ctypes.POINTER(Facts)),
    *((name, ctypes.CFUNCTYPE(*types)) for name, types in _FUNCTIONS.items()),
)


def table(path: Path) -> ctypes.Structure:
    """The functions of an artifact."""
    get = ctypes.CDLL(str(path)).llmc_api
    get.argtypes, get.restype = [I64], ctypes.POINTER(Api)
    found = get(1)
    assert found
    return found.contents  # type: ignore[no-any-return]


def listed(facts: ctypes.Structure, name: str) -> list[object]:
    """One of the lists of an artifact's facts."""
    return getattr(facts, f"{name}s")[: getattr(facts, f"{name}_count")]  # type: ignore[no-any-return]
