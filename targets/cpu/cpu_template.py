"""Templates of CPU kernels: what they take of a thread's stack is bounded."""

from __future__ import annotations

from llmc.targets.cpu.stack import ARRAY_ALIGNMENT, refuse_stack
from llmc.targets.machine import Machine
from llmc.targets.template import P, Template

SCALARS = 6 << 10  # bytes of stack for a kernel's indices and single numbers, whatever its problem is


class CpuTemplate(Template[P]):
    """A template whose kernels take no more of the stack than every thread has."""

    def refuse(self, problem: P, machine: Machine) -> str:
        return super().refuse(problem, machine) or refuse_stack(self.stack_bytes(problem, machine))

    def stack_bytes(self, problem: P, machine: Machine) -> int:
        return SCALARS


def few(work: int | None, least: int) -> int:
    """How many units of `work` elements each make `least`; None: of a size that is not known when compiling."""
    return max(1, least // (1024 if work is None else max(1, work)))


def arrays(*nbytes: int) -> int:
    """Bytes of stack of arrays of so many bytes each, and of scalars."""
    return sum(-(-each // ARRAY_ALIGNMENT) * ARRAY_ALIGNMENT for each in nbytes) + SCALARS
