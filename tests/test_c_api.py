"""llmc.h: a C program gets from an artifact what Python gets, and a clear error where it cannot."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import c_api
import fake_artifact
import fake_kinds
import numpy as np
import pytest
from kernel_harness import CACHE
from test_pool import SANITIZERS
from tiny_encoders import make_sentence
from tiny_models import make_tiny

import llmc
from llmc.runtime import cpu
from llmc.runtime.runtime import Runtime
from llmc.targets.cpu.library import c_sources

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "examples" / "c"
PROMPT = [5, 9, 200, 301 % 300, 17, 3]
LONG = np.random.default_rng(5).integers(0, 300, 100).tolist()  # more than a step of the fake model
ARGUMENT, FILE, MACHINE, MEMORY, FULL, CONTEXT, STATE, UNSUPPORTED = range(1, 9)


class Model:
    """An artifact that is opened as a C program does it."""

    def __init__(self, path: Path, file: Path | None = None, **options: object) -> None:
        self.api = c_api.table(path)
        self.handle = ctypes.c_void_p()
        given = c_api.Options(bytes=ctypes.sizeof(c_api.Options), **options)
        code = self.api.open(os.fsencode(file or path), given, self.handle)
        if code:
            raise CodeError(code, self.api.error().decode())

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.api.close(self.handle)

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.api, name)(*arguments)
        if code:
            raise CodeError(code, self.api.error().decode())

    def sequence(self, expected: int = 0) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.call("sequence", self.handle, expected, made)
        return made

    def feed(self, sequence: ctypes.c_void_p, ids: Sequence[int]) -> np.ndarray:
        """Appends ids; the logits after the last."""
        self.call("feed", sequence, (ctypes.c_int32 * len(ids))(*ids), len(ids))
        place = self.api.logits(sequence)
        return np.ctypeslib.as_array((ctypes.c_float * self.api.facts.contents.vocabulary).from_address(place)).copy()

    def adopt(self, sequence: ctypes.c_void_p, ids: Sequence[int]) -> int:
        """How many of these tokens the sequence takes over."""
        covered = ctypes.c_int64(-1)
        self.call("adopt", sequence, (ctypes.c_int32 * len(ids))(*ids), len(ids), covered)
        return covered.value

    def encode(self, texts: Sequence[Sequence[int]], width: int) -> np.ndarray:
        ids = np.array([token for text in texts for token in text], np.int32)
        counts, rows = np.array([len(text) for text in texts], np.int64), np.zeros((len(texts), width), np.float32)
        places = (array.ctypes.data for array in (ids, counts, rows))
        self.call("encode", self.handle, next(places), next(places), len(texts), next(places))
        return rows


class CodeError(Exception):
    """A function of the table has failed: its code and text."""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_artifact.write(tmp_path_factory.mktemp("fake") / "model.so")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    llmc.compile(make_tiny("llama", folder / "model"), folder / "model.so", dtype="int4", kernel_cache=CACHE)
    return folder / "model.so"


def program(name: str, folder: Path, *options: str) -> Path:
    """One of the examples, compiled."""
    binary = folder / name
    command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{c_sources()}", str(PROGRAMS / f"{name}.c")]
    subprocess.run([*command, *options, "-o", str(binary), "-ldl"], check=True)
    return binary


def said(*command: object, **environment: str) -> list[str]:
    """What a program prints, word by word; nothing on stderr."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def greedy(path: Path, ids: Sequence[int], count: int) -> list[str]:
    """The tokens that Python finds likeliest, one after the other."""
    runtime = Runtime.load(path, threads=2)
    with runtime.sequence() as sequence:
        logits, found = sequence.append(ids), []
        for _ in range(count):
            found.append(int(logits.argmax()))
            logits = sequence.append([found[-1]])
    return [str(token) for token in found]


# Text


def test_logits_are_those_of_the_model_in_steps_of_any_size(fake: Path) -> None:
    expected = fake_artifact.reference_logits(LONG)
    with Model(fake, threads=3) as model:
        for cuts in ([0, 100], [0, 1, 2, 31, 32, 33, 64, 100], list(range(0, 101, 5))):
            sequence = model.sequence()
            for begin, end in itertools.pairwise(cuts):
                assert (model.feed(sequence, LONG[begin:end]) == expected[end - 1]).all()


def test_a_fork_and_a_rollback_go_on_like_fresh_sequences(fake: Path) -> None:
    with Model(fake) as model:
        first, other = model.sequence(), ctypes.c_void_p()
        model.feed(first, LONG[:40])
        model.call("fork", first, other)
        assert model.api.length(other) == 40
        assert (model.feed(other, [7]) == fake_artifact.reference_logits([*LONG[:40], 7])[-1]).all()
        assert (model.feed(first, [8]) == fake_artifact.reference_logits([*LONG[:40], 8])[-1]).all()
        model.call("rollback", other, 20)
        assert not model.api.logits(other)
        assert (model.feed(other, [9, 9]) == fake_artifact.reference_logits([*LONG[:21], 9, 9])[-1]).all()


def test_a_prefix_is_found_again(fake: Path) -> None:
    """Of a sequence that is there and of one that was ended; whole pages, and at least one token is left to feed."""
    with Model(fake) as model:
        first, second, third = model.sequence(), model.sequence(), model.sequence()
        model.feed(first, LONG[:70])
        covered = model.adopt(second, LONG[:64])
        assert covered == 32 == model.api.length(second) and not model.api.logits(second)
        assert (model.feed(second, LONG[32:90]) == fake_artifact.reference_logits(LONG[:90])[-1]).all()
        model.api.end(first)
        assert model.adopt(third, [*LONG[:64], 7, 7]) == 64
        assert (model.feed(third, [7]) == fake_artifact.reference_logits([*LONG[:64], 7])[-1]).all()
        with pytest.raises(CodeError, match="has to be empty") as error:
            model.adopt(third, LONG)
        assert error.value.args[0] == STATE
        assert model.adopt(model.sequence(), [LONG[0] + 1, *LONG[1:]]) == 0


def test_a_sequence_that_grows_into_another_regime_is_computed_anew(tmp_path: Path) -> None:
    """With the same logits as one that was expected to be long: the fake model has the same in all regimes."""
    step = {**fake_artifact.manifest()["step"], "regimes": [8]}  # type: ignore[dict-item]
    path = fake_artifact.write(tmp_path / "model.so", step=step)
    with Model(path) as model:
        short, long = model.sequence(), model.sequence(9)
        model.feed(short, LONG[:8])
        assert (model.feed(short, LONG[8:9]) == fake_artifact.reference_logits(LONG[:9])[-1]).all()
        model.feed(long, LONG[:3])
        assert (model.feed(long, LONG[3:9]) == fake_artifact.reference_logits(LONG[:9])[-1]).all()


def test_weights_may_be_copied_or_lie_in_a_file_of_their_own(fake: Path, tmp_path: Path) -> None:
    expected = fake_artifact.reference_logits(PROMPT)[-1]
    apart = tmp_path / "apart"
    apart.write_bytes(fake_artifact.weights().tobytes())
    for options in ({"copy_weights": 1}, {"weights": os.fsencode(apart)}):
        with Model(fake, **options) as model:
            assert (model.feed(model.sequence(), PROMPT) == expected).all()
    apart.write_bytes(b"too short")
    with pytest.raises(CodeError, match="does not hold the 300 bytes of weights") as error:
        Model(fake, weights=os.fsencode(apart))
    assert error.value.args[0] == FILE


def test_a_file_that_is_not_this_artifact_is_refused(fake: Path, tmp_path: Path) -> None:
    data = bytearray(fake.read_bytes())
    whole, short = tmp_path / "copy.so", tmp_path / "short.so"
    whole.write_bytes(data)
    with Model(fake, whole) as model:
        assert (model.feed(model.sequence(), PROMPT) == fake_artifact.reference_logits(PROMPT)[-1]).all()
    short.write_bytes(data[:5000])
    place = data.index(b"the KV cache is full")  # a constant of the code
    data[place] ^= 1
    whole.write_bytes(data)
    for file in (whole, short):
        with pytest.raises(CodeError, match="does not hold the code that runs") as error:
            Model(fake, file)
        assert error.value.args[0] == FILE


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    """The section table is not part of what is loaded, so it can be damaged alone."""
    path = fake_artifact.write(tmp_path / "model.so")
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[0x28:0x30], "little")
    # sh_size of the weights: of a section that is not loaded (sh_addr 0), as others may have 300 bytes too
    headers = range(table, len(data) - 63, 64)
    fields = {at: [int.from_bytes(data[at + n : at + n + 8], "little") for n in (16, 32)] for at in headers}
    (place,) = (at + 32 for at, found in fields.items() if found == [0, 300])
    for size in (299, 301, 1 << 60, 0):
        other = tmp_path / "other.so"
        other.write_bytes(data[:place] + size.to_bytes(8, "little") + data[place + 8 :])
        with pytest.raises(CodeError, match=r"its weights are not those|compiled without weights"):
            Model(path, other)


def test_a_machine_without_a_feature_is_refused(tmp_path: Path) -> None:
    def needing(*features: str) -> Path:
        target = {"name": "x", "arch": cpu.architecture(), "features": features}
        return fake_artifact.write(tmp_path / f"{len(features)}.so", target=target)

    Model(needing(*sorted(cpu.features())))  # all that there is, by LLVM's names
    with pytest.raises(CodeError, match="needs avx9000, which this CPU does not have") as error:
        Model(needing("avx9000"))
    assert error.value.args[0] == MACHINE


def test_a_full_cache_and_a_full_context_are_errors(fake: Path) -> None:
    with Model(fake, cache_bytes=2 * 2 * 2 * 2 * 32 * 4) as model:
        first, second = model.sequence(), model.sequence()
        model.feed(first, LONG[:33])
        with pytest.raises(CodeError, match="the KV cache is full: all 2 pages") as error:
            model.feed(second, [1])
        assert error.value.args[0] == FULL and model.api.length(second) == 0
        model.api.end(first)
        assert (model.feed(second, PROMPT) == fake_artifact.reference_logits(PROMPT)[-1]).all()
    with Model(fake) as model, pytest.raises(CodeError, match="more than the context of 400") as error:
        model.feed(model.sequence(), [1] * 401)
    assert error.value.args[0] == CONTEXT
    with pytest.raises(CodeError, match="hold no page"):
        Model(fake, cache_bytes=5)


def test_python_and_c_use_one_artifact_in_one_process(fake: Path) -> None:
    expected = fake_artifact.reference_logits(LONG)
    runtime = Runtime.load(fake, threads=2)
    with Model(fake) as model:
        sequence = model.sequence()
        for end in range(10, 100, 10):
            assert (model.feed(sequence, LONG[end - 10 : end]) == expected[end - 1]).all()
            assert (runtime.forward(LONG[:end]) == expected[:end]).all()


# Encoders


def test_texts_are_encoded_side_by_side(tmp_path: Path) -> None:
    path = fake_kinds.write_encoder(tmp_path / "model.so")
    random = np.random.default_rng(1)
    lengths = [1, 40, 7, 33, 12, 1, 39, 2, 2, 31]
    texts = [random.integers(0, fake_artifact.VOCAB, length).tolist() for length in lengths]
    expected = np.stack([fake_kinds.reference(text)[0] for text in texts])
    with Model(path, threads=2) as model:
        assert (model.encode(texts, fake_kinds.DIMENSION) == expected).all()
        assert (model.encode(texts[:1], fake_kinds.DIMENSION) == expected[:1]).all()
        for wrong, code, text in (
            ([[1] * 41], CONTEXT, "41 tokens; the model takes 40"),
            ([[1], []], ARGUMENT, "text 1 has no tokens"),
            ([[1], [2, fake_artifact.VOCAB]], ARGUMENT, "token id 300 of text 1"),
        ):
            with pytest.raises(CodeError, match=text) as error:
                model.encode(wrong, fake_kinds.DIMENSION)
            assert error.value.args[0] == code
        with pytest.raises(CodeError, match="is an encoder") as error:
            model.sequence()
        assert error.value.args[0] == UNSUPPORTED


def test_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CodeError, match="takes arrays: use it from Python") as error:
        Model(fake_kinds.write_arrays(tmp_path / "model.so"))
    assert error.value.args[0] == UNSUPPORTED


# The programs of examples/c


def test_a_small_c_program_writes_the_tokens_that_python_writes(tiny: Path, tmp_path: Path) -> None:
    binary = program("generate", tmp_path)
    assert len((PROGRAMS / "generate.c").read_text().splitlines()) < 100
    needed = subprocess.run(["readelf", "-d", str(binary)], check=True, capture_output=True, text=True).stdout
    assert [line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line] == ["libc.so.6"]
    assert said(binary, tiny, 40, *PROMPT) == greedy(tiny, PROMPT, 40)
    drawn = [said(binary, "-t", 2, "-s", seed, tiny, 40, *PROMPT) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_guide_shows_what_the_program_does() -> None:
    """Line by line, but for remarks."""
    (shown,) = re.findall(r"```c\n(.*?)```", (ROOT / "docs" / "users.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split(" /*")[0].strip() for line in (PROGRAMS / "generate.c").read_text().splitlines()]
    assert [line for line in shown.splitlines() if line.split(" /*")[0].strip() not in lines] == []


def test_the_program_says_what_is_wrong(tiny: Path, tmp_path: Path) -> None:
    binary = program("generate", tmp_path)
    for words, text in (((tiny, 1, 400), "token id 400"), ((ROOT / "README.md", 1, 4), "ELF"), ((tiny,), "usage")):
        done = subprocess.run([str(binary), *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 1 and text in done.stderr and not done.stdout


def test_an_encoder_in_c_gives_the_rows_that_python_gives(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    llmc.compile(make_sentence("bert", tmp_path / "model"), path, dtype="f32", kernel_cache=CACHE)
    texts = [[2, 7, 9, 3], [2, 11, 3], [5] * 30]
    binary = program("embed", tmp_path, str(path))
    words = " / ".join(" ".join(map(str, text)) for text in texts).split()
    found = np.array(said(binary, path, *words), np.float32).reshape(len(texts), -1)
    assert (found == Runtime.load(path).embed(texts)).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_the_programs_run_under_sanitizers(tiny: Path, tmp_path: Path, kind: str) -> None:
    expected = said(program("generate", tmp_path), tiny, 20, *PROMPT)
    checked = program("generate", tmp_path, *SANITIZERS[kind])
    assert said(checked, tiny, 20, *PROMPT, TSAN_OPTIONS="ignore_noninstrumented_modules=1") == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not here")
def test_the_program_runs_under_valgrind(tmp_path: Path) -> None:
    model, path = make_tiny("llama", tmp_path / "model"), tmp_path / "model.so"
    llmc.compile(model, path, dtype="int4", kernel_cache=CACHE, target="x86-64-v3")  # valgrind knows no AVX-512
    binary = program("generate", tmp_path)
    # What the pool's threads have is "possibly" lost: they run until the process ends.
    leaks = ["--leak-check=full", "--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"]
    valgrind = ["valgrind", "-q", "--error-exitcode=9", *leaks]
    assert said(*valgrind, binary, "-t", 0.9, path, 10, *PROMPT) == said(binary, "-t", 0.9, path, 10, *PROMPT)
    assert said(*valgrind, binary, path, 10, *PROMPT) == greedy(path, PROMPT, 10)


@pytest.mark.slow
def test_a_real_model_writes_the_same_from_c(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    llmc.compile(ROOT / "examples" / "pycoder", path, dtype="int4", kernel_cache=CACHE)
    assert said(program("generate", tmp_path), path, 60, *PROMPT) == greedy(path, PROMPT, 60)
