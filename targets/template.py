"""Templates: how a kernel is written, with the numbers that may be chosen as fields.

A kernel comes of three things. The *problem* says what it computes (sizes, dtypes, what else is fused) and is a fact of
the op. The *template* is a way to write it, and its fields are *knobs*: block sizes, independent chains, distances of
prefetches. The machine says which of them can be. What knobs may be together is the template's *space* for a problem on
a machine, which can be counted and walked through, and one member of it is the default.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from llmc.targets.kernel import Kernel, Param

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc
    from typing_extensions import Self

    from llmc.targets.machine import Machine

Rows = tuple[int, "int | None"]
"""The least and the greatest number of rows of a step that a kernel is called for; None: no limit."""

ANY_ROWS: Rows = (0, None)


@dataclass(frozen=True)
class Problem:
    """What a kernel computes: a frozen dataclass whose fields are `Param`s, in the order in which people read them."""

    def params(self) -> dict[str, Param]:
        """Its fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


P = TypeVar("P", bound=Problem)


def knob(*values: int, exact: bool = True, code: bool = True) -> int:
    """A field of a template that may be one of `values`.

    exact: every value gives the same bits. code: the kernel's code depends on it; what only its calls depend on, such
    as how many units are worth a thread, is no parameter of the kernel, and no reason to refuse one.
    """
    if not values or list(values) != sorted(set(values)):
        raise ValueError(f"a knob's values are several numbers in order, not {values}")
    field: int = dataclasses.field(metadata={"values": values, "exact": exact, "code": code})
    return field


@dataclass(frozen=True)
class Template(ABC, Generic[P]):
    """A way to write a kernel for problems of one kind. To use one, a rule says

        problem = NormProblem(kind="rms", features=512, eps=1e-5)
        norm = context.choose(Norm, problem)  # rows=(2, 4) where it is called for 2 to 4 rows only
        if isinstance(norm, str):
            return norm  # why no such kernel can be, for `llmc explain`
        call = Call(norm.kernel(problem, context.machine), args, units, norm.grain(problem))

    To write one, derive a frozen dataclass with a name for its kernels, and fields that are `knob`s (none, if there is
    nothing to choose). Knobs and fields of the problem have different names: together they are the kernel's parameters,
    its symbol's hash and its object file's name in the cache, so that a body reads no number that somebody may want to
    tune from elsewhere.

        @dataclass(frozen=True)
        class Norm(CpuTemplate[NormProblem], name="norm"):
            chains: int = knob(1, 2, 4, 8, exact=False)  # the order of additions depends on it

            @classmethod
            def default(cls, problem, machine, rows=ANY_ROWS): return cls(chains=4)
            def refuse(self, problem, machine): return super().refuse(problem, machine) or "why not, in a line"
            def stack_bytes(self, problem, machine): ...
            def build(self, problem, machine): ...  # the PrimFunc; the only method that imports tvm

    `version` goes up when an old choice of knobs no longer means the same. A row has the same bits in any company
    (docs/adr/0017), so that knobs that are not exact have one default whatever the rows.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1

    def __init_subclass__(cls, *, name: str = "", **others: object) -> None:
        super().__init_subclass__(**others)
        cls.name = name

    @classmethod
    @abstractmethod
    def default(cls, problem: P, machine: Machine, rows: Rows = ANY_ROWS) -> Self:
        """What is taken while nothing was measured: a member of the space, wherever that has one."""

    def refuse(self, problem: P, machine: Machine) -> str:
        """Why these knobs, or any, make no kernel for the problem on the machine, in one line; empty: they do."""
        for field in knobs(type(self)):
            value = getattr(self, field.name)
            if value not in field.values:
                return f"{field.name} is one of {', '.join(map(str, field.values))}, not {value}"
        return ""

    @abstractmethod
    def stack_bytes(self, problem: P, machine: Machine) -> int:
        """Bytes of a thread's stack that a kernel takes, registers that arrays become included: no less than it is."""

    def grain(self, problem: P) -> int:
        """The fewest work units that are worth giving to a thread."""
        return 1

    @abstractmethod
    def build(self, problem: P, machine: Machine) -> PrimFunc:
        """The kernel's code."""

    def kernel(self, problem: P, machine: Machine) -> Kernel:
        """The kernel of these knobs. Its parameters are the problem's and the knobs that its code depends on."""
        given = problem.params() | {field.name: getattr(self, field.name) for field in knobs(type(self)) if field.code}
        return Kernel(self, tuple(sorted(given.items())), machine.key, problem)


T = TypeVar("T", bound=Template)  # type: ignore[type-arg]  # of any kind of problem


@dataclass(frozen=True)
class Chooser:
    """Who says how kernels are written for a machine."""

    machine: Machine

    def choose(self, template: type[T], problem: Problem, rows: Rows = ANY_ROWS) -> T | str:
        """How to write a kernel for a problem, where it is called for so many rows; or why the template cannot."""
        chosen: T = template.default(problem, self.machine, rows)
        return chosen.refuse(problem, self.machine) or chosen


@dataclass(frozen=True)
class Knob:
    """One field of a template; see `knob`."""

    name: str
    values: tuple[int, ...]
    exact: bool
    code: bool


@functools.cache
def knobs(template: type[Template[P]]) -> tuple[Knob, ...]:
    """A template's knobs, in the order of its fields."""
    return tuple(Knob(field.name, **field.metadata) for field in dataclasses.fields(template))


def is_exact(template: type[Template[P]]) -> bool:
    """Whether every member of a space gives the same bits."""
    return all(field.exact for field in knobs(template))


def space(template: type[T], problem: Problem, machine: Machine) -> Iterator[T]:
    """Every way to write a kernel for the problem with this template, in order of the knobs' values."""
    legal = frozenset(_legal(template, problem, machine))
    of_code = [field.code for field in knobs(template)]
    for values in itertools.product(*(field.values for field in knobs(template))):
        if tuple(itertools.compress(values, of_code)) in legal:
            yield template(*values)


def count(template: type[T], problem: Problem, machine: Machine) -> int:
    """How many members a space has."""
    free = math.prod(len(field.values) for field in knobs(template) if not field.code)
    return free * len(_legal(template, problem, machine))


@functools.lru_cache(maxsize=1024)
def _legal(template: type[T], problem: Problem, machine: Machine) -> tuple[tuple[int, ...], ...]:
    """What the knobs that the code depends on may be together: the others are no reason to refuse a kernel."""
    choices = [field.values if field.code else field.values[:1] for field in knobs(template)]
    members = (template(*values) for values in itertools.product(*choices))
    legal = (member for member in members if not member.refuse(problem, machine))
    return tuple(tuple(getattr(m, field.name) for field in knobs(template) if field.code) for m in legal)


def describe_space(kernel: Kernel, machine: Machine) -> dict[str, object] | None:
    """What `llmc explain --space` says of a kernel; None where its template has no knobs declared.

    legal: how many members its space has. exact: whether they all give the same bits. knobs: the value of each, whether
    it changes no bits, and all values that it has somewhere in the space.
    """
    template, problem = kernel.template, kernel.problem
    if not isinstance(template, Template) or problem is None:
        return None
    legal = _legal(type(template), problem, machine)
    columns = iter(zip(*legal, strict=True) if legal else itertools.repeat(()))  # of the knobs that the code depends on
    return {
        "version": template.version,
        "legal": count(type(template), problem, machine),
        "exact": is_exact(type(template)),
        "knobs": {
            field.name: {
                "value": getattr(template, field.name),
                "exact": field.exact,
                "values": sorted(set(next(columns))) if field.code else list(field.values if legal else ()),
            }
            for field in knobs(type(template))
        },
    }
