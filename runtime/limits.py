"""Measures how fast this machine reads memory and multiplies, with the limit kernels of an artifact."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.bandwidth import buffer_bytes, cache_bytes, memory_bandwidth
from llmc.runtime.errors import ArtifactError
from llmc.runtime.manifest import LimitFacts
from llmc.runtime.memory import address, reserve

Run = Callable[[int, int, int, int], None]  # (input address, output address, begin, end)

_SECONDS = 0.3  # for each limit: the best round counts, as others share the machine
_ROUND_SECONDS = 0.02
_OUTPUT_BYTES = 4096  # a thread's own page


@dataclass(frozen=True)
class LimitFunction:
    """A limit kernel of a library that stays loaded. amount: bytes or operations of a work unit; input_bytes: read over
    and over, or 0."""

    name: str
    amount: int
    input_bytes: int
    run: Run


@dataclass(frozen=True)
class Limits:
    """What all threads together reach, in bytes and operations (a multiply-add is two) a second.

    None: the machine has no instruction for it, or the code was compiled without. The tile limits are a matrix unit's.
    cache_bytes: of the largest cache, 0 where the system shows none: what is smaller is not read from memory again.
    """

    threads: int
    read_bytes_per_second: float
    int8_ops_per_second: float | None = None
    f32_flops_per_second: float | None = None
    bf16_flops_per_second: float | None = None
    tile_int8_ops_per_second: float | None = None
    tile_bf16_flops_per_second: float | None = None
    cache_bytes: int = 0

    def peaks(self) -> dict[str, float]:
        """Operations a second of each way to multiply that was measured, by its name: "int8", "f32", "tile_int8" ..."""
        found = {name: getattr(self, field) for name, field in _FIELDS.items() if name != "read"}
        return {name: rate for name, rate in found.items() if rate is not None}

    def peak(self, arithmetic: str) -> float | None:
        """The most operations a second on numbers of one kind ("int8", "f32", "bf16"), by whatever unit does most."""
        rates = [rate for name, rate in self.peaks().items() if name.removeprefix("tile_") == arithmetic]
        return max(rates, default=None)


_FIELDS = {
    "read": "read_bytes_per_second",
    "int8": "int8_ops_per_second",
    "f32": "f32_flops_per_second",
    "bf16": "bf16_flops_per_second",
    "tile_int8": "tile_int8_ops_per_second",
    "tile_bf16": "tile_bf16_flops_per_second",
}


def load_functions(library: ctypes.CDLL, facts: Sequence[LimitFacts]) -> list[LimitFunction]:
    """The functions of a loaded library that `facts` tell of. Names that this runtime does not know are left out."""
    found = []
    for fact in facts:
        if fact.name not in _FIELDS:
            continue
        try:
            function = getattr(library, fact.symbol)
        except AttributeError as error:
            raise ArtifactError(
                f"the artifact lacks a limit kernel that it names: {error}. Compile it again"
            ) from error
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        found.append(LimitFunction(fact.name, fact.amount, fact.input_bytes, function))
    return found


def measure_limits(functions: Sequence[LimitFunction], threads: int) -> Limits:
    """Times each function on `threads` threads; memory with numpy where no function reads it."""
    rates = {_FIELDS[function.name]: measure_limit(function, threads) for function in functions}
    read = rates.pop(_FIELDS["read"], None)
    return Limits(threads, read or memory_bandwidth(threads), **rates, cache_bytes=cache_bytes())


def measure_limit(function: LimitFunction, threads: int, seconds: float = _SECONDS) -> float:
    """Bytes or operations a second of one limit: the best of as many rounds as fit into `seconds`, at least two."""
    nbytes = function.input_bytes or buffer_bytes() // function.amount * function.amount
    data = reserve(nbytes // 4 * 4, huge_pages=True).view(np.float32)
    data[:] = 1  # pages are really there, and no product is a denormal number, which would be slow
    output = reserve(threads * _OUTPUT_BYTES)
    units = nbytes // function.amount if not function.input_bytes else _units_for(function, data, output)
    best = 0.0
    rounds = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or rounds < 2:
        taken = _round(function, data, output, units, threads)
        done = units if not function.input_bytes else units * threads
        best = max(best, done * function.amount / taken)
        rounds += 1
    return best


def _units_for(function: LimitFunction, data: NDArray[np.float32], output: NDArray[np.generic]) -> int:
    """So many units that one thread is busy for about `_ROUND_SECONDS`."""
    units = 1024
    while True:
        start = time.perf_counter()
        function.run(address(data), address(output), 0, units)
        taken = time.perf_counter() - start
        if taken >= _ROUND_SECONDS / 4:
            return max(1, int(units * _ROUND_SECONDS / taken))
        units *= 4


def _round(
    function: LimitFunction, data: NDArray[np.float32], output: NDArray[np.generic], units: int, threads: int
) -> float:
    """Seconds of one round on all threads: a share of the input each, or `units` units of the same input each."""
    ranges = [(0, units)] * threads
    if not function.input_bytes:
        bounds = [units * i // threads for i in range(threads + 1)]
        ranges = list(itertools.pairwise(bounds))
    arguments = [
        (address(data), address(output) + i * _OUTPUT_BYTES, begin, end) for i, (begin, end) in enumerate(ranges)
    ]
    # All start together: a thread's own start takes as long as a small round.
    ready = threading.Barrier(threads)

    def work(index: int) -> None:
        ready.wait()
        function.run(*arguments[index])

    helpers = [threading.Thread(target=work, args=(index,)) for index in range(1, threads)]
    for helper in helpers:
        helper.start()
    ready.wait()
    start = time.perf_counter()
    function.run(*arguments[0])
    for helper in helpers:
        helper.join()
    return time.perf_counter() - start
