"""What a target is: a folder of `targets/` with a module `target`, which has the names of this interface.

`llmc.targets` finds the folders by themselves and knows none by name. A target that builds on `targets/cpu` has three
more modules, see docs/contributing.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import llmc.targets
from llmc.compiler.progress import Progress
from llmc.errors import CompileError
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from llmc.compiler.ir.op import Value
    from llmc.targets.lowering import Program, Rules
    from llmc.targets.memory import Plan
    from llmc.targets.step_limits import StepLimits


@dataclass(frozen=True)
class Addresses:
    """Where everything lies: the arena plan, weights by key, caches by graph input.

    task: what kind of graph it is (`frontends/lifted.py`), which decides what its inputs, outputs and sizes are in
    runtime/csrc/step.h: "generate" has `logits`, "encode" has `outputs`, "run" has `inputs`, `outputs` and `dims`.
    limits: what a step is checked for before it runs. manifest: what the artifact says of itself, as far as it is known
    before it is linked.
    """

    plan: Plan
    weights: Mapping[object, int]
    caches: Mapping[Value, int]
    task: str
    limits: StepLimits
    manifest: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Library:
    """The loadable part of an artifact: its path, what each profile slot measures, and the driver's source.

    costs, limits: what calls cost, and the functions that measure the machine's limits, as the manifest has them.
    glibc: what the system that loads it has at least, "2.17"; empty: it asks for none.
    """

    path: Path
    calls: list[str]
    source: str
    costs: list[dict[str, object]]
    limits: list[dict[str, object]]
    glibc: str = ""


class Target(Protocol):
    """The module `target` of a folder: functions of these names."""

    def architecture(self) -> str:
        """What the system calls the processors that it is for (`runtime/cpu.py`): "x86_64", "aarch64", ..."""

    def device(self) -> str:
        """The kind of device that runs its steps: a name of `runtime/devices.py`."""

    def names(self) -> list[str]:
        """Its machines' names; no other target has one of them."""

    def machine(self, name: str) -> Machine:
        """One of them."""

    def native(self) -> Machine | None:
        """This computer, None where it is of another kind. CompileError where it is, but lacks what kernels need."""

    def rules(self) -> Rules:
        """Which kernels serve which op."""

    def check_tools(self, machine: Machine) -> object:
        """CompileError where a tool is missing that `build_library` takes."""

    def build_library(
        self, program: Program, addresses: Addresses, cache: Path, folder: Path, progress: Progress, jobs: int = 1
    ) -> Library:
        """Compile a program's kernels, but for those that `cache` has, and link them with a driver, in `folder`."""


def target_named(folder: str) -> Target:
    """The target in a folder."""
    found: Target = importlib.import_module(f"llmc.targets.{folder}.target")
    return found


def all_targets() -> list[Target]:
    """Every target that there is, by folder."""
    folders = sorted(each.name for each in pkgutil.iter_modules(llmc.targets.__path__) if each.ispkg)
    return [target_named(name) for name in folders if importlib.util.find_spec(f"llmc.targets.{name}.target")]


def find_machine(name: str) -> Machine:
    """A machine by name, `native` for this one. CompileError lists the names."""
    targets = all_targets()
    if name == "native":
        found = next((machine for target in targets if (machine := target.native()) is not None), None)
        if found is None:
            raise CompileError("no target is for this computer; compile for another machine with --target")
        return found
    target = next((target for target in targets if name in target.names()), None)
    if target is None:
        raise CompileError(f"unknown target {name!r}; known: {', '.join(all_names())}")
    return target.machine(name)


def all_names() -> list[str]:
    """Every name that `find_machine` takes."""
    return ["native", *(name for target in all_targets() for name in target.names())]
