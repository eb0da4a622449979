"""What a linked library asks of the system that loads it: read from the library itself, as the linker wrote it."""

from __future__ import annotations

import re
import struct
from pathlib import Path

_VERSION_NEEDS = 0x6FFFFFFE  # SHT_GNU_verneed
_SECTION = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, address, offset, size, link, info, align, entry
_NEED = struct.Struct("<HHIII")  # version, count of names, library, first name, next need: byte offsets
_NAME = struct.Struct("<IHHII")  # hash, flags, version, name, next name


def least_glibc(library: Path) -> str:
    """The glibc that a library needs at least, "2.17": the highest version of any symbol that it takes. Empty: none.

    Format: "Linux Standard Base Core, Symbol Versioning".
    """
    data = library.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [_SECTION.unpack_from(data, table + number * size) for number in range(count)]
    found: set[tuple[int, ...]] = set()
    for section in sections:
        if section[1] == _VERSION_NEEDS:
            names = sections[section[6]][4]
            found |= {number for name in _names(data, section[4], names) if (number := _glibc(name))}
    return ".".join(map(str, max(found, default=())))


def _names(data: bytes, start: int, names: int) -> list[str]:
    found, need = [], start
    while True:
        _, count, _, first, following = _NEED.unpack_from(data, need)
        name = need + first
        for _ in range(count):
            *_, text, step = _NAME.unpack_from(data, name)
            end = data.index(b"\0", names + text)
            found.append(data[names + text : end].decode("ascii", "replace"))
            name += step
        if following == 0:
            return found
        need += following


def _glibc(name: str) -> tuple[int, ...]:
    if name == "GLIBC_ABI_DT_RELR":  # of relocations that are packed
        return (2, 36)
    matched = re.fullmatch(r"GLIBC_([0-9]+(\.[0-9]+)+)", name)
    return tuple(map(int, matched.group(1).split("."))) if matched else ()
