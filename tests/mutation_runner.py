"""What tests/mutation.py runs within pytest: which tests execute a line, and mutants in forked processes."""

from __future__ import annotations

import gc
import importlib
import json
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType

import coverage
import pytest
from mutation import ROOT, Mutant, Verdict
from mutation_forks import Forks

MEMORY = 8 << 30  # bytes that a mutant may ask for besides what is there
FILE_SECONDS = 3000.0  # for the tests of one file, with nothing changed
OPTIONS = ("-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not slow", "--tb=no")
PASSED, FAILED, SAME = 0, 1, 3
KILLER = "killer.txt"  # in a copy's folder: the test that failed
OUTCOMES = {PASSED: "survived", SAME: "same code", None: "late"}


@dataclass
class Reach:
    """How long each test took, in seconds, and the tests that execute each line of a module."""

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)

    def update(self, other: Reach) -> None:
        """Adds what is known of other tests."""
        self.seconds.update(other.seconds)
        for module, lines in other.lines.items():
            for line, tests in lines.items():
                self.lines.setdefault(module, {}).setdefault(line, []).extend(tests)

    def tests_of(self, mutant: Mutant, limit: float, killers: Counter[str]) -> list[str]:
        """The tests that execute a mutant's line, the quickest first, for `limit` seconds in all.

        killers: how many mutants of the module each test has killed. The best of them come first; they are not chosen
        for that, so that what becomes of a mutant does not depend on the order in which mutants are run.
        """
        lines = self.lines.get(mutant.module, {})
        tests = lines.get(mutant.line, []) if mutant.in_function else [test for of in lines.values() for test in of]
        chosen, total = [], 0.0
        for test in sorted(set(tests), key=lambda test: (self.seconds[test], test)):
            total += self.seconds[test]
            if chosen and total > limit:
                break
            chosen.append(test)
        return sorted(chosen, key=lambda test: -killers[test])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Reach:
        stored = json.loads(path.read_text())
        lines = {module: {int(line): tests for line, tests in of.items()} for module, of in stored["lines"].items()}
        return cls(stored["seconds"], lines)


def failing(
    items: Sequence[pytest.Item], before: Callable[[pytest.Item], None] = lambda item: None
) -> pytest.Item | None:
    """The first test that does not pass, after which none is run; None if all pass."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        before(item)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if item.session.testsfailed:
            return item
    return None


def reach_of(items: Sequence[pytest.Item], files: Mapping[str, str]) -> Reach | None:
    """What tests execute of the modules, by path; None if one fails."""
    reach = Reach()
    tracer = coverage.Coverage(data_file=None, config_file=False, include=list(files))
    starts: list[float] = []

    def before(item: pytest.Item) -> None:
        starts.append(time.monotonic())
        tracer.switch_context(item.nodeid)

    tracer.start()
    passed = failing(items, before) is None
    tracer.stop()
    ends = [*starts[1:], time.monotonic()]
    reach.seconds = {item.nodeid: end - start for item, start, end in zip(items, starts, ends, strict=False)}
    with warnings.catch_warnings(action="ignore"):  # that the tests of this file execute none of the modules
        data = tracer.get_data()
    for path, module in files.items():
        contexts = data.contexts_by_lineno(path)
        reach.lines[module] = {line: [test for test in tests if test] for line, tests in contexts.items()}
    return reach if passed else None


def functions_of(files: Mapping[str, str]) -> dict[str, list[FunctionType]]:
    """The functions that are there of each module, by path."""
    found: dict[str, list[FunctionType]] = {module: [] for module in files.values()}
    for value in gc.get_objects():
        if type(value) is FunctionType and value.__code__.co_filename in files:  # isinstance may run their code
            found[files[value.__code__.co_filename]].append(value)
    return found


def swap(functions: Sequence[FunctionType], path: Path, text: str) -> bool:
    """Gives the functions of a module the code that they have in `text`; whether any changed."""

    def codes(code: CodeType) -> dict[tuple[str, int], CodeType]:
        found = {(code.co_qualname, code.co_firstlineno): code}
        for value in code.co_consts:
            if isinstance(value, CodeType):
                found.update(codes(value))
        return found

    new = codes(compile(text, str(path), "exec", dont_inherit=True))
    changed = False
    for function in functions:
        code = new.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
        if code is not None and code != function.__code__:
            function.__code__, changed = code, True
    return changed


def run_anew(path: Path, text: str, tests: Sequence[str]) -> int:
    """Imports llmc and the tests again, one module of it with another text, and runs tests: 0 if they pass, else 1."""

    stats, data = SourceFileLoader.path_stats, SourceFileLoader.get_data

    def path_stats(self: SourceFileLoader, name: str) -> Mapping[str, object]:
        if Path(name) == path:
            raise OSError("no compiled code of this may be used")
        return stats(self, name)

    def get_data(self: SourceFileLoader, name: str) -> bytes:
        return text.encode() if Path(name) == path else data(self, name)

    sys.dont_write_bytecode = True
    SourceFileLoader.path_stats, SourceFileLoader.get_data = path_stats, get_data  # type: ignore[method-assign]
    own = {path.stem for path in (ROOT / "tests").glob("**/*.py")}
    for name in list(sys.modules):
        if name.partition(".")[0] in own | {"llmc", "conftest", "tests", "hard_models"}:
            del sys.modules[name]
    return PASSED if pytest.main([*OPTIONS, *tests]) == 0 else FAILED


class Runner:
    """A pytest plugin that runs mutants in place of the tests that were collected."""

    def __init__(self, mutants: Sequence[Mutant], modules: Sequence[str], jobs: int, seconds: float) -> None:
        self.mutants, self.seconds = mutants, seconds
        self.files = {str(ROOT / module): module for module in modules}
        self.forks = Forks(jobs)
        self.verdicts: list[Verdict] = []
        self.reach_file: Path | None = None
        self.result: Path | None = None
        self.finished = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("the tests could not be collected")
        for module in self.files.values():  # some are imported when they are first needed
            importlib.import_module("llmc." + module.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        gc.collect()
        self.functions = functions_of(self.files)
        gc.freeze()  # a collection in a copy would touch, and so copy, all that is there
        if self.reach_file is not None and self.reach_file.exists():
            reach = Reach.load(self.reach_file)
        else:
            reach = self.measure(session)
            if self.reach_file is not None:
                reach.save(self.reach_file)
        self.run(session, reach)
        self.finished = True
        return True

    def measure(self, session: pytest.Session) -> Reach:
        """Runs the tests with nothing changed, each file in a copy of its own as its tests share fixtures."""
        by_file: dict[str, list[pytest.Item]] = {}
        for item in session.items:
            by_file.setdefault(item.nodeid.partition("::")[0], []).append(item)
        reach = Reach()
        for name, items in by_file.items():
            part = Path(session.config._tmp_path_factory.getbasetemp()) / f"{Path(name).stem}.json"  # type: ignore[attr-defined]

            def work(folder: Path, items: Sequence[pytest.Item] = items, part: Path = part) -> int:
                session.config._tmp_path_factory._basetemp = folder  # type: ignore[attr-defined]
                found = reach_of(items, self.files)
                if found is not None:
                    found.save(part)
                return PASSED if found is not None else FAILED

            def done(status: int | None, folder: Path, name: str = name, part: Path = part) -> None:
                if status == PASSED:
                    reach.update(Reach.load(part))
                    print(f"\n{name}: seen which lines it executes", flush=True)
                else:
                    print(f"\n{name} does not pass with nothing changed (exit status {status}): left out", flush=True)

            self.forks.start(work, FILE_SECONDS, done)
        self.forks.finish()
        return reach

    def run(self, session: pytest.Session, reach: Reach) -> None:
        """Every mutant, in a copy of its own."""
        items = {item.nodeid: item for item in session.items}
        from cosmic_ray.ast import get_ast
        from onnx_node_cases import node_cases

        node_cases()  # takes longer than all that tests do with it
        killers: dict[str, Counter[str]] = {module: Counter() for module in self.files.values()}
        self.trees = {mutant.module: get_ast((ROOT / mutant.module).read_text()) for mutant in self.mutants}
        gc.freeze()  # the trees too
        started = time.monotonic()
        for mutant in self.mutants:
            tests = [test for test in reach.tests_of(mutant, self.seconds, killers[mutant.module]) if test in items]
            if not tests:
                self.verdicts.append(mutant.verdict("unseen", 0))
                continue

            def work(folder: Path, mutant: Mutant = mutant, tests: Sequence[str] = tests) -> int:
                session.config._tmp_path_factory._basetemp = folder  # type: ignore[attr-defined]
                return self.attempt(mutant, [items[test] for test in tests], folder)

            def done(status: int | None, folder: Path, mutant: Mutant = mutant, tests: Sequence[str] = tests) -> None:
                killer = folder / KILLER
                if killer.exists():
                    killers[mutant.module][killer.read_text()] += 1
                self.verdicts.append(mutant.verdict(OUTCOMES.get(status, "killed"), len(tests)))
                if len(self.verdicts) % 100 == 0:
                    print(
                        f"{len(self.verdicts)} of {len(self.mutants)}, {time.monotonic() - started:.0f} s", flush=True
                    )
                    self.write()

            self.forks.start(work, 20 + 4 * sum(reach.seconds[test] for test in tests), done)
        self.forks.finish()
        self.write()

    def attempt(self, mutant: Mutant, items: Sequence[pytest.Item], folder: Path) -> int:
        """Runs tests with a mutant in this process; the name of the one that fails is left in `folder`."""
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        path, text = ROOT / mutant.module, mutant.text(self.trees[mutant.module])  # a copy's own tree
        if text == path.read_text():
            return SAME
        if not mutant.in_function:
            return run_anew(path, text, [item.nodeid for item in items])
        if not swap(self.functions[mutant.module], path, text):
            return SAME
        killer = failing(items)
        if killer is None:
            return PASSED
        (folder / KILLER).write_text(killer.nodeid)
        return FAILED

    def write(self) -> None:
        if self.result is not None:
            self.result.write_text(json.dumps([asdict(verdict) for verdict in self.verdicts], indent=1))
