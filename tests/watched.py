"""Steps of a runtime that go through a test's own function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llmc.runtime.library import Step
from llmc.runtime.runtime import Runtime

Run = Callable[[Step], None]


def watch(runtime: Runtime, make: Callable[[Run], Run]) -> Run:
    """From now on every step is run by make(what ran them before), which is returned."""
    own = runtime.device.run
    runtime.device.run = make(own)  # type: ignore[method-assign]
    runtime.device.in_process = False  # the artifact's code runs none by itself
    return own


@contextmanager
def watching(runtime: Runtime, make: Callable[[Run], Run]) -> Iterator[None]:
    """`watch`, for a while."""
    device = runtime.device
    in_process, own = device.in_process, watch(runtime, make)
    try:
        yield
    finally:
        device.run, device.in_process = own, in_process  # type: ignore[method-assign]
