"""What a kernel is: a plain C function over a range of work units, built lazily from a TIR template.

Every kernel has the C signature

    void SYMBOL(T0 *p0, ..., Tn *pn, int64_t s0, ..., int64_t sm, int64_t begin, int64_t end)

pointers first, then sizes, then the half-open range of *work units* it must do. Units are independent of each other,
so the step driver may hand any split of [0, units) to any thread, in any order. A kernel never allocates, never calls
out, and never starts threads. Buffers are 64-byte aligned at their start; rows inside need not be.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

    from llmc.targets.machine import Machine
    from llmc.targets.template import Problem, Template

Param = int | float | str | bool | tuple["Param", ...] | None


@dataclass(frozen=True)
class Kernel:
    """One kernel instance: a template and the parameters that specialise it.

    template: a `Template` (targets/template.py), whose parameters are the problem's fields and its own knobs; or, where
    there is no problem, a function: `template(machine, **params)` returns the TIR PrimFunc. Either is called only when
    the kernel is not in the cache, so creating a `Kernel` imports no tvm. The symbol is derived from the template's
    name and the parameters.
    """

    template: Callable[..., PrimFunc] | Template[Any]
    params: tuple[tuple[str, Param], ...] = ()
    machine_key: str = ""
    problem: Problem | None = None

    def build(self, machine: Machine) -> PrimFunc:
        """The kernel's code."""
        if self.problem is not None:
            return self.template.build(self.problem, machine)  # type: ignore[union-attr]
        return self.template(machine, **dict(self.params))  # type: ignore[operator]

    @property
    def name(self) -> str:
        name: str = self.template.__name__ if self.problem is None else self.template.name  # type: ignore[union-attr]
        return name

    @property
    def modules(self) -> tuple[str, ...]:
        """Where the template is written, and the problem: what else decides about the code, these import."""
        if self.problem is None:
            return (self.template.__module__,)
        return tuple(dict.fromkeys(type(item).__module__ for item in (self.template, self.problem)))

    @property
    def symbol(self) -> str:
        """A C identifier, unique for (template, parameters, machine)."""
        text = json.dumps([self.modules[0], self.name, self.params, self.machine_key])
        return f"llmc_{self.name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def describe(self) -> str:
        """`name(param=value, ...)`, for people."""
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.params)})"

    def parameters(self) -> list[str]:
        """`n=512`, `k=256`, `symmetric`, ...: in the order of the problem's fields and then of the knobs, or of the
        template's signature, without what is switched off: False, None, 0 and "none"."""
        given = dict(self.params)
        if self.problem is None:
            names = list(inspect.signature(self.template).parameters)  # type: ignore[arg-type]
        else:
            names = [field.name for item in (self.problem, self.template) for field in dataclasses.fields(item)]  # type: ignore[arg-type]
        known = [name for name in names if name in given]
        names = [*known, *(name for name in given if name not in known)]
        return [
            name if given[name] is True else f"{name}={given[name]}"
            for name in names
            if given[name] and given[name] != "none"
        ]


def kernel(template: Callable[..., PrimFunc], machine_key: str, **params: Param) -> Kernel:
    """A `Kernel` with its parameters in canonical order."""
    return Kernel(template, tuple(sorted(params.items())), machine_key)


@dataclass(frozen=True)
class Range:
    """A guard: the call runs only while `low <= symbol <= high` (`high` None: no upper limit)."""

    symbol: str
    low: int = 0
    high: int | None = None


@dataclass(frozen=True)
class Scratch:
    """A temporary of `size` elements of `dtype` that lives during one op; shared by name among the op's calls."""

    name: str
    dtype: str
    size: object  # Dim: a polynomial over the step's symbols


FAILED = Scratch("failed", "i32", 1)
"""Where a kernel that can fail says so: see `Call.failure`."""


@dataclass(frozen=True)
class Workspace:
    """Memory that each thread has for itself, `nbytes` at least, 64-byte aligned; a call finds anything in it."""

    nbytes: int


DEFAULT_FORMULA = "default formula"
"""The origin of a kernel whose parameters follow from the op and the machine, with nothing measured."""


@dataclass(frozen=True)
class CachePart:
    """The "keys" or "values" buffer of a KV cache value."""

    value: object
    part: str


@dataclass(frozen=True)
class Needed:
    """What unit u of a call needs of what `op` writes: of columns of its rows, from first + u * count on `count`, for
    each (first, count) of `columns`; where there are none, what unit u of the op's call writes."""

    op: object
    columns: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Joined:
    """That a call may run in one loop with calls right before it, whose ops `needs` names, the nearest first: while
    `when` holds its units need no more of them than that.

    A thread that has just written something reads it from its own cache, and a loop costs threads a meeting.
    """

    needs: tuple[Needed, ...]
    when: tuple[Range, ...]


@dataclass(frozen=True)
class Call:
    """One kernel call in the step driver.

    args: in the kernel's parameter order. Each is a `compiler.ir` Value (an operand of the op being lowered: passed as
    its buffer's address), the string "result" (the op's result buffer), a `CachePart`, a `Scratch`, a `Workspace`, a
    `Packed` weight, or a Dim (passed as int64). A scratch whose name starts with "@" belongs to a value, not to this op
    alone, and lives as long as that value's readers.
    units: Dim, number of independent work units. grain: the fewest units worth handing to a thread.
    origin: where the kernel's parameters come from: the formulas of its rule, unless the rule says otherwise.
    columns: of the result's rows, that a unit computes: unit u those from u * columns on, fewer at the end. 0: units
    are otherwise.
    failure: what an error says where the kernel has set the first element of its scratch `FAILED`, an i32 that is 0
    before the call; the step then ends. Empty: the call cannot fail.
    """

    kernel: Kernel
    args: tuple[object, ...]
    units: object
    grain: int = 1
    when: tuple[Range, ...] = ()
    note: str = ""
    # For profiles. bytes_moved: Dim, bytes that must come from memory: weights, and keys and values of the context;
    # activations do not count. operations: Dim, multiply-adds counted twice; arithmetic: on "int8", "bf16" or "f32".
    bytes_moved: object = 0
    operations: object = 0
    arithmetic: str = "f32"
    columns: int = 0
    failure: str = ""
    origin: str = DEFAULT_FORMULA
    joins: Joined | None = None


@dataclass(frozen=True)
class Packed:
    """A weight in the byte layout its kernel wants: one array of the layout applied to one compile-time operand.

    layout: a `Layout` from the target's layouts module; part: which of the arrays it yields ("data", "scales", ...).
    """

    weight: object  # Value, compile-time known
    layout: object
    part: str = field(default="data")
