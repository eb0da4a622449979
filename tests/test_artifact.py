"""The artifact file: what is written is what is read, any damage is found before the code runs, nothing is lost."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gzip
import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_artifact
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler import artifact as writing
from llmc.compiler.artifact import ArtifactWriter, WeightHash, hash_chunk
from llmc.errors import ArtifactError
from llmc.runtime import cpu, manifest
from llmc.runtime.artifact import Artifact
from llmc.runtime.library import Library
from llmc.runtime.runtime import Runtime

RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole artifact; tests must not change it."""
    return fake_artifact.write(tmp_path_factory.mktemp("artifact") / "good.so")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    arrays = [
        RNG.integers(0, 256, size, dtype=np.uint8).view(dtype)
        for size, dtype in ((1, "u1"), (28, "f4"), (66, "f2"), (0, "i8"), (1 << 20, "i1"))
    ]
    path = tmp_path / "model.so"
    with ArtifactWriter(path, fake_artifact.library()) as writer:
        writer.add_section(".llmc.notes", b"odd")
        writer.begin_weights()
        offsets = [writer.append(array) for array in arrays]
        size = writer.end_weights()
        writer.add_manifest(fake_artifact.manifest(weights={"bytes": size, "tensors": []}))
    opened = Artifact.open(path)
    part = opened.parts[".llmc.weights"]
    assert part.offset % 4096 == 0
    assert part.bytes == size
    for offset, array in zip(offsets, arrays, strict=True):
        assert offset % 64 == 0
        start = part.offset + offset
        assert opened.view[start : start + array.nbytes].tobytes() == array.tobytes()
    assert opened.parts[".llmc.notes"].bytes == 3
    opened.check_library()
    opened.close()


@pytest.mark.parametrize("text", [b"", b"{}", fake_artifact.byte_tokenizer()])
def test_a_tokenizer_is_stored_compressed_and_read_as_it_was(text: bytes, tmp_path: Path) -> None:
    path = fake_artifact.write(tmp_path / "model.so", tokenizer=text)
    opened = Artifact.open(path)
    assert opened.tokenizer() == text
    assert opened.parts[".llmc.tokenizer"].bytes < max(64, len(text) / 2)
    opened.close()


def test_a_tokenizer_of_an_older_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    for data, is_whole in ((b'{"model": {}}', True), (gzip.compress(b"{}" * 99)[:-9], False)):
        with ArtifactWriter(path, fake_artifact.library()) as writer:
            writer.add_section(".llmc.tokenizer", data)
            writer.add_manifest(fake_artifact.manifest())
        opened = Artifact.open(path)
        if is_whole:
            assert opened.tokenizer() == data
        else:
            with pytest.raises(ArtifactError, match="tokenizer is not what was written"):
                opened.tokenizer()
        opened.close()


def test_it_stays_a_library_that_tools_and_the_loader_read(good: Path) -> None:
    listing = subprocess.run(["readelf", "-SW", str(good)], check=True, capture_output=True, text=True)
    assert listing.stderr == ""
    for name in (".text", ".llmc.weights", ".llmc.tokenizer", ".llmc.manifest", ".llmc.seal"):
        assert f" {name} " in listing.stdout
    command = ["objcopy", "-O", "binary", "--only-section=.llmc.manifest", "--set-section-flags=.llmc.manifest=alloc"]
    dump = subprocess.run([*command, str(good), "/dev/stdout"], check=True, capture_output=True)
    assert json.loads(dump.stdout)["model"]["name"] == "fake"
    assert ctypes.CDLL(str(good)).llmc_abi() == manifest.ABI


def test_a_library_without_section_table_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stripped = bytearray(fake_artifact.library().read_bytes())
    stripped[0x28:0x30] = bytes(8)
    stripped[0x3C:0x40] = bytes(4)
    library = tmp_path / "stripped.so"
    library.write_bytes(stripped)
    monkeypatch.setattr(fake_artifact, "library", lambda *_: library)
    path = fake_artifact.write(tmp_path / "model.so")
    listing = subprocess.run(["readelf", "-SW", str(path)], check=True, capture_output=True, text=True)
    assert ".llmc.weights" in listing.stdout
    assert Runtime.load(path, threads=1).forward([1]).shape == (1, fake_artifact.VOCAB)


@pytest.mark.parametrize("size", [1, 7, 8, 8191, 8192, 8193, 100_000, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 9 << 20])
def test_both_hashes_agree(good: Path, size: int) -> None:
    """The hash that numpy computes when writing is the one that C computes when loading, on any number of threads."""
    artifact = Artifact.open(good)
    library = Library.load(artifact)
    artifact.close()
    data = RNG.integers(0, 256, size, dtype=np.uint8)
    chunks = [data[start : start + writing.HASH_CHUNK] for start in range(0, size, writing.HASH_CHUNK)]
    expected = [hash_chunk(chunk.data) for chunk in chunks]
    assert library.hash(data, 1).tolist() == expected
    assert library.hash(data, 3).tolist() == expected


@given(st.binary(min_size=1, max_size=20_000), st.data())
@settings(max_examples=50, deadline=None)
def test_any_changed_byte_changes_the_hash(data: bytes, draw: st.DataObject) -> None:
    place = draw.draw(st.integers(0, len(data) - 1))
    change = draw.draw(st.integers(1, 255))
    changed = bytearray(data)
    changed[place] ^= change
    assert hash_chunk(data) != hash_chunk(bytes(changed))
    assert hash_chunk(data) != hash_chunk(data + b"\0")


@given(st.lists(st.integers(0, 3_000_000), max_size=6))
@settings(max_examples=10, deadline=None)
def test_the_hash_of_a_stream_does_not_depend_on_its_pieces(sizes: list[int]) -> None:
    data = memoryview(bytes(range(256)) * (sum(sizes) // 256 + 1))[: sum(sizes)]
    whole, pieces = WeightHash(), WeightHash()
    whole.update(data)
    start = 0
    for size in sizes:
        pieces.update(data[start : start + size])
        start += size
    assert whole.hexdigest() == pieces.hexdigest()


def refuse_to_load(artifact: Artifact) -> Library:
    raise AssertionError("the code was loaded before the damage was found")


def test_one_flipped_byte_anywhere_is_found(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the header, the code, every section, the padding, the tables and the seal: before the code is loaded, and for
    the weights before they are used. The message names the part and says what to do."""
    data = good.read_bytes()
    opened = Artifact.open(good)
    parts = list(opened.parts.values())
    opened.close()
    library = Library.load(Artifact.open(good))
    places = [*range(64), *range(len(data) - 48, len(data)), *RNG.integers(0, len(data), 150).tolist()]
    for part in parts:
        places += [part.offset, part.offset + part.extent // 2, part.offset + part.extent - 1]
    path = tmp_path / "damaged.so"
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << int(RNG.integers(8))
        path.write_bytes(changed)
        part = next((p for p in parts if p.offset <= place < p.offset + p.extent), None)
        in_weights = part is not None and part.name == ".llmc.weights"
        monkeypatch.setattr(Library, "load", (lambda _: library) if in_weights else refuse_to_load)
        with pytest.raises(ArtifactError, match=r"again|not an artifact|Run: llmc compile") as caught:
            Runtime.load(path, threads=1)
            pytest.fail(f"byte {place} of {part} was not found")
        if part is not None and place >= 64 and part.name != "library":
            assert part.name in str(caught.value), place
    monkeypatch.undo()


def test_without_verify_only_the_weights_are_not_read(good: Path, tmp_path: Path) -> None:
    data = bytearray(good.read_bytes())
    artifact = Artifact.open(good)
    data[artifact.parts[".llmc.weights"].offset] ^= 1
    path = tmp_path / "damaged.so"
    path.write_bytes(data)
    assert Runtime.load(path, threads=1, verify=False).forward([1]).shape == (1, fake_artifact.VOCAB)
    data[artifact.parts["library"].bytes // 2] ^= 1
    path.unlink()  # the loaded library stays mapped: overwriting it would crash this process when it ends
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="library"):
        Runtime.load(path, threads=1, verify=False)


def test_a_file_cut_short_at_any_length_is_refused(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    path = tmp_path / "short.so"
    for length in [*range(70), *range(70, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"short\.so"):
            Runtime.load(path, threads=1)


def write_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def without_manifest(path: Path) -> None:
    with ArtifactWriter(path, fake_artifact.library()) as writer:
        writer.begin_weights()
        writer.append(fake_artifact.weights())


def changed_manifest(**changes: object) -> Callable[[Path], object]:
    return lambda path: fake_artifact.write(path, **changes)


OTHER_ARCH = "aarch64" if cpu.architecture() == "x86_64" else "x86_64"
MODEL = {"name": "fake", "source": "models/fake", "parameters": 1, "bits_per_weight": 8}
BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file.*llmc compile"),
    "folder": (Path.mkdir, "is a folder"),
    "empty": (write_bytes(b""), "is empty"),
    "zeros": (write_bytes(bytes(100_000)), "not an ELF"),
    "text": (write_bytes(b"hello " * 100), "not an ELF"),
    "elf magic only": (write_bytes(b"\x7fELF"), "ELF header"),
    "plain library": (lambda path: path.write_bytes(fake_artifact.library().read_bytes()), "llmc did not make"),
    "no manifest": (without_manifest, r"no \.llmc\.manifest section"),
    "other architecture": (
        changed_manifest(target={"name": "other", "arch": OTHER_ARCH, "features": []}),
        f"is for {OTHER_ARCH}.*llmc compile models/fake --target native",
    ),
    "other cpu": (
        changed_manifest(target={"name": "future", "arch": cpu.architecture(), "features": ["warp9", "avx9"]}),
        "needs avx9, warp9, which this CPU does not have. Run: llmc compile models/fake --target native -o ",
    ),
    "newer schema": (changed_manifest(schema=2), "newer llmc"),
    "older schema": (changed_manifest(schema=0), "older llmc"),
    "other abi": (changed_manifest(abi=9), "ABI 9"),
    "weights too short": (changed_manifest(weights={"bytes": 5000, "tensors": []}), "300 bytes of weights"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_get_a_clear_error_before_loading(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, message = BAD_FILES[name]
    path = tmp_path / "model.so"
    make(path)
    if name != "weights too short":
        monkeypatch.setattr(Library, "load", refuse_to_load)
    with pytest.raises(ArtifactError, match=message):
        Runtime.load(path, threads=1)


def test_a_seal_cannot_point_outside_of_the_file(good: Path, tmp_path: Path) -> None:
    """A seal with a right hash and wrong contents: hostile, not damaged."""
    data = good.read_bytes()
    length = struct.unpack_from("<Q", data, len(data) - 16)[0]
    body = data[: len(data) - 48 - length]
    seal = json.loads(data[len(body) : len(body) + length])
    path = tmp_path / "hostile.so"
    for change in (
        {"offset": -1},
        {"offset": 1 << 62},
        {"extent": 1 << 62},
        {"bytes": 1 << 62},
        {"bytes": -5},
        {"name": 3},
        {"hash": None},
        {"extent": "x"},
    ):
        for index in range(len(seal["parts"])):
            parts = [dict(part) for part in seal["parts"]]
            parts[index] |= change
            if all(str(parts[index][key]) == str(seal["parts"][index][key]) for key in change):
                continue
            text = json.dumps({"schema": 1, "parts": parts}).encode()
            digest = hashlib.sha256(text).digest()
            path.unlink(missing_ok=True)  # writing into a library that is loaded would change its code
            path.write_bytes(body + text + digest + struct.pack("<Q", len(text)) + b"LLMCSEAL")
            with pytest.raises(ArtifactError):
                Runtime.load(path, threads=1)
                pytest.fail(f"{change} of part {index} was not found")


HOSTILE = [
    ("step", "max_step", 0),
    ("step", "max_step", 1 << 40),
    ("step", "max_step", True),
    ("step", "page", -1),
    ("step", "page", "32"),
    ("step", "vocab_size", 2.5),
    ("step", "arena_bytes", 1 << 60),
    ("step", "state", "maybe"),
    ("weights", "bytes", -1),
    ("weights", "tensors", [{"name": "x", "offset": 200, "nbytes": 200}]),
    ("weights", "tensors", [{"name": "x", "offset": -8, "nbytes": 8}]),
    ("weights", "tensors", {"x": 1}),
    ("kv", "layers", [{"kv_heads": 0, "head_dim": 2, "value_dim": 2, "dtype": "float32"}]),
    ("kv", "layers", [{"kv_heads": 1, "head_dim": 2, "value_dim": 2, "dtype": "complex"}]),
    ("kv", "layers", 3),
    ("tokenizer", "stop_ids", ["x"]),
    ("tokenizer", "chat_template", 5),
    ("tokenizer", "bos_id", 300),
    ("generation", "temperature", -1),
    ("generation", "top_p", "hot"),
    ("target", "features", [1]),
    ("model", "source", None),
]


@pytest.mark.parametrize(("section", "key", "value"), HOSTILE)
def test_a_hostile_manifest_is_refused_by_name(section: str, key: str, value: object) -> None:
    facts = fake_artifact.manifest()
    entry = dict(facts[section])  # type: ignore[call-overload]
    entry[key] = value
    with pytest.raises(ArtifactError, match=key):
        manifest.parse(json.dumps({**facts, section: entry}).encode())


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"[]", b"{}", b"[" * 100_000, b'{"schema": NaN}', b'{"schema": 1e99}']
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        manifest.parse(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data(), JSON)
@settings(max_examples=200, deadline=None)
def test_any_value_in_any_field_is_parsed_or_refused(draw: st.DataObject, value: object) -> None:
    facts = json.loads(json.dumps(fake_artifact.manifest()))
    place = facts
    while True:
        key = draw.draw(st.sampled_from(sorted(place)))
        if not (isinstance(place[key], dict) and place[key] and draw.draw(st.booleans())):
            break
        place = place[key]
    place[key] = value
    with contextlib.suppress(ArtifactError):
        manifest.parse(json.dumps(facts).encode())


# Writing


def write_some(path: Path, size: int = 100_000) -> None:
    with ArtifactWriter(path, fake_artifact.library()) as writer:
        writer.begin_weights()
        for _ in range(10):
            writer.append(np.ones(size, np.uint8))


def test_an_error_while_compiling_leaves_the_old_artifact(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(path, fake_artifact.library()) as writer:
        writer.begin_weights()
        writer.append(np.ones(1000))
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == {"model.so"}


def test_a_full_disk_leaves_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
        with pytest.raises(ArtifactError, match="larger than the system allows"):
            write_some(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def no_space(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", no_space)
        with pytest.raises(ArtifactError, match=r"no space is left in .*unchanged"):
            write_some(path)
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == {"model.so"}


@pytest.mark.parametrize("place", ["nowhere/model.so", "."])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    with pytest.raises(ArtifactError, match="cannot write"):
        write_some(tmp_path / place)


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"lost\.so cannot be read"),
        ArtifactWriter(tmp_path / "model.so", tmp_path / "lost.so"),
    ):
        pass


KILLED = """
import sys, time
import numpy as np
from llmc.compiler.artifact import ArtifactWriter
with ArtifactWriter(sys.argv[1], sys.argv[2]) as writer:
    writer.begin_weights()
    writer.append(np.ones(100000))
    print("writing", flush=True)
    time.sleep(1e6)
"""


def test_kill_while_writing_loses_nothing_and_is_cleaned_up(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    fake_artifact.write(path)
    before = path.read_bytes()
    command = [sys.executable, "-c", KILLED, str(path), str(fake_artifact.library())]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    (temporary,) = files(tmp_path) - {"model.so"}

    write_some(path)  # a second compile, while the first one lives, does not touch what is not its own
    assert files(tmp_path) == {"model.so", temporary}

    fake_artifact.write(path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert path.read_bytes() == before
    assert Runtime.load(path, threads=1).forward([1]).shape == (1, fake_artifact.VOCAB)

    fake_artifact.write(path)  # the next one removes what the dead one left
    assert files(tmp_path) == {"model.so"}


def test_two_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    first = ArtifactWriter(path, fake_artifact.library())
    second = ArtifactWriter(path, fake_artifact.library())
    with first:
        with second:
            for writer in (first, second, first, second):
                if writer._weights_start is None:
                    writer.begin_weights()
                writer.append(np.full(5000, 1 if writer is first else 2, np.uint8))
            second.add_manifest(fake_artifact.manifest(weights={"bytes": 10_056, "tensors": []}))
        opened = Artifact.open(path)
        assert opened.view[opened.parts[".llmc.weights"].offset] == 2
        opened.close()
        first.add_manifest(fake_artifact.manifest(weights={"bytes": 10_056, "tensors": []}))
    opened = Artifact.open(path)
    assert opened.view[opened.parts[".llmc.weights"].offset] == 1
    opened.close()
    assert files(tmp_path) == {"model.so"}


def test_an_artifact_that_is_compiled_again_loads_as_the_new_one(tmp_path: Path) -> None:
    """The loader knows libraries by name, and must not give the old code for the old name."""
    path = fake_artifact.write(tmp_path / "model.so")
    old = Runtime.load(path, threads=1)
    changed = fake_artifact.STEP.replace("+ weights[v]", "+ 1u + weights[v]")
    fake_artifact.write(path, source=changed)
    new = Runtime.load(path, threads=1)
    assert (old.forward([5]) == fake_artifact.reference_logits([5])).all()
    assert (new.forward([5]) != fake_artifact.reference_logits([5])).any()


def test_a_loaded_artifact_that_is_overwritten_in_place_is_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(good.read_bytes())
    keep = Runtime.load(path, threads=1)
    os.utime(path, ns=(1, 1))
    Runtime.load(path, threads=1)  # another time is no other file
    file = (path.stat().st_dev, path.stat().st_ino)
    _, library = Library._loaded[file]
    Library._loaded[file] = ("the hash of other code", library)  # really overwriting it would end this process
    with pytest.raises(ArtifactError, match="overwritten while it was loaded"):
        Runtime.load(path, threads=1)
    del keep


def test_a_loaded_artifact_can_be_saved(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.load(good, threads=1)
    runtime.save(tmp_path / "copy.so")
    assert (tmp_path / "copy.so").read_bytes() == good.read_bytes()
    with pytest.raises(ArtifactError, match="unchanged"):
        runtime.save(tmp_path / "nowhere" / "copy.so")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ArtifactError, match=r"no space is left in .*unchanged"):
        runtime.save(tmp_path / "copy.so")
    assert files(tmp_path) == {"copy.so"}


@pytest.mark.parametrize("empty_section", [False, True])
def test_weights_can_lie_in_another_file(tmp_path: Path, empty_section: bool) -> None:
    path = tmp_path / "model.so"
    digest = WeightHash()
    digest.update(fake_artifact.weights().data)
    entry = {"bytes": fake_artifact.VOCAB, "tensors": [], "hash": digest.hexdigest()}
    with ArtifactWriter(path, fake_artifact.library()) as writer:
        if empty_section:
            writer.begin_weights()
        writer.add_manifest(fake_artifact.manifest(weights=entry, tokenizer=None))
    with pytest.raises(ArtifactError, match="without weights"):
        Runtime.load(path)
    outside = tmp_path / "weights.bin"
    with pytest.raises(ArtifactError, match="does not hold"):
        Runtime.load(path, weights=outside)
    outside.write_bytes(fake_artifact.weights().tobytes())
    runtime = Runtime.load(path, threads=1, weights=outside)
    assert (runtime.forward([5, 6]) == fake_artifact.reference_logits([5, 6])).all()
    outside.write_bytes(bytes(fake_artifact.VOCAB))
    with pytest.raises(ArtifactError, match="damaged"):
        Runtime.load(path, weights=outside)


def test_loading_imports_no_compiler(good: Path) -> None:
    """Loading and running by ids needs numpy and nothing else; text needs tokenizers, chat needs jinja2."""
    code = f"""
import sys
from llmc.runtime.runtime import Runtime
runtime = Runtime.load({str(good)!r}, threads=1)
runtime.forward([1, 2, 3])
heavy = {{"torch", "tvm", "transformers", "onnx", "safetensors", "tvm_ffi"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert not {{"tokenizers", "jinja2"}} & set(sys.modules)
runtime.generate("abc", max_tokens=3)
runtime.chat("abc", max_tokens=3)
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert not any(name.startswith(("llmc.compiler", "llmc.frontends", "llmc.targets")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=600)


def resident_bytes() -> int:
    """Memory of this process that is really there."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_of_a_large_cache_is_not_touched(good: Path) -> None:
    before = resident_bytes()
    runtime = Runtime.load(good, threads=1, kv_memory=1 << 36)
    assert runtime.pool.capacity > 1 << 20
    runtime.forward([1, 2, 3])
    assert resident_bytes() - before < 64 << 20  # of 64 GiB


def test_a_manifest_that_is_revised_takes_the_room_of_the_first(tmp_path: Path) -> None:
    """Nothing else moves: the library may be loaded. Hashes are those of what is there."""
    long = fake_artifact.manifest(model={"name": "x" * 500, "source": "", "parameters": 1, "bits_per_weight": 8.0})
    short = fake_artifact.manifest()
    seen: list[bytes] = []

    def write_one(path: Path, revision: dict[str, object] | None) -> Artifact:
        def revise(place: Path) -> dict[str, object] | None:
            seen.append(place.read_bytes())
            return revision

        with ArtifactWriter(path, fake_artifact.library()) as writer:
            writer.begin_weights()
            writer.append(fake_artifact.weights())
            writer.add_tokenizer(fake_artifact.byte_tokenizer())
            writer.add_manifest(short, like=long)
            writer.revise = revise
        opened = Artifact.open(path)
        opened.close()
        return opened

    plain, revised = write_one(tmp_path / "plain.so", None), write_one(tmp_path / "revised.so", long)
    assert plain.manifest.model.name == "fake"
    assert revised.manifest.model.name == "x" * 500
    assert seen[0] == seen[1] == (tmp_path / "plain.so").read_bytes()
    for name, part in plain.parts.items():
        other = revised.parts[name]
        assert (part.offset, part.bytes) == (other.offset, other.bytes)
        assert (part.hash == other.hash) is (name != ".llmc.manifest")
    Runtime.load(tmp_path / "revised.so", 1, verify=True)
    with pytest.raises(ArtifactError, match="does not fit the room"):
        write_one(tmp_path / "much.so", fake_artifact.manifest(generation={"x": "y" * 2000}))
    assert not (tmp_path / "much.so").exists()
