"""The step's call: the struct is that of step.h, arrays say what docs/architecture.md says, splits are sensible."""

from __future__ import annotations

import ctypes
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

from llmc.compiler import artifact as writing
from llmc.runtime import artifact as reading
from llmc.runtime import manifest
from llmc.runtime.batch import Run, StepRunner, choose_splits, choose_tile, cut, parts_of
from llmc.runtime.device import Use
from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.host import Host
from llmc.runtime.library import Decoding, Step
from llmc.runtime.runtime import Runtime


def test_the_struct_is_that_of_the_header(tmp_path: Path) -> None:
    structs = {"Step": Step, "Decoding": Decoding}
    fields = [(kind, name, getattr(struct, name)) for kind, struct in structs.items() for name, *_ in struct._fields_]
    lines = [f'printf("{kind}.{name} %zu\\n", offsetof(Llmc{kind}, {name}));' for kind, name, _ in fields]
    lines.append('printf("%zu %zu ", sizeof(LlmcStep), sizeof(LlmcDecoding));')
    lines.append('printf("%d %lld %d", LLMC_ABI, (long long)LLMC_HASH_CHUNK, LLMC_HASH_LANES);')
    main = f"int main(void) {{ {' '.join(lines)} return 0; }}"
    source = f'#include <stddef.h>\n#include <stdio.h>\n#include "decode.h"\n#include "pool.h"\n{main}\n'
    (tmp_path / "print.c").write_text(source)
    binary = tmp_path / "print"
    include = f"-I{resources.files('llmc.runtime.csrc')}"
    subprocess.run(["gcc", "-Wall", "-Werror", include, str(tmp_path / "print.c"), "-o", str(binary)], check=True)
    printed = subprocess.run([str(binary)], check=True, capture_output=True, text=True).stdout.split("\n")
    assert printed[:-1] == [f"{kind}.{name} {field.offset}" for kind, name, field in fields]
    size, decoding, abi, chunk, lanes = map(int, printed[-1].split())
    assert (size, decoding) == (ctypes.sizeof(Step), ctypes.sizeof(Decoding))
    assert abi == manifest.ABI
    assert chunk == writing.HASH_CHUNK == reading.HASH_CHUNK
    assert lanes == writing.HASH_LANES


def test_writer_and_reader_agree_on_the_format() -> None:
    for name in ("MANIFEST", "TOKENIZER", "WEIGHTS", "SEAL_MAGIC", "SEAL_SCHEMA", "PAGE"):
        assert getattr(writing, name) == getattr(reading, name)


class Watched(Host):
    """A host whose steps only record what they are given."""

    def __init__(self) -> None:
        super().__init__(threads=2)
        self.arrays: dict[str, np.ndarray] = {}

    def run(self, given: Step, decoding: Decoding | None = None) -> None:
        assert decoding is None
        sizes = dict(zip("TQBMRSP", given.sizes, strict=True))

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
        self.arrays = {
            "ids": copy("ids", sizes["T"]),
            "positions": copy("positions", sizes["T"]),
            "slots": copy("slots", sizes["T"]),
            "tiles": copy("tiles", sizes["Q"], 4),
            "block_table": copy("block_table", sizes["B"], sizes["M"]),
            "rows": copy("rows", sizes["R"]) if sizes["R"] else np.zeros(0, np.int32),
            "splits": np.array(sizes["S"]),
        }


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return Runtime.load(fake_artifact.write(tmp_path_factory.mktemp("step") / "model.so"), threads=2)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_arrays_mean_what_the_contract_says(runtime: Runtime, shapes: list[tuple[int, int, int]]) -> None:
    """For any runs: each row is in one tile of at most 16 consecutive tokens of one sequence, at its own position; its
    slot is on the page that the block table names for that position."""
    sequences = [runtime.sequence() for _ in shapes]
    try:
        runs = []
        for sequence, (start, most, wanted) in zip(sequences, shapes, strict=True):
            count = min(most, 48 // len(shapes))
            if start:
                runtime.step([(sequence, np.arange(start) % 300, "none")])
            ids = np.arange(count, dtype=np.int32)
            sequence.prepare(ids)
            runs.append(Run(sequence, ids, start, count - min(wanted, count)))
        check_arrays(runtime, runs)
    finally:
        for sequence in sequences:
            sequence.close()


def check_arrays(runtime: Runtime, runs: list[Run]) -> None:
    watched = Watched()
    runner = StepRunner(runtime.artifact, watched, watched.reserve(1, Use.DENSE).at(), runtime.buffers)
    runner.run(runs)
    given_ = watched.arrays
    assert len(given_["rows"]) == sum(run.rows for run in runs)
    assert given_["ids"].tolist() == [i for run in runs for i in range(len(run.ids))]
    seen = []
    for index, first, count, position in given_["tiles"].tolist():
        assert 1 <= count <= 16
        seen += range(first, first + count)
        run = runs[index]
        for row in range(first, first + count):
            place = given_["positions"][row]
            assert place == position + row - first == run.start + given_["ids"][row]
            assert (
                given_["slots"][row] // 32
                == given_["block_table"][index][place // 32]
                == run.sequence.pages[place // 32]
            )
            assert given_["slots"][row] % 32 == place % 32
    assert sorted(seen) == list(range(len(given_["ids"])))
    assert len(set(given_["slots"].tolist())) == len(seen)
    ends = np.cumsum([len(run.ids) for run in runs])
    assert given_["rows"].tolist() == [
        row for end, run in zip(ends.tolist(), runs, strict=True) for row in range(end - run.rows, end)
    ]


@given(st.integers(1, 600), st.integers(1, 64), st.integers(1, 16), st.integers(1, 128))
def test_splits_are_for_threads_without_work(tiles: int, kv_heads: int, parts: int, threads: int) -> None:
    splits = choose_splits(tiles, kv_heads, parts, threads)
    assert splits in (1, parts)
    assert splits == 1 or tiles * kv_heads < 4 * threads
    assert splits == parts or threads == 1 or tiles * kv_heads >= (threads if parts <= 2 else 4 * threads)


@given(st.integers(1, 200_000), st.sampled_from([1, 4, 16]), st.sampled_from([32, 512]))
def test_parts_are_as_short_as_their_number_allows(tokens: int, most: int, part: int) -> None:
    """The least of part, 2 * part, 4 * part, ... of which `most` hold the context."""
    length = next(part << i for i in range(40) if (part << i) * most >= tokens)
    assert parts_of(tokens, part, most) == -(-tokens // length) <= most


@given(st.integers(0, 1000), st.integers(1, 600), st.sampled_from([16, 64, 100]))
def test_tiles_end_where_the_positions_say(start: int, count: int, tile: int) -> None:
    first, rows = cut(start, count, tile)
    assert first[0] == 0
    assert (rows > 0).all()
    assert rows.sum() == count
    assert (first[1:] == np.cumsum(rows)[:-1]).all()
    assert all((start + end) % tile == 0 for end in first[1:].tolist())
    assert all((start + begin) // tile == (start + begin + n - 1) // tile for begin, n in zip(first, rows, strict=True))


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=9),
    st.integers(1, 64),
    st.integers(1, 128),
    st.sampled_from([8, 16, 64, 100]),
)
def test_tiles_are_as_large_as_leaves_every_thread_work(
    counts: list[int], kv_heads: int, threads: int, most: int
) -> None:
    def units(tile: int) -> int:
        return sum(-(-count // tile) for count in counts) * kv_heads

    tile = choose_tile(counts, kv_heads, threads, most)
    assert min(16, most) <= tile <= most
    assert tile in (min(16, most), most) or units(tile) >= 4 * threads
    if tile < most:
        assert units(most) < 4 * threads


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
    tokens, although `decode` fills only what it believes to have changed."""
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
