"""Changes llmc's code, one place at a time, and sees whether the tests notice: the changes are cosmic-ray's.

    python tests/mutation.py compiler/passes/cse.py --tests tests/test_golden.py tests/test_passes_basic_fold_cse.py
    python tests/mutation.py --all --share 0.1 --json build/mutation.json

The tests are run once to see which of them execute which lines. Then each mutant is put into a forked copy of this
process, where the tests that execute its line run, the quickest first, until one fails. A mutant that none of them
notices is printed: kill it with a test, or write down in tests/equivalent_mutants why it changes nothing
(`mutation_record.py` has the form). Not part of `make test`: all mutants take an hour or more.

Of the operators that could stand in a place instead, one is drawn by the seed. For what runs when a module is imported
(constants, fields of classes), llmc is imported again in the copy, and all tests run that execute a line of the module.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutation_record

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "compiler/ir",
    "compiler/passes",
    "frontends",
    "frontends/gguf",
    "frontends/gguf/architectures",
    "frontends/hf",
    "frontends/hf/stored",
    "frontends/onnx",
)
# Operators that mostly change nothing: `X | None` in annotations, which are not evaluated; `is` for `==` and the like;
# a decorator less, which is a cache less or an import that fails.
SKIPPED = re.compile(r"_BitOr_|RemoveDecorator|_(?!IsNot_)\w+_Is$|_(?!Is_)\w+_IsNot$|_(Is|IsNot)_(?!Is)")


@dataclass(frozen=True)
class Mutant:
    """A module with one change: a place where an operator of cosmic-ray can be used."""

    module: str
    operator: str
    occurrence: int
    line: int
    in_function: bool

    def text(self, tree: Any = None) -> str:
        """The module with the change; the module as it is if the operator finds nothing to change.

        tree: the module as parsed before, which is changed in place; None parses it, longer than most tests take.
        """
        from cosmic_ray.ast import get_ast
        from cosmic_ray.mutating import MutationVisitor
        from cosmic_ray.plugins import get_operator

        visitor = MutationVisitor(self.occurrence, get_operator(self.operator)())
        return str(visitor.walk(tree or get_ast((ROOT / self.module).read_text())).get_code())

    def verdict(self, outcome: str, tests: int) -> Verdict:
        """What became of it; the changed line is made again for those that were not killed only, as that takes time."""
        before = (ROOT / self.module).read_text().split("\n")[self.line - 1].strip()
        after = self.text().split("\n")[self.line - 1].strip() if outcome != "killed" else ""
        if outcome != "killed" and mutation_record.reason(known_equivalents(), self.module, before, after):
            outcome = "equivalent"
        return Verdict(self.module, self.line, self.operator.rpartition("/")[2], before, after, outcome, tests)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    "killed"; "survived"; "late" (no end in time); "unseen" (no test executes its line); "same code"; "equivalent"
    (not killed, and tests/equivalent_mutants says why).
    """

    module: str
    line: int
    operator: str
    before: str
    after: str
    outcome: str
    tests: int  # that were to run


@functools.cache
def known_equivalents() -> dict[tuple[str, str, str], str]:
    """Why mutants are equivalent, by module, line and line of the mutant."""
    return mutation_record.reasons(mutation_record.load())


def bodies_of(source: str) -> list[tuple[int, int]]:
    """First and last lines of the bodies of functions."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [(node.body[0].lineno, node.body[-1].end_lineno or 0) for node in functions]


def mutants_of(module: str, seed: int = 0) -> Iterator[Mutant]:
    """One mutant for each kind of operator at each place of a module."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / module).read_text()
    nodes, bodies = list(ast_nodes(get_ast(source))), bodies_of(source)
    choices: dict[tuple[tuple[int, int], str], list[tuple[str, int]]] = {}
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments() or SKIPPED.search(kind.__name__):
            continue
        operator = kind()
        starts = (start for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, start in enumerate(starts):
            choices.setdefault((start, kind.__name__.partition("_")[0]), []).append((name, occurrence))
    chance = random.Random(f"{seed} {module}")
    for ((line, _), _), found in sorted(choices.items()):
        name, occurrence = chance.choice(found)
        yield Mutant(module, name, occurrence, line, any(first <= line <= last for first, last in bodies))


def report(verdicts: Sequence[Verdict]) -> Iterable[str]:
    """What was not killed, then counts a module, then all."""
    for verdict in verdicts:
        if verdict.outcome not in ("killed", "equivalent"):
            yield f"{verdict.outcome}: {verdict.module}:{verdict.line} {verdict.operator}, {verdict.tests} tests"
            yield f"  - {verdict.before}\n  + {verdict.after}"
    for module in sorted({verdict.module for verdict in verdicts}):
        yield f"{module}: {counted(verdict for verdict in verdicts if verdict.module == module)}"
    yield f"all: {counted(verdicts)}"


def counted(verdicts: Iterable[Verdict]) -> str:
    """How many of each outcome."""
    return ", ".join(
        f"{count} {outcome}" for outcome, count in Counter(each.outcome for each in verdicts).most_common()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="files to change, such as compiler/passes/cse.py")
    parser.add_argument("--all", action="store_true", help=f"every module of {', '.join(FOLDERS)}")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="test files to run (default: all)")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which operators, and which share")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="mutants at a time")
    parser.add_argument("--seconds", type=float, default=40, help="of tests for a mutant (default: %(default)s)")
    parser.add_argument("--reach", type=Path, help="which tests execute which lines: read if it is there, else written")
    parser.add_argument("--json", type=Path, help="write what became of all mutants here")
    given = parser.parse_args(arguments)
    modules = [path.relative_to(ROOT).as_posix() for name in FOLDERS for path in sorted((ROOT / name).glob("*.py"))]
    modules = modules if given.all else given.modules
    chance = random.Random(given.seed)
    mutants = [mutant for name in modules for mutant in mutants_of(name, given.seed) if chance.random() < given.share]
    # A copy of a process that has started threads would wait for them for ever.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TVM_NUM_THREADS="1")
    os.chdir(ROOT)
    import pytest
    from mutation_runner import OPTIONS, Runner

    runner = Runner(mutants, modules, given.jobs, given.seconds)
    runner.reach_file, runner.result = given.reach, given.json
    status = pytest.main([*OPTIONS, *given.tests], [runner])
    print(*report(runner.verdicts), sep="\n")
    return 0 if runner.finished else int(status) or 1


if __name__ == "__main__":
    sys.exit(main())
