"""The step's call: the struct is that of step.h, arrays say what docs/architecture.md says, splits are sensible."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

import fake_artifact
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watched import Run, watching

from llmc.compiler import artifact as writing
from llmc.runtime import artifact as reading
from llmc.runtime import layer, manifest
from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.library import Step
from llmc.runtime.runtime import Runtime

STRUCTS = {
    "Step": Step, "Hooks": layer.Hooks, "Tables": layer.Tables, "Layer": layer.LayerOptions, "Pages": layer.Pages,
    "SequenceView": layer.SequenceView, "Request": layer.Request, "Text": layer.Text, "Writing": layer.Writing,
}  # fmt: skip


def test_the_structs_are_those_of_the_headers(tmp_path: Path) -> None:
    fields = [(kind, name, getattr(struct, name)) for kind, struct in STRUCTS.items() for name, *_ in struct._fields_]
    lines = [f'printf("{kind}.{name} %zu\\n", offsetof(Llmc{kind}, {name}));' for kind, name, _ in fields]
    lines += [f'printf("{kind} %zu\\n", sizeof(Llmc{kind}));' for kind in STRUCTS]
    lines.append('printf("%d %lld %d", LLMC_ABI, (long long)LLMC_HASH_CHUNK, LLMC_HASH_LANES);')
    lines.append('printf(" %d %d", LLMC_TEXT_NOT_FINITE, LLMC_TEXT_NO_CHOICE);')
    main = f"int main(void) {{ {' '.join(lines)} return 0; }}"
    source = f'#include <stddef.h>\n#include <stdio.h>\n#include "layer.h"\n#include "pool.h"\n{main}\n'
    (tmp_path / "print.c").write_text(source)
    binary = tmp_path / "print"
    include = f"-I{resources.files('llmc.runtime.csrc')}"
    subprocess.run(["gcc", "-Wall", "-Werror", include, str(tmp_path / "print.c"), "-o", str(binary)], check=True)
    printed = subprocess.run([str(binary)], check=True, capture_output=True, text=True).stdout.split("\n")
    expected = [f"{kind}.{name} {field.offset}" for kind, name, field in fields]
    assert printed[:-1] == expected + [f"{kind} {ctypes.sizeof(struct)}" for kind, struct in STRUCTS.items()]
    abi, chunk, lanes, *ends = map(int, printed[-1].split())
    assert abi == manifest.ABI
    assert chunk == writing.HASH_CHUNK == reading.HASH_CHUNK
    assert lanes == writing.HASH_LANES
    assert ends == [layer.NOT_FINITE, layer.NO_CHOICE]


def test_writer_and_reader_agree_on_the_format() -> None:
    for name in ("MANIFEST", "TOKENIZER", "WEIGHTS", "SEAL_MAGIC", "SEAL_SCHEMA"):
        assert getattr(writing, name) == getattr(reading, name)
    assert writing.PAGE % mmap.PAGESIZE == 0


class Watched:
    """Records what steps are given, and then runs them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.steps: list[dict[str, np.ndarray]] = []

    def __call__(self, given: Step) -> None:
        self.record(given)
        self.run(given)

    def record(self, given: Step) -> None:
        sizes = dict(zip("TQBMRSPA", given.sizes, strict=True))

        def copy(name: str, *shape: int) -> np.ndarray:
            pointer = ctypes.cast(getattr(given, name), ctypes.POINTER(ctypes.c_int32))
            return np.ctypeslib.as_array(pointer, shape).copy()

        for name in (
            "ids",
            "positions",
            "slots",
            "tiles",
            "block_table",
            "rows",
            "logits",
            "arena",
            "weights",
        ):
            assert getattr(given, name) % 64 == 0
        arrays = {
            "ids": copy("ids", sizes["T"]),
            "positions": copy("positions", sizes["T"]),
            "slots": copy("slots", sizes["T"]),
            "tiles": copy("tiles", sizes["Q"], 4),
            "block_table": copy("block_table", sizes["B"], sizes["M"]),
            "rows": copy("rows", sizes["R"]) if sizes["R"] else np.zeros(0, np.int32),
            "sizes": np.array(given.sizes),
        }
        self.steps.append(arrays)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return Runtime.load(fake_artifact.write(tmp_path_factory.mktemp("step") / "model.so"), threads=2)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 70), st.integers(0, 70)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_arrays_mean_what_the_contract_says(runtime: Runtime, shapes: list[tuple[int, int, int]]) -> None:
    """For any runs: each row is in one tile of at most 16 consecutive tokens of one sequence, at its own position; its
    slot is on the page that the block table names for that position."""
    sequences = [runtime.sequence() for _ in shapes]
    watched = Watched(runtime.device.run)
    try:
        feeds = []
        for sequence, (start, count, kind) in zip(sequences, shapes, strict=True):
            if start:
                runtime.step([(sequence, np.arange(start) % 300, "none")])
            feeds.append((sequence, np.arange(start, start + count) % 300, ("all", "last", "none")[kind % 3]))
        with watching(runtime, lambda run: watched):
            rows = runtime.step(feeds)  # type: ignore[arg-type]
        assert len(rows) == sum(len(given_["rows"]) for given_ in watched.steps)
        seen = [check_arrays(given_, [one.pages for one in sequences]) for given_ in watched.steps]
        for index, (start, count, _) in enumerate(shapes):
            assert [place for places in seen for place in places[index]] == list(range(start, start + count))
        assert all(len(given_["ids"]) == fake_artifact.MAX_STEP for given_ in watched.steps[:-1])
    finally:
        for sequence in sequences:
            sequence.close()


def check_arrays(given_: dict[str, np.ndarray], tables: list[np.ndarray]) -> list[list[int]]:
    """Checks a step's tables; returns the positions of each sequence whose tokens are in it."""
    rows_seen: list[int] = []
    found: list[list[int]] = [[] for _ in tables]
    for index, first, count, position in given_["tiles"].tolist():
        assert 1 <= count <= 16
        pages = given_["block_table"][index]
        owners = [i for i, table in enumerate(tables) if len(table) and table[0] == pages[0]]
        assert len(owners) == 1
        rows_seen += range(first, first + count)
        for row in range(first, first + count):
            place = given_["positions"][row]
            assert place == position + row - first
            assert given_["ids"][row] == place % 300
            assert given_["slots"][row] // 32 == pages[place // 32] == tables[owners[0]][place // 32]
            assert given_["slots"][row] % 32 == place % 32
            found[owners[0]].append(int(place))
    assert sorted(rows_seen) == list(range(len(given_["ids"])))
    assert len(set(given_["slots"].tolist())) == len(rows_seen)
    assert sorted(set(given_["rows"].tolist())) == given_["rows"].tolist()
    return [sorted(places) for places in found]


def test_profiles_add_up(runtime: Runtime) -> None:
    runtime.set_profiling(True)
    for _ in range(3):
        runtime.forward([1, 2, 3])
    assert runtime.profile() == [("whole step", 3)]
    runtime.set_profiling(False)
    runtime.forward([1])
    assert runtime.profile() == [("whole step", 0)]


@given(
    st.lists(st.tuples(st.sampled_from(["decode", "step", "fork", "rollback", "drop"]), st.integers(0, 7)), max_size=60)
)
@settings(max_examples=60, deadline=None)
def test_decoding_sees_every_change_of_pages(operations: list[tuple[str, int]]) -> None:
    """Sequences that grow token by token, over page ends, forked, shortened and replaced: always the logits of their
    tokens."""
    runtime = loaded()
    vocab, texts = fake_artifact.VOCAB, [[7] * 30, [9] * 62]
    sequences = [runtime.sequence() for _ in texts]
    runtime.step_last([(one, np.array(ids, np.int32)) for one, ids in zip(sequences, texts, strict=True)])
    try:
        for kind, number in operations:
            index = number % len(sequences)
            if kind == "fork":
                sequences.append(sequences[index].fork())
                texts.append(texts[index].copy())
            elif kind == "rollback":
                count = min(number, len(texts[index]) - 1)
                sequences[index].rollback(count)
                del texts[index][len(texts[index]) - count :]
            elif kind == "drop" and len(sequences) > 1:
                sequences.pop(index).close()
                texts.pop(index)
            elif kind == "step":
                sequences[index].append([number])
                texts[index].append(number)
            else:
                tokens = [(number + len(ids)) % vocab for ids in texts]
                for ids, token in zip(texts, tokens, strict=True):
                    ids.append(token)
                for place, ids in zip(runtime.decode(sequences, tokens), texts, strict=True):
                    assert runtime.fetch_logits(place)[0].tolist() == fake_artifact.reference_logits(ids)[-1].tolist()
        runtime.pool.check()
    finally:
        for sequence in sequences:
            sequence.close()


@cache
def loaded() -> Runtime:
    return Runtime.load(fake_artifact.write(Path(tempfile.mkdtemp()) / "fake.so"), threads=2)


def test_decoding_refuses_what_a_step_refuses() -> None:
    runtime = loaded()
    with runtime.sequence() as sequence, runtime.sequence() as other:
        runtime.step_last([(one, np.array([1, 2], np.int32)) for one in (sequence, other)])
        for sequences, tokens, reason in (
            ([sequence, sequence], [1, 1], "only once"),
            ([sequence], [fake_artifact.VOCAB], "not in the vocabulary"),
            ([sequence, other], [1, -1], "not in the vocabulary"),
        ):
            with pytest.raises(RuntimeStateError, match=reason):
                runtime.decode(sequences, tokens)
            assert (sequence.length, other.length) == (2, 2)
