"""A compile that is killed while it rounds weights goes on where it was, to the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from own_cache import use_own_cache
from tiny_encoders import make_encoder
from tiny_models import make_tiny

import llmc
from llmc.compiler import calibrate as calibration
from llmc.compiler import rounded_parts as parts_module
from llmc.compiler.allocation import others
from llmc.compiler.calibrate import Model, calibrate_model
from llmc.compiler.encodings import encode
from llmc.compiler.encodings.feedback import Rounded
from llmc.compiler.encodings.grouped import grouped
from llmc.compiler.ir.llm import Quantize
from llmc.compiler.ir.op import Param
from llmc.compiler.ir.types import Tensor, parse_encoding
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import lift_model, run_lifted
from llmc.compiler.progress import Silent
from llmc.compiler.rounded_parts import LEFT_SECONDS, RoundedParts, remove_left, rounded_parts
from llmc.errors import CompileError

TEXTS = [np.arange(5, dtype=np.int32), np.arange(7, dtype=np.int32)]


class Told(Silent):
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def keep(parts: RoundedParts, weight: Quantize, found: list[Rounded]) -> list[Rounded]:
    kept = [parts.put(weight, each) for each in found]
    parts.finish(weight)
    return kept


def rounded(encoding: str, rows: int, inputs: int, more: bool = True) -> tuple[Quantize, list[Rounded]]:
    w = np.random.default_rng(rows).standard_normal((rows, inputs)).astype(np.float32)
    kind = grouped(parse_encoding(encoding))
    found = [Rounded(encode(each, w), w.sum(1), np.abs(w).sum(1)) for each in (kind, *(others(kind) if more else ()))]
    return Quantize(Param(f"w{rows}", Tensor(w.shape, "f32")), encoding), found


def assert_same(a: list[Rounded], b: list[Rounded]) -> None:
    assert [each.encoded.encoding for each in a] == [each.encoded.encoding for each in b]
    for one, other in zip(a, b, strict=True):
        assert one.encoded.shape == other.encoded.shape
        assert one.encoded.parts.keys() == other.encoded.parts.keys()
        pairs = [(one.encoded.parts[name], part) for name, part in other.encoded.parts.items()]
        for x, y in [*pairs, (one.powers, other.powers), (one.errors, other.errors)]:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("encoding", ["t4g64", "q4g32a", "q8g64", "t2g64"])
@pytest.mark.parametrize("inputs", [1, 7, 33, 129])
def test_what_is_found_is_what_was_kept(encoding: str, inputs: int, tmp_path: Path) -> None:
    known = dict(rounded(encoding, rows, inputs) for rows in (1, 7, 31))
    before = RoundedParts(tmp_path, tmp_path, list(known))
    assert not before.find(TEXTS, True)
    for weight in list(known)[1:]:
        assert_same(keep(before, weight, known[weight]), known[weight])
    before.keep_texts(TEXTS)
    after = RoundedParts(tmp_path, tmp_path, list(known))
    found = after.find(after.texts(), True)
    assert list(found) == list(known)[1:]
    for weight, became in found.items():
        assert_same(became, known[weight])
    keep(after, next(iter(known)), known[next(iter(known))])
    assert list(after.in_order()) == list(known)  # though the first was the last


def test_of_inputs_that_overflow_there_is_one_encoding(tmp_path: Path) -> None:
    weight, found = rounded("t4g64", 7, 33)
    before = RoundedParts(tmp_path, tmp_path, [weight])
    before.find(TEXTS, True)
    keep(before, weight, found[:1])
    assert_same(RoundedParts(tmp_path, tmp_path, [weight]).find(TEXTS, True)[weight], found[:1])


def test_nothing_else_is_taken_for_it(tmp_path: Path) -> None:
    weight, found = rounded("t4g64", 7, 33)
    before = RoundedParts(tmp_path, tmp_path, [weight])
    before.find(TEXTS, True)
    keep(before, weight, found)
    for texts in (TEXTS[:1], [*TEXTS[:1], TEXTS[1] + 1], [np.concatenate(TEXTS)]):
        assert not RoundedParts(tmp_path, tmp_path, [weight]).find(texts, True)
    unlike = [rounded("t4g64", 8, 33)[0], rounded("t4g64", 7, 34)[0], rounded("t5g64", 7, 33)[0]]
    for other in unlike:
        assert not RoundedParts(tmp_path, tmp_path, [other]).find(TEXTS, True)
    assert not RoundedParts(tmp_path, tmp_path, [weight]).find(TEXTS, False)  # nor what has finer ones besides


def test_what_is_damaged_is_not_believed(tmp_path: Path) -> None:
    weight, found = rounded("t4g64", 2, 7, more=False)
    before = RoundedParts(tmp_path, tmp_path, [weight])
    before.find(TEXTS, False)
    keep(before, weight, found)
    before.keep_texts(TEXTS)

    def believed() -> tuple[int, int]:
        after = RoundedParts(tmp_path, tmp_path, [weight])
        return len(after.texts()), len(after.find(TEXTS, False))

    assert believed() == (len(TEXTS), 1)
    for path in sorted(tmp_path.iterdir()):
        whole, mine = path.read_bytes(), (0, 1) if path.name.startswith("texts") else (len(TEXTS), 0)
        flipped = (
            whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 1 + len(whole) // 40)
        )
        for damaged in (b"", whole[:-1], whole + b"\0", b"[]", b'{"texts": 1, "arrays": []}', *flipped):
            path.write_bytes(damaged)
            assert believed() == mine, (path.name, damaged)
        path.unlink()
        assert believed() == mine
        path.write_bytes(whole)
    assert believed() == (len(TEXTS), 1)


def test_a_folder_is_one_compiles_at_a_time(tmp_path: Path) -> None:
    cache, scratch = tmp_path / "rounded", tmp_path
    with rounded_parts(cache, "key", scratch, []) as first:
        assert first.folder == cache / "key.parts"
        with rounded_parts(cache, "key", scratch, []) as second:
            assert second.folder == scratch
            second.remove()
        remove_left(cache, "key")
        assert first.folder.exists()
        assert scratch.exists()
        with rounded_parts(cache, "other", scratch, []) as other:
            assert other.folder == cache / "other.parts"
    with rounded_parts(cache, "key", scratch, []) as third:
        assert third.folder == cache / "key.parts"
    remove_left(cache, "key")
    assert not third.folder.exists()


def test_where_nothing_can_be_written_there_is_the_scratch_folder(tmp_path: Path) -> None:
    weight, found = rounded("t4g64", 7, 33)
    (tmp_path / "file").write_text("")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with rounded_parts(tmp_path / "file", "key", scratch, [weight]) as parts:
        assert parts.folder == scratch
    with rounded_parts(tmp_path / "cache", "key", scratch, [weight]) as parts:
        parts.find(TEXTS, True)
        shutil.rmtree(parts.folder)  # as where it is full
        assert_same(keep(parts, weight, found), found)
        assert list(scratch.iterdir())
        parts.remove()


def test_what_is_left_goes_after_a_week(tmp_path: Path) -> None:
    for name, age in (("old", 1.1), ("new", 0.9)):
        with rounded_parts(tmp_path, name, tmp_path, []) as parts:
            modified = parts.folder.stat().st_mtime - age * LEFT_SECONDS
            os.utime(parts.folder, (modified, modified))
    with rounded_parts(tmp_path, "next", tmp_path, []):
        assert {path.name for path in tmp_path.iterdir()} == {"new.parts", "next.parts"}


def interrupted_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file of parts that is written and every rounding is an event; the one behind `count` of them is an
    interrupt. Returns the events' names, to which they are added."""
    events: list[str] = []

    def counted(module: object, name: str, counts: Callable[[object], bool]) -> None:
        real = getattr(module, name)

        def event(*arguments: object) -> object:
            if counts(arguments[0]):
                if len(events) == count:
                    raise KeyboardInterrupt
                events.append(name)
            return real(*arguments)

        monkeypatch.setattr(module, name, event)

    counted(parts_module.np, "save", lambda path: ".parts" in str(path))
    counted(parts_module.os, "replace", lambda path: ".parts" in str(path))
    counted(calibration, "encode_with_feedback", lambda _: True)
    return events


def model_of(source: Path) -> Callable[[], Model]:
    lifted = lift_model(str(source), CompileOptions())

    def refuse(_: object) -> list[np.ndarray]:
        raise CompileError("the model is too small for it")

    def anew(schemes: object) -> object:
        return run_lifted(lifted, CompileOptions(overrides=tuple(schemes.items()))).graph  # type: ignore[attr-defined]

    return lambda: Model(lifted, run_lifted(lifted, CompileOptions()).graph, 90, anew, refuse)  # type: ignore[arg-type]


def contents(model: Model, folder: Path, progress: Silent) -> dict[str, bytes]:
    """What a model's weights become: the graph, and arrays by name."""
    folder.mkdir()
    graph, store = calibrate_model(model, CompileOptions(), "", folder, progress)
    return {"graph": str(graph).encode(), **{name: store.load(name).tobytes() for name in store.files}}


@pytest.mark.parametrize("family", ["llama_odd", "albert"])  # ALBERT's layers share their weights
def test_killed_again_and_again_it_comes_to_the_same_end(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes = family != "albert"
    make = model_of(make_tiny(family, tmp_path / family) if decodes else make_encoder(family, tmp_path / family))
    if decodes:
        monkeypatch.setattr(calibration, "random_texts", lambda *a: [ids[:40] for ids in own_random_texts(*a)[:3]])
    use_own_cache(tmp_path / "whole", monkeypatch)
    with monkeypatch.context() as context:
        events = interrupted_after(-1, context)
        expected = contents(make(), tmp_path / "expected", Silent())
    roundings = events.count("encode_with_feedback")
    use_own_cache(tmp_path / "killed", monkeypatch)
    kills, all_roundings = 0, 0
    while True:
        told, folder = Told(), tmp_path / f"{kills}"
        with monkeypatch.context() as context:
            events = interrupted_after(31 + kills % 5, context)
            try:
                found = contents(make(), folder, told)
                break
            except KeyboardInterrupt:
                kills += 1
                all_roundings += events.count("encode_with_feedback")
        assert kills < 20, "it does not get on"
    all_roundings += events.count("encode_with_feedback")
    assert found == expected
    assert kills > 2
    assert all_roundings <= roundings + 4 * kills  # no weight was rounded twice but those that kills had interrupted
    assert len(told.notes) == 1 + any("bits go where" in note for note in told.notes), told.notes
    assert "goes on where a compile of the same was ended" in told.notes[0]
    (kept,) = (tmp_path / "killed" / "rounded").iterdir()
    assert kept.suffix == ".npz"
    kept.with_suffix(".parts").mkdir()  # as of one that was killed when all was kept
    assert contents(make(), tmp_path / "again", Silent()) == expected
    assert list((tmp_path / "killed" / "rounded").iterdir()) == [kept]


own_random_texts = calibration.random_texts

KILLED = """
import os, signal, sys
from pathlib import Path
import llmc
from llmc.compiler import rounded_parts
left, real = int(sys.argv[3]), rounded_parts.np.save
def save(path, array):
    global left
    left -= 1
    real(path, array)
    if left < 0:
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
rounded_parts.np.save = save
llmc.compile(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("saves", [0, 20])  # in the text, in a weight
def test_a_compile_that_was_killed_goes_on(saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny("llama", tmp_path / "llama")
    use_own_cache(tmp_path / "whole", monkeypatch)
    llmc.compile(source, tmp_path / "whole.so")
    use_own_cache(tmp_path / "killed", monkeypatch)
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "model.so"), str(saves)]
    assert subprocess.run(command, timeout=300, check=False).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "killed" / "rounded").glob("*.parts"))) == 1
    told = Told()
    llmc.compile(source, tmp_path / "model.so", progress=told)
    said = [note for note in told.notes if "goes on where" in note]
    assert len(said) == (saves > 0)
    assert (tmp_path / "model.so").read_bytes() == (tmp_path / "whole.so").read_bytes()
    assert not list((tmp_path / "killed" / "rounded").glob("*.parts"))
