"""What kernels move vectors by: nothing past a tail is touched, conversions round as they say, sums are trees."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from kernel_harness import Compiled, aligned
from x86_machines import machines_of

from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.cpu.vectors import add, as_f32, for_pieces, load, maximum, range_kernel, reduce, store
from llmc.targets.kernel import kernel
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

MACHINES = machines_of("avx2", "avx512vnni")


def move(machine: Machine, *, dtype: str, count: int, masked: bool) -> PrimFunc:
    """out[begin:] = x[begin:], `count` elements: by masks, or by halves."""
    lanes = isa_for(machine).lanes

    def unit(a: SimpleNamespace, u: Expr) -> None:
        if masked:
            store(a.out, u, load(a.x, u, lanes, count), count)
        else:
            for_pieces(count, lanes, lambda i, width: store(a.out, u + i, load(a.x, u + i, width)))

    return range_kernel([("x", dtype), ("out", dtype)], [], unit)


@contextmanager
def page_with_an_end() -> Iterator[np.ndarray]:
    """A page of memory, before one that may not be touched."""
    size = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * size)
    page = np.frombuffer(memory, np.uint8, size)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    second = ctypes.c_void_p(page.ctypes.data + size)
    assert protect(second, ctypes.c_size_t(size), 0) == 0
    yield page
    assert protect(second, ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("count", [0, 1, 7, 8, 15, 16])
@pytest.mark.parametrize("masked", [True, False], ids=["masks", "halves"])
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@pytest.mark.parametrize("machine", MACHINES)
def test_nothing_past_a_tail_is_read_or_written(machine: Machine, dtype: str, masked: bool, count: int) -> None:
    """A read past the end ends the process; what lies before the first element stays as it was."""
    if masked and count > isa_for(machine).lanes:
        return
    run = Compiled(kernel(move, machine.key, dtype=dtype, count=count, masked=masked), machine)
    with page_with_an_end() as source, page_with_an_end() as target:
        x, out = source.view(dtype), target.view(dtype)
        x[...] = np.arange(1, len(x) + 1) % 999
        out[...] = 0
        begin = len(x) - count
        run(x, out, begin, begin + 1)
        assert (out[begin:] == x[begin:]).all() and not out[:begin].any()


def convert(machine: Machine, *, source: str, target: str) -> PrimFunc:
    lanes = isa_for(machine).lanes
    return range_kernel(
        [("x", source), ("out", target)], [], lambda a, u: store(a.out, u * lanes, as_f32(load(a.x, u * lanes, lanes)))
    )


@pytest.mark.parametrize("machine", MACHINES)
def test_floats_become_f32_exactly_and_are_rounded_to_even(machine: Machine) -> None:
    """Every f16 and bf16 that is a number, and numbers half way between two f16."""
    every = aligned(np.arange(1 << 16, dtype=np.uint16))
    for source, wide in (("float16", every.view(np.float16)), ("uint16", every.view(ml_dtypes.bfloat16))):
        x, out = every.view(source), aligned(np.zeros(1 << 16, np.float32))
        run = Compiled(kernel(convert, machine.key, source=source, target="float32"), machine)
        run(x, out, 0, len(x) // isa_for(machine).lanes)
        np.testing.assert_array_equal(out, wide.astype(np.float32))
    halves = every.view(np.float16)[:0x7BFF]  # finite, and so is the next one
    ties = np.zeros(1 << 15, np.float32)
    ties[: len(halves)] = (halves.astype(np.float32) + every.view(np.float16)[1:0x7C00].astype(np.float32)) / 2
    out16 = aligned(np.zeros(1 << 15, np.float16))
    run = Compiled(kernel(convert, machine.key, source="float32", target="float16"), machine)
    run(aligned(ties), out16, 0, len(ties) // isa_for(machine).lanes)
    np.testing.assert_array_equal(out16, ties.astype(np.float16))


def reduced(machine: Machine, *, dtype: str, kind: str) -> PrimFunc:
    """out[u] = a vector of x, reduced."""
    lanes = isa_for(machine).lanes
    combine = {"add": add, "maximum": maximum}[kind]

    def unit(a: SimpleNamespace, u: Expr) -> None:
        store(a.out, u, reduce(load(a.x, u * lanes, lanes), combine))

    return range_kernel([("x", dtype), ("out", dtype)], [], unit)


@pytest.mark.parametrize("kind", ["add", "maximum"])
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint32"])
@pytest.mark.parametrize("machine", MACHINES)
def test_vectors_are_reduced_by_halves(machine: Machine, dtype: str, kind: str) -> None:
    """To the bit: the order of a float's additions is fixed, and integers wrap around."""
    lanes, rng = isa_for(machine).lanes, np.random.default_rng(0)
    x = rng.standard_normal((31, lanes)).astype("f4") if dtype == "float32" else rng.integers(0, 1 << 32, (31, lanes))
    x = aligned(x.astype(np.float32) if dtype == "float32" else x.astype(np.uint32).view(dtype))
    out = aligned(np.zeros(31, dtype))
    Compiled(kernel(reduced, machine.key, dtype=dtype, kind=kind), machine)(x, out, 0, 31)
    combine, expected = {"add": np.add, "maximum": np.maximum}[kind], x
    while expected.shape[1] > 1:
        half = expected.shape[1] // 2
        expected = combine(expected[:, :half], expected[:, half:])
    np.testing.assert_array_equal(out, expected[:, 0])


def test_what_is_stored_has_the_dtype_of_the_buffer() -> None:
    """But floats, which are rounded: an integer that was cut off without a word would be hard to find."""

    def unit(a: SimpleNamespace, u: Expr) -> None:
        store(a.out, u, u)

    with pytest.raises(TypeError, match=r"int64 .* int32"):
        range_kernel([("out", "int32")], [], unit)
