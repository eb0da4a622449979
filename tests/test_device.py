"""A device whose memory the runtime cannot address gives the same bits as the host, and every verb is what it needs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import fake_artifact
import large_weights
import numpy as np
import pytest
from apart_device import FIRST, Apart, use_apart
from fake_kinds import write_arrays, write_encoder

from llmc.runtime import devices
from llmc.runtime.device import Use
from llmc.runtime.errors import ArtifactError
from llmc.runtime.host import Host
from llmc.runtime.library import Choice, Step
from llmc.runtime.runtime import Runtime

PROMPT = [int(token) for token in np.random.default_rng(3).integers(0, fake_artifact.VOCAB, 129)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_artifact.write(tmp_path_factory.mktemp("device") / "model.so")


def apart(path: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> Runtime:
    """The model on a device of its own; `host` before or after is the other."""
    with monkeypatch.context() as patch:
        use_apart(patch.setitem)
        runtime = Runtime.load(path, threads=2, **options)  # type: ignore[arg-type]
    assert isinstance(runtime.device, Apart)
    return runtime


def host(path: Path) -> Runtime:
    return Runtime.load(path, threads=2)


def texts(runtime: Runtime) -> list[object]:
    """Generation with every kind of choice: greedy, sampled, penalised, processed, filtered late."""
    short = PROMPT[:33]
    kinds: tuple[dict[str, object], ...] = (
        {},
        {"temperature": 1.3},
        {"temperature": 0.9, "top_k": 7, "top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.4},
        {"temperature": 1.0, "repetition_penalty": 1.2, "top_k": 20},
        {"temperature": 1.0, "typical_p": 0.5},
        {"temperature": 1.0, "top_h": 0.6},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [1, 2]},
    )
    found: list[object] = [runtime.generate(short, max_tokens=40, seed=5, **kind) for kind in kinds]  # type: ignore[arg-type]
    found.append(runtime.generate_batch([short, PROMPT[:1], PROMPT], max_tokens=7, temperature=1.0, seed=1))
    return found


def steps(runtime: Runtime) -> list[np.ndarray]:
    """Prompts longer than a step, forks with and without a shared last page, prefixes, rollbacks, many rows."""
    found = []
    with runtime.sequence() as one:
        found.append(runtime.step([(one, PROMPT[:31], "all")]))
        with one.fork() as fork, one.fork() as other:
            found.append(runtime.step([(fork, [7], "last"), (one, [8, 9], "all"), (other, PROMPT[:64], "all")]))
            one.rollback(2)
            found.append(one.append([11]))
            with runtime.lock:
                places = runtime.decode([one, fork, other], [1, 2, 3])
                found += [runtime.fetch_logits(place).copy() for place in places]
                found += [runtime.fetch_logits(place).copy() for place in runtime.decode([fork], [4])]
    with runtime.sequence() as again:
        adopted = again.adopt_prefix([*PROMPT[:31], 11, *PROMPT])
        found.append(np.array(adopted))
        found.append(again.append([*PROMPT[:31], 11, *PROMPT][adopted:]))
    found.append(runtime.forward(PROMPT))
    return found


@pytest.mark.parametrize("what", [texts, steps])
def test_a_decoder_gives_the_bits_of_the_host(
    model: Path, monkeypatch: pytest.MonkeyPatch, what: Callable[[Runtime], list[object]]
) -> None:
    there = apart(model, monkeypatch)
    found, wanted = what(there), what(host(model))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    assert isinstance(there.device, Apart)
    used = there.device.calls
    assert used["run"] > 10
    assert used["open"] == 1
    assert used["copy"] > 0 if what is steps else used["choose"] > 100


def test_logits_are_those_of_the_tokens(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (apart(model, monkeypatch).forward(PROMPT) == fake_artifact.reference_logits(PROMPT)).all()


def test_encoders_and_arrays_give_the_bits_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, arrays = write_encoder(tmp_path / "encoder.so"), write_arrays(tmp_path / "arrays.so")
    batch = [np.array(PROMPT[:count], np.int64) % 50 for count in (1, 7, 31, 33, 5)]
    for a, b in zip(apart(encoder, monkeypatch).encode(batch), host(encoder).encode(batch), strict=True):
        assert a.keys() == b.keys()  # type: ignore[union-attr]
        assert all(np.array_equal(a[name], b[name]) for name in b)  # type: ignore[call-overload, index]
    there, here = apart(arrays, monkeypatch), host(arrays)
    for rows, columns in ((1, 1), (7, 0), (8, 40), (2, 31)):  # smaller and larger than the run before
        random = np.random.default_rng(rows)
        given = {
            "x": random.standard_normal((rows, 3), np.float32),
            "y": random.integers(-5, 5, (rows, columns)),
            "half": random.standard_normal((rows, 3), np.float32),
        }
        found, wanted = there.run(given), here.run(given)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_profiles_count_the_same_steps(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake step counts its calls where others count nanoseconds."""
    for runtime in (apart(model, monkeypatch), host(model)):
        runtime.forward(PROMPT[:5])
        runtime.set_profiling(True)
        with runtime.sequence() as sequence:
            sequence.append(PROMPT)  # three steps
            runtime.decode([sequence], [1])
        assert runtime.profile() == [("whole step", 4)]
        assert [taken.tolist() for taken in runtime.caller.taken] == [[1]] * 4
        runtime.set_profiling(False)


def test_what_is_saved_is_the_file(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apart(model, monkeypatch).save(tmp_path / "saved.so")
    assert (tmp_path / "saved.so").read_bytes() == model.read_bytes()


@pytest.mark.parametrize(
    "options", [{}, {"verify": True}, {"verify": False}, {"share_weights": True}, {"share_weights": False}]
)
def test_weights_are_brought_there_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    """Loading returns before, and the first step waits for them; they are those of the file, and checked."""
    path = large_weights.write(tmp_path / "model.so")
    large_weights.load_later(monkeypatch, tmp_path)
    runtime = apart(path, monkeypatch, **options)
    assert (runtime.forward(large_weights.IDS) == large_weights.RIGHT).all()
    assert not runtime.is_loading
    assert runtime.verified is (options.get("verify") is not False)
    offset, _ = large_weights.place_of(path)
    assert runtime.weights.tobytes() == path.read_bytes()[offset : offset + large_weights.NBYTES]
    assert isinstance(runtime.device, Apart)
    assert runtime.device.calls["upload"] == 4  # of 4 MiB at most
    large_weights.flip(path, offset + large_weights.NBYTES - 1)
    if options.get("verify") is not False:
        with pytest.raises(ArtifactError, match=r"\.llmc\.weights is not what was written"):
            apart(path, monkeypatch, **options).forward(large_weights.IDS)


def test_steps_wait_for_weights_that_are_on_their_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = large_weights.write(tmp_path / "model.so")
    large_weights.load_later(monkeypatch, tmp_path)
    gate = large_weights.Gate(monkeypatch)
    runtime = apart(path, monkeypatch)  # although no piece was hashed yet
    assert runtime.is_loading
    gate.opened.set()
    assert (runtime.forward(large_weights.IDS) == large_weights.RIGHT).all()


def test_a_closed_model_gives_its_memory_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = apart(model, monkeypatch)
    device = runtime.device
    assert isinstance(device, Apart)
    runtime.generate(PROMPT, max_tokens=3, repetition_penalty=1.1)
    runtime.close()
    assert len(runtime.weights) == 0
    del runtime
    gc.collect()
    assert device._memories == {}


def test_an_unknown_kind_of_device_is_refused(tmp_path: Path) -> None:
    target = {**fake_artifact.manifest()["target"], "device": "abacus"}  # type: ignore[dict-item]
    path = fake_artifact.write(tmp_path / "model.so", target=target)
    with pytest.raises(ArtifactError, match=r"'abacus', and this llmc knows host: install a newer llmc, or run: llmc"):
        Runtime.load(path)


def test_the_kinds_that_are_named_are_there() -> None:
    for module, name in devices.KINDS.values():
        assert callable(getattr(__import__(module, fromlist=[name]), name))


@pytest.mark.parametrize("verb", ["run", "choose", "copy"])
def test_a_verb_that_fails_is_raised_and_changes_nothing(
    model: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever called it: C goes on from a hook only to give up."""
    runtime = apart(model, monkeypatch)
    with runtime.sequence() as sequence, sequence.fork():
        sequence.append(PROMPT[:40])
        with sequence.fork() as fork:
            before = runtime.pool.available

            def fail(*_: object) -> int:
                raise KeyboardInterrupt(verb)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=verb):
                if verb == "copy":  # of the page that both have
                    patch.setattr(runtime.device, "copy", fail)
                    fork.append([7])
                else:
                    patch.setattr(runtime.device, verb, fail)
                    runtime.layer.drive(
                        runtime.device.choose, runtime.buffers.copy, lambda number: np.zeros(1, np.float32)
                    )
                    runtime.generate("ab", max_tokens=5)
            assert (fork.length, runtime.pool.available) == (40, before)
            again = fork.append([7])
    assert (again == host(model).forward([*PROMPT[:40], 7])[-1]).all()
    runtime.pool.check()


@pytest.mark.parametrize("use", Use)
def test_places_of_the_host_are_aligned_at_every_size(use: Use) -> None:
    """Buffers of no bytes too. numpy aligns to 16 bytes, so that about one in four would be right by chance."""
    device = Host(1)
    buffers = [device.reserve(nbytes, use) for nbytes in (0, 1, 7, 31, 33, 129, 0, 4096) for _ in range(8)]
    assert all(buffer.number % 64 == 0 for buffer in buffers)
    assert [buffer.nbytes for buffer in buffers[::8]] == [0, 1, 7, 31, 33, 129, 0, 4096]


# The device itself: what it finds


def test_a_place_that_is_none_is_found() -> None:
    device = Apart(1)
    buffer = device.reserve(100, Use.DENSE)
    assert buffer.number >= FIRST
    assert buffer.host is None
    device.copy(buffer.at(0), buffer.at(50), 50)
    with pytest.raises(AssertionError, match="no place"):
        device.copy(buffer.at(0), buffer.at(60), 50)
    with pytest.raises(AssertionError, match="no place"):
        device.run(Step(arena=id(buffer)))
    number = buffer.number
    del buffer
    with pytest.raises(AssertionError, match="no longer"):
        device.choose(Choice(logits=number))
