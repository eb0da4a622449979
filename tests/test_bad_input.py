"""Bad models, options, places and requests: one clear line, nothing run, and an old artifact stays as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import bad_input_tools as tools
import numpy as np
import pytest
from bad_input_models import MODELS
from bad_input_tools import refused
from tiny_models import make_tiny

import llmc
from llmc.errors import CompileError, FrontendError, LlmcError
from llmc.runtime.errors import ContextError, RuntimeStateError
from llmc.runtime.runtime import Runtime


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in tools.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An artifact that the next compile is to replace, alone in its folder."""
    (tmp_path / "out").mkdir()
    return tools.copy_of(tools.artifact(), tmp_path / "out" / "old.so")


def unchanged(old: Path) -> None:
    """The old artifact is what it was, and nothing lies beside it."""
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    assert old.read_bytes() == tools.artifact().read_bytes()


def test_the_good_model_compiles_and_the_good_artifact_loads(old: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What the other tests damage is whole to begin with."""
    status, out, _ = tools.run(capfd, "compile", tools.model(), *tools.QUICK, "-o", old)
    assert status == 0
    assert out.startswith(f"{old}: ")
    assert np.isfinite(Runtime.load(old).forward([1, 2, 3])).all()


# Models


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_is_refused_and_the_old_artifact_stays(
    name: str, old: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, said = MODELS[name]
    model = tools.copy_of(tools.model(), tmp_path / "model")
    damage(model)
    refused(capfd, said, "compile", model, "-o", old)
    unchanged(old)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("command", ["ir", "estimate", "run"])
def test_every_command_that_reads_a_model_refuses_it_alike(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tools.copy_of(tools.model(), tmp_path / "model")
    (model / "config.json").write_text("{")
    refused(capfd, r"config\.json is not valid JSON", command, model, *(["text"] if command == "run" else []))


def test_from_python_a_bad_model_is_an_exception_of_ours(tmp_path: Path) -> None:
    model = tools.copy_of(tools.model(), tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FrontendError, match=r"model\.safetensors"):
        llmc.compile(model, tmp_path / "x.so")
    with pytest.raises(FrontendError, match=r"model\.safetensors"):
        llmc.from_hf(model)
    with pytest.raises(LlmcError, match="no directory"):
        llmc.from_hf(tmp_path / "nothing")
    with pytest.raises(CompileError, match="unknown option quantisation; the options are"):
        llmc.compile(model, tmp_path / "x.so", quantisation="int4")


PLACES: dict[str, tuple[str, str]] = {
    "nothing": ("nothing/here/at/all", "no directory nothing/here/at/all: give"),
    "a file": ("file", "file is a file: give the directory"),
    "an empty folder": ("empty", r"empty/config\.json is missing"),
    "an empty name": ("", "name is empty"),
    "a hub name without a hub": ("nobody/no-such-model", "no directory nobody/no-such-model"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_model_that_is_not_there(name: str, old: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    Path("empty").mkdir()
    place, said = PLACES[name]
    refused(capfd, said, "compile", place, "-o", old)
    unchanged(old)


def test_a_tokenizer_that_knows_more_than_the_model_is_told_and_its_tokens_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny("llama", tmp_path / "model", num_hidden_layers=1, vocab_size=300)
    whole = (tools.model() / "tokenizer.json").read_bytes()
    (model / "tokenizer.json").write_bytes(whole)
    status, _, err = tools.run(capfd, "compile", model, "-o", "small.so", "-q", "int8")
    assert status == 0
    assert err.count("the tokenizer has ids up to") == 1
    runtime = Runtime.load("small.so")
    text = runtime.tokenizer.decode([runtime.tokenizer.size - 1])
    assert runtime.tokenizer.encode(text)[0] >= 300
    refused(capfd, "token id .* is not in the vocabulary of 300", "run", "small.so", text)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_context_beyond_learned_positions_is_refused(
    family: str, old: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """128 positions (behind two unused rows for opt): kernels would read whatever lies behind the table."""
    model = make_tiny(family, tmp_path / family)
    capfd.readouterr()  # transformers writes a progress bar
    refused(capfd, "--max-context 128 or less", "compile", model, "-o", old, "--max-context", 129)
    unchanged(old)


# Options

OPTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "unknown": (("--faster",), "--faster.*compile --help"),
    "scheme": (("-q", "int7"), "none, bf16, f16, int8, int6, int5, int4, int3, int2, auto, not 'int7'"),
    "group size": (("--group-size", 48), "--group-size is one of 16, 32, 64, 128, 256, channel, not 48"),
    "group size, no number": (("--group-size", "many"), "--group-size"),
    "target": (("--target", "pdp11"), "unknown target 'pdp11'; known: native"),
    "activations": (("--activations", "f64"), "--activations is one of int8, bf16, f32"),
    "head": (("--head", "int7"), "--head is one of"),
    "context of nothing": (("--max-context", 0), "--max-context is at least 32"),
    "context below a page": (("--max-context", 31), "--max-context is at least 32"),
    "context of 10^20": (("--max-context", 10**20), "--max-context is at most"),
    "step": (("--max-step", 1), "--max-step is at least 16"),
    "step of 10^9": (("--max-step", 10**9), "--max-step is at most"),
    "jobs": (("--jobs", 0), "--jobs is at least 1"),
    "seed": (("--seed", -1), "--seed is at least 0"),
    "override without scheme": (("--override", "*.down_proj*"), "--override is PATTERN=SCHEME"),
    "override with bad scheme": (("--override", "*=int7"), r"--override \* is one of"),
    "override with more passes": (("--override", "*},cse{=int8"), "a name pattern has letters"),
    "override that matches nothing": (("--override", "nothing*=int8"), "'nothing\\*' matches no weight"),
    "weights to a folder": (("--weights", "."), r"cannot write \. \(--weights\): it is a folder"),
    "weights to nowhere": (("--weights", "no/such/w.bin"), "no folder no/such"),
    "weights over the artifact": (("--weights", "out/old.so"), r"both the artifact \(-o\) and the weights"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bad_option_is_named(name: str, old: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, said = OPTIONS[name]
    refused(capfd, said, "compile", tools.model(), "-o", old.relative_to(Path.cwd()), *arguments)
    unchanged(old)


def test_with_json_success_is_one_object(old: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import json

    status, out, _ = tools.run(capfd, "compile", tools.model(), *tools.QUICK, "-o", old, "--json")
    assert status == 0
    assert json.loads(out)["path"] == str(old)


# Places to write to


@pytest.mark.parametrize(
    ("place", "said"),
    [(".", "it is a folder"), ("no/such/x.so", "no folder no/such"), ("file/x.so", "no folder file"),
     ("x" * 300 + ".so", "File name too long")],
)  # fmt: skip
def test_a_place_that_cannot_be_written(place: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    refused(capfd, said, "compile", tools.model(), "-o", place)


def test_a_folder_without_permission(
    old: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:  # root may write anywhere: only the question can be answered otherwise
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode, **more: not mode & os.W_OK and access(path, mode, **more))
    else:
        old.parent.chmod(0o555)
    refused(capfd, "no permission to write in", "compile", tools.model(), "-o", old)
    old.parent.chmod(0o755)
    unchanged(old)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_disk_that_fills_up(
    share: float, old: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After this share of the artifact no byte more is taken."""
    room = int(share * tools.artifact().stat().st_size)
    write = os.write

    def limited(descriptor: int, data: bytes | memoryview) -> int:
        nonlocal room
        if f"/{old.parent.name}/." not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return write(descriptor, data)
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(descriptor, data[:room])
        room -= count
        return count

    monkeypatch.setattr(os, "write", limited)
    refused(capfd, rf"cannot write {old}: no space is left in {old.parent}", "compile", tools.model(), "-o", old)
    unchanged(old)


def test_a_failing_compile_keeps_the_weights_file_of_the_old_artifact(
    old: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files or none: an artifact whose weights lie elsewhere knows their hash."""
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"the old ones")
    monkeypatch.setattr("llmc.compiler.artifact.ArtifactWriter._finish", _full)
    refused(capfd, "no space is left", "compile", tools.model(), "-o", old, "--weights", weights)
    assert weights.read_bytes() == b"the old ones"
    assert not list(tmp_path.glob(".*"))
    unchanged(old)


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PATH", "/nonexistent", "no C compiler found: install gcc or clang"),
        ("CC", "/no/such/cc -m64", "there is no C compiler /no/such/cc.*CC names"),
        ("CC", "/bin/false", "C compiler /bin/false failed with exit code 1.*llmc doctor"),
        ("LLMC_CACHE_DIR", "file", "kernel cache file/kernels cannot be written.*LLMC_CACHE_DIR"),
    ],
)
def test_an_environment_that_cannot_compile(
    variable: str,
    value: str,
    said: str,
    old: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("file").touch()
    monkeypatch.setenv(variable, value)
    refused(capfd, said, "compile", tools.model(), "-o", old)
    unchanged(old)


def test_a_damaged_kernel_cache_is_mended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects that a crash of the machine cut short or emptied are made again; old temporary files go."""
    tools.artifact()
    kernels = tmp_path / "cache" / "kernels"
    kernels.parent.mkdir()
    tools.copy_of(tools.CACHE / "kernels", kernels)
    for index, path in enumerate(sorted(kernels.glob("*.o"), key=lambda path: path.stat().st_size)[:3]):
        path.write_bytes(path.read_bytes()[: (0, 40, -1)[index]])
    stale, fresh = kernels / "left.tmp.o", kernels / "used.tmp.o"
    for path in (stale, fresh):
        path.touch()
    os.utime(stale, (0, 0))
    monkeypatch.setenv("LLMC_CACHE_DIR", str(kernels.parent))
    status, _, err = tools.run(capfd, "compile", tools.model(), *tools.QUICK, "-o", "x.so")
    assert status == 0, err
    assert (stale.exists(), fresh.exists()) == (False, True)


# Requests


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.load(tools.artifact())


REQUESTS: dict[str, tuple[Callable[[Runtime], object], str]] = {
    "id too large": (lambda r: r.forward([1, 320]), "token id 320 is not in the vocabulary of 320"),
    "id negative": (lambda r: r.forward([-1]), "token id -1"),
    "id of 2^63": (lambda r: r.forward([1 << 63]), "token id 9223372036854775808"),
    "id beyond any integer": (lambda r: r.forward([1 << 70]), "integers"),
    "ids that are fractions": (lambda r: r.forward([1.5]), "integers, not float64"),
    "ids that are text": (lambda r: r.forward(["a"]), "integers"),
    "ids in rows": (lambda r: r.forward([[1, 2]]), r"not of shape \(1, 2\)"),
    "no ids": (lambda r: r.forward([]), "at least one id"),
    "no prompt": (lambda r: r.generate(""), "the prompt is empty"),
    "no ids of a prompt": (lambda r: r.generate([]), "the prompt is empty"),
    "prompt beyond the context": (lambda r: r.generate([5] * 129), "129 tokens are more than the context of 128"),
    "prompt not Unicode": (lambda r: r.generate("\udcff"), "not valid Unicode"),
    "no tokens wanted": (lambda r: r.generate("a", max_tokens=0), "max_tokens must be 1 or more"),
    "tokens below none": (lambda r: r.generate("a", max_tokens=-1), "max_tokens must be 1 or more"),
    "tokens in text": (lambda r: r.generate("a", max_tokens="9"), "max_tokens must be an integer, not '9'"),
    "temperature NaN": (lambda r: r.generate("a", temperature=float("nan")), "temperature must be 0 .* not nan"),
    "temperature infinite": (lambda r: r.generate("a", temperature=float("inf")), "temperature must be"),
    "temperature negative": (lambda r: r.generate("a", temperature=-0.5), "temperature must be"),
    "top_p above 1": (lambda r: r.generate("a", top_p=1.5), "top_p must be from 0"),
    "top_p NaN": (lambda r: r.generate("a", top_p=float("nan")), "top_p must be from 0"),
    "top_k negative": (lambda r: r.generate("a", top_k=-1), "top_k must be 0"),
    "min_p above 1": (lambda r: r.generate("a", min_p=2.0), "min_p must be from 0"),
    "penalty of nothing": (lambda r: r.generate("a", repetition_penalty=0.0), "repetition_penalty must be above 0"),
    "seed negative": (lambda r: r.generate("a", seed=-1), "seed must be 0 or more"),
    "stop that is a number": (lambda r: r.generate("a", stop=3), "stop must be a string or a list of strings"),
    "stops that are numbers": (lambda r: r.generate("a", stop=["x", 3]), "stop must be a string or a list of strings"),
    "stop ids that are text": (lambda r: r.generate("a", stop_token_ids=["x"]), "stop_token_ids must be a list of"),
    "stop ids that are one": (lambda r: r.generate("a", stop_token_ids=3), "stop_token_ids must be a list of"),
    "unknown option": (lambda r: r.generate("a", temprature=1), "unknown option temprature; the options are"),
    "messages that are numbers": (lambda r: r.chat([1, 2]), "messages"),
    "message without a role": (lambda r: r.chat([{"content": "x"}]), "messages"),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_refused_and_the_next_one_served(name: str, runtime: Runtime) -> None:
    request, said = REQUESTS[name]
    free = runtime.pool.available
    before = runtime.generate("def", max_tokens=3)
    with pytest.raises(RuntimeStateError, match=said):
        request(runtime)
    assert runtime.generate("def", max_tokens=3) == before
    assert runtime.pool.available == free


def test_the_end_of_the_context_is_an_end_and_no_error(runtime: Runtime) -> None:
    stream = runtime.stream([5] * 120, max_tokens=10**6, stop="")
    stream.text()
    assert len(stream.tokens) <= 9  # 8 that fit, and one more that is read by nobody
    assert stream.finish_reason in ("length", "stop")
    with runtime.sequence() as sequence:
        runtime.step([(sequence, [5] * 128, "none")])
        with pytest.raises(ContextError, match="--max-context"):
            runtime.step([(sequence, [5], "last")])


def test_a_model_without_a_template_cannot_chat(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tools.copy_of(tools.model(), tmp_path / "model")
    settings = model / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("chat_template", "no_template"))
    assert tools.run(capfd, "compile", model, *tools.QUICK, "-o", "plain.so")[0] == 0
    refused(capfd, "no chat template: use generate", "chat", "plain.so")
