"""Changes llmc's code at random places, one at a time, and sees whether the tests notice (by cosmic-ray).

    python tests/mutation.py compiler/passes/merge_projections.py --share 0.2
    python tests/mutation.py --all --share 0.05 --json build/mutation.json

Works on a copy of the tracked files. A mutant that no test kills is printed as a diff: kill it with a test, or see that
it changes nothing. Not part of `make test`: a mutant takes some seconds, and there are 30 a function.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("compiler", "frontends", "targets", "runtime")
# Annotations are not evaluated, and these operators find `X | None` in them more often than anything else.
SKIPPED = ("ReplaceBinaryOperator_BitOr",)
PASSES = ("test_golden", "test_random_tensor_graphs", "test_passes_*")
# Which tests look at a module, by the start of its path; the longest start wins.
TESTS: dict[str, tuple[str, ...]] = {
    "compiler/ir/": ("test_ir_*", "test_golden", "test_passes_basic_*"),
    "compiler/ir/attention": ("test_ir_*", "test_golden", "test_passes_attention_*", "test_kv_cache"),
    "compiler/ir/integers": ("test_ir_*", "test_golden", "test_onnx_quantized"),
    "compiler/passes/": PASSES,
    "compiler/passes/canonical": ("test_golden", "test_passes_basic_*", "test_random_tensor_graphs"),
    "compiler/passes/cse": ("test_golden", "test_passes_basic_*"),
    "compiler/passes/fold": ("test_golden", "test_passes_basic_*"),
    "compiler/passes/fuse_activation": ("test_golden", "test_passes_basic_*"),
    "compiler/passes/fuse_embed": ("test_golden", "test_passes_basic_*"),
    "compiler/passes/fuse_linear": ("test_golden", "test_passes_basic_*"),
    "compiler/passes/fuse_norm": ("test_golden", "test_passes_basic_*"),
    "compiler/passes/fuse_epilogues": ("test_golden", "test_passes_merge"),
    "compiler/passes/integer_products": ("test_golden", "test_onnx_quantized"),
    "compiler/passes/keep_integers": ("test_golden", "test_onnx_quantized"),
    "compiler/passes/layouts": ("test_passes_layouts", "test_passes_attention_*"),
    "compiler/passes/merge_projections": ("test_golden", "test_passes_merge"),
    "compiler/passes/quantize": ("test_golden", "test_passes_quantize"),
    "compiler/passes/schemes": ("test_golden", "test_passes_quantize"),
    "compiler/passes/split_projections": ("test_golden", "test_passes_attention_projections"),
    "frontends/hf/": ("test_frontend_hf_*",),
    "frontends/onnx/": ("test_onnx_*", "test_encoder_onnx"),
}


@dataclass(frozen=True)
class Mutant:
    """One change of one module, and whether a test failed with it."""

    module: str
    operator: str
    line: int
    killed: bool
    diff: str


def tests_of(module: str, folder: Path) -> list[str]:
    """The test files that look at a module."""
    start = max((key for key in TESTS if module.startswith(key)), key=len, default="")
    names = {path.relative_to(folder).as_posix() for glob in TESTS[start] for path in folder.glob(f"tests/{glob}.py")}
    return sorted(names, key=lambda name: ("golden" not in name, name))  # goldens are quick, and see the most


def copied(folder: Path) -> None:
    """The tracked files in `folder`, and in its `package` a tree of links where they are imported from."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    package = folder / "package" / "llmc"
    package.mkdir(parents=True)
    for path in [*(folder / "llmc").iterdir(), *(folder / room for room in ROOMS)]:
        (package / path.name).symlink_to(path)


def run(module: str, folder: Path, share: float, seed: int) -> list[Mutant]:
    """Mutants of one module, a share of them drawn at random."""
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    # Not `python -m pytest`, which looks for llmc in the folder first, where its rooms are not below it.
    command = [
        str(Path(sys.executable).with_name("pytest")),
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
    ]
    config, session = folder / "mutation.toml", folder / "mutation.sqlite"
    session.unlink(missing_ok=True)
    config.write_text(
        f'[cosmic-ray]\nmodule-path = "{module}"\ntimeout = 900.0\nexcluded-modules = []\n'
        f"test-command = {json.dumps(shlex.join([*command, *tests_of(module, folder)]))}\n"
        '[cosmic-ray.distributor]\nname = "local"\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(folder / "package"), "PYTHONDONTWRITEBYTECODE": "1"}

    def ray(*arguments: object) -> None:
        words = [str(Path(sys.executable).with_name("cosmic-ray")), "--verbosity=ERROR", *map(str, arguments)]
        subprocess.run(words, cwd=folder, env=environment, check=True)

    ray("init", config, session)
    with use_db(str(session)) as database:
        drawn = random.Random(f"{seed} {module}")
        for item in list(database.work_items):
            if any(name in item.mutations[0].operator_name for name in SKIPPED) or drawn.random() >= share:
                database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    ray("baseline", config)
    ray("exec", config, session)
    with use_db(str(session)) as database:
        return [
            Mutant(
                module, item.mutations[0].operator_name, item.mutations[0].start_pos[0], result.is_killed, result.diff
            )
            for item, result in database.completed_work_items
            if result.worker_outcome == WorkerOutcome.NORMAL
        ]


def report(mutants: Sequence[Mutant]) -> Iterable[str]:
    """Survivors as diffs, then counts a module."""
    for mutant in mutants:
        if not mutant.killed:
            changed = [line for line in mutant.diff.split("\n") if line[:1] in "+-" and line[:3] not in ("+++", "---")]
            yield "\n".join([f"survived: {mutant.module}:{mutant.line} {mutant.operator}", *changed, ""])
    for module in dict.fromkeys(mutant.module for mutant in mutants):
        own = [mutant for mutant in mutants if mutant.module == module]
        yield f"{module}: {sum(mutant.killed for mutant in own)} of {len(own)} killed"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="files to change, such as compiler/passes/cse.py")
    parser.add_argument("--all", action="store_true", help="every module that TESTS names a folder of")
    parser.add_argument("--share", type=float, default=0.1, help="of the mutants of each module (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all mutants here")
    given = parser.parse_args(arguments)
    folders = [ROOT / start for start in TESTS if start.endswith("/")]
    found = [path.relative_to(ROOT).as_posix() for folder in folders for path in sorted(folder.glob("*.py"))]
    modules = found if given.all else given.modules
    with tempfile.TemporaryDirectory(prefix="llmc-mutation-") as name:
        folder = Path(name)
        copied(folder)
        mutants = []
        for module in modules:
            own = run(module, folder, given.share, given.seed)
            mutants += own
            print(*report(own), sep="\n", flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps([asdict(mutant) for mutant in mutants], indent=1))
    print(f"{sum(mutant.killed for mutant in mutants)} of {len(mutants)} killed")


if __name__ == "__main__":
    main()
