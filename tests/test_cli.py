"""The command line: every command's help, one-line errors, and --json that is one object and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import fake_artifact
import pytest
import typer

from llmc import cli
from llmc.cli.app import app, command
from llmc.cli.graph_diff import graph_diff
from llmc.cli.output import size

COMMANDS = (
    "compile",
    "quantize",
    "run",
    "chat",
    "embed",
    "classify",
    "bench",
    "eval",
    "inspect",
    "verify",
    "explain",
    "ir",
    "estimate",
    "doctor",
)
EXAMPLE = Path(__file__).parent.parent / "examples" / "pycoder"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose step is a handwritten hash: any text, in no time."""
    explained = {
        "passes": [
            {"name": "fuse-norm", "hits": {"rms": 2}, "refusals": [["t.mean", "no weight"]], "seconds": 0.1,
             "ops_before": 9, "ops_after": 5}
        ],
        "kernels": [
            {"op": "llm.linear", "type": "", "count": 3, "chosen": "plain", "reason": "all that is left",
             "rejected": [["fast", "needs avx9"]],
             "kernels": [
                 {"kernel": "gemv", "parameters": ["n=2", "k=1"], "when": [["T", 1, 1]], "origin": "default formula"},
                 {"kernel": "gemm", "parameters": ["n=2", "flat"], "when": [["R", 17, None]],
                  "origin": "default formula"},
             ]}
        ],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("cli") / "fake.so"
    text = dict(fake_artifact.manifest()["tokenizer"])  # type: ignore[call-overload]
    text["chat_template"] = None
    # Logits of 0 to 15 instead of 16 bits, so that there is a perplexity.
    step = fake_artifact.STEP.replace(">> 48", ">> 60")
    fake_artifact.write(path, step, explain=explained, tokenizer_facts=text)
    return path


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout, stderr of one command in this process."""
    status = cli.run([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return status, out, err


def plain(text: str) -> str:
    """Without colours, line breaks and the frames around them."""
    return re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text))


def test_the_commands_are_those_that_are_documented() -> None:
    assert set(command().commands) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, name, "--help")
    assert status == 0
    assert err == ""
    assert "Example" in out
    assert f"llmc {name} " in plain(out)


def test_every_example_parses() -> None:
    """Each line of each epilogue names options that exist: it is parsed as far as the command's function."""
    import shlex

    examples = re.findall(r"`(llmc [^`]+)`", "\n".join(str(info.epilog) for info in app.registered_commands))
    assert len(examples) >= len(COMMANDS)
    for example in examples:
        _, name, *rest = shlex.split(example)
        parser = command().commands[name]
        parser.make_context(name, rest)  # raises a usage error


BAD = [
    (("compile",), "MODEL"),
    (("compile", "/no/such/model"), "/no/such/model"),
    (("compile", EXAMPLE / "heldout.txt"), "heldout.txt"),
    (("compile", EXAMPLE, "--wrong"), "--wrong"),
    (("compile", EXAMPLE, "-q", "int7"), "int4"),
    (("compile", EXAMPLE, "--group-size", "33"), "128"),
    (("compile", EXAMPLE, "--group-size", "many"), "--group-size"),
    (("compile", EXAMPLE, "--target", "pdp11", "-o", "x.so"), "x86-64-v3"),
    (("compile", EXAMPLE, "--override", "nothing"), "--override"),
    (("compile", EXAMPLE, "--activations", "f64"), "bf16"),
    (("compile", EXAMPLE, "--max-context", "0"), "--max-context"),
    (("compile", EXAMPLE, "-o", "/no/such/folder/x.so"), "/no/such/folder"),
    (("compile", EXAMPLE, "-o", "/tmp"), "/tmp"),
    (("run", "/no/such/model", "text"), "/no/such/model"),
    (("run", "nothing.so", "text"), "nothing.so"),
    (("run", "ARTIFACT", "text", "--top-p", "7"), "top_p"),
    (("run", "ARTIFACT", "text", "--max-tokens", "0"), "max_tokens"),
    (("run", "ARTIFACT", "text", "--threads", "0"), "threads"),
    (("run", "ARTIFACT", ""), "prompt"),
    (("run", EXAMPLE / "heldout.txt", "text"), "heldout.txt"),
    (("chat", "ARTIFACT"), "chat template"),
    (("bench", "ARTIFACT", "--batch", "0"), "batch"),
    (("bench", "ARTIFACT", "--prompt-tokens", "1000000"), "--prompt-tokens"),
    (("bench", "nothing.so"), "nothing.so"),
    (("eval", "ARTIFACT"), "--text"),
    (("eval", "ARTIFACT", "--text", "nothing.txt"), "nothing.txt"),
    (("eval", "ARTIFACT", "--text", EXAMPLE / "model.safetensors"), "UTF-8"),
    (("eval", "ARTIFACT", "--text", EXAMPLE / "heldout.txt", "--window", "1"), "window"),
    (("eval", "ARTIFACT", "--text", EXAMPLE / "heldout.txt", "--window", "16", "--reference", "/no/dir"), "/no/dir"),
    (("inspect", EXAMPLE), "folder"),
    (("inspect", EXAMPLE / "config.json"), "config.json"),
    (("explain", "nothing.so"), "nothing.so"),
    (("estimate", EXAMPLE, "--sequences", "0"), "--sequences"),
    (("ir", "/no/such/model"), "/no/such/model"),
    (("nothing",), "nothing"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=lambda value: " ".join(map(str, value))[-60:])
def test_bad_input_is_one_line(
    arguments: tuple[object, ...], said: str, artifact: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capfd, *(artifact if item == "ARTIFACT" else item for item in arguments))
    assert status in (1, 2)
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("llmc: error: ")
    assert said in err
    assert "bug" not in err


def test_with_json_an_error_is_an_object_too(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "inspect", "nothing.so", "--json")
    assert status == 1
    assert "nothing.so" in json.loads(out)["error"]
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("run", "ARTIFACT", "hello", "-n", "5", "--seed", "1"), {"text", "decode_tokens_per_second"}),
        (("inspect", "ARTIFACT"), {"manifest", "checked", "file_bytes"}),
        (("explain", "ARTIFACT"), {"passes", "kernels"}),
        (
            ("bench", "ARTIFACT", "--prompt-tokens", "5", "--gen-tokens", "3", "--repeats", "1"),
            {"prefill_tokens_per_second", "decode_tokens_per_second", "weight_bytes_per_token", "gigabytes_per_second",
             "bandwidth_percent", "load_seconds", "peak_memory_bytes"},
        ),
        (("eval", "ARTIFACT", "--text", "TEXT", "--window", "24"), {"perplexity", "tokens", "windows"}),
        (("doctor",), {"ok", "findings", "targets"}),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_json_is_exactly_one_object_on_stdout(
    arguments: tuple[str, ...],
    keys: set[str],
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmc.runtime.limits.memory_bandwidth", lambda threads: 1e10)
    text = tmp_path / "text.txt"
    text.write_text("some words to predict " * 4)
    given = {"ARTIFACT": artifact, "TEXT": text}
    status, out, _ = run(capfd, *(given.get(item, item) for item in arguments), "--json")
    assert status == 0
    found = json.loads(out)
    assert isinstance(found, dict)
    assert keys <= set(found)


def test_run_streams_text_to_stdout_and_speed_to_stderr(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "run", artifact, "hello", "-n", "5", "--seed", "3", "--temperature", "1")
    again = run(capfd, "run", artifact, "hello", "-n", "5", "--seed", "3", "--temperature", "1")
    assert status == 0
    assert out == again[1]
    assert re.search(r"5 tokens after a prompt of \d+: .*tokens/s", err)


def test_run_reads_the_prompt_from_stdin(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    piped = run(capfd, "run", artifact, "-", "-n", "4")
    assert piped[1] == run(capfd, "run", artifact, "hello", "-n", "4")[1]


def test_explain_names_what_was_chosen_and_what_was_refused(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capfd, "explain", artifact)
    for said in ("fuse-norm (9 -> 5): rms 2", "t.mean: no weight", "3 x llm.linear: plain", "not fast: needs avx9"):
        assert said in out
    assert out.endswith("""
Kernels: the rows of a step that each serves, parameters by default formula
  3 x llm.linear: plain (all that is left)
    1            gemv(n=2, k=1)
    17 and more  gemm(n=2, flat)
    not fast: needs avx9
""")


def test_explain_tells_origins_apart_where_they_differ(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kernels = [
        {"kernel": name, "parameters": ["n=2"], "when": [], "origin": origin}
        for name, origin in (("gemv", "default formula"), ("gemm", "measured"))
    ]
    entry = {"op": "llm.linear", "count": 1, "chosen": "linear", "reason": "", "rejected": [], "kernels": kernels}
    fake_artifact.write(tmp_path / "fake.so", explain={"passes": [], "kernels": [entry, {**entry, "count": 7}]})
    _, out, _ = run(capfd, "explain", tmp_path / "fake.so")
    assert "    any  gemv(n=2) by default formula\n    any  gemm(n=2) by measured\n" in out
    assert "parameters by" not in out
    assert "8 x llm.linear: linear\n" in out  # what reads the same is said once


def test_explain_space_lists_knobs_with_what_they_may_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    knobs = {
        "chains": {"value": 4, "exact": False, "values": [1, 2, 4]},
        "least": {"value": 64, "exact": True, "values": [64, 128]},
    }
    space = {"version": 1, "legal": 6, "exact": False, "knobs": knobs}
    kernels = [
        {"kernel": "norm", "parameters": ["n=2", "chains=4"], "when": [], "origin": "default formula", "space": space},
        {"kernel": "gemv", "parameters": ["n=2"], "when": [], "origin": "default formula", "space": None},
    ]
    entry = {"op": "llm.linear", "count": 1, "chosen": "linear", "reason": "", "rejected": [], "kernels": kernels}
    fake_artifact.write(tmp_path / "fake.so", explain={"passes": [], "kernels": [entry, entry]})
    status, out, _ = run(capfd, "explain", tmp_path / "fake.so", "--space")
    assert status == 0
    assert out == (
        "norm(n=2): 6 ways, bits depend on those with *, by default formula\n"
        "  chains*  1 2 [4]\n"
        "  least    [64] 128\n"
        "gemv(n=2): no knobs are declared\n"
    )


def test_inspect_finds_a_flipped_byte_in_every_part(
    artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = artifact.read_bytes()
    for position in (1000, len(data) // 2, len(data) - 40):
        broken = bytearray(data)
        broken[position] ^= 1
        path = tmp_path / "broken.so"
        path.write_bytes(broken)
        status, out, err = run(capfd, "inspect", path)
        assert (status, out) == (1, "")
        assert "damaged" in err


def test_an_unexpected_error_is_one_line_and_a_traceback_on_request(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("something\nodd")

    monkeypatch.setattr("llmc.runtime.artifact.Artifact.open", fail)
    status, out, err = run(capfd, "inspect", artifact)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert "ValueError: something odd" in err
    _, _, err = run(capfd, "--debug", "inspect", artifact)
    assert "Traceback" in err


@pytest.mark.parametrize(("module", "advice"), [("torch._C", "llmc[compile]"), ("jinja2", "pip install llmc")])
def test_a_missing_package_is_named_with_what_installs_it(
    module: str, advice: str, artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("llmc.runtime.artifact.Artifact.open", missing)
    status, out, err = run(capfd, "inspect", artifact)
    assert (status, out) == (1, "")
    assert module in err
    assert advice in err


def test_ctrl_c_ends_quietly(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmc.runtime.runtime.Runtime.load", interrupt)
    status, out, err = run(capfd, "run", artifact, "hello")
    assert (status, out) == (130, "")
    assert err == "llmc: stopped\n"


def test_chat_keeps_the_history_until_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chat.so"
    text = dict(fake_artifact.manifest()["tokenizer"])  # type: ignore[call-overload]
    text["chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    fake_artifact.write(path, tokenizer_facts=text)
    lines = iter(["one", "/wrong", "two", "/reset", "three", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda _prompt="": next(lines))
    status, out, err = run(capfd, "chat", path, "--system", "be brief", "-n", "3", "--json")
    assert status == 0
    assert "unknown command /wrong" in err
    said = [(message["role"], message["content"]) for message in json.loads(out)["messages"]]
    assert said[:2] == [("system", "be brief"), ("user", "three")]
    assert len(said) == 3


def test_the_program_and_the_module_are_installed() -> None:
    for start in ([str(Path(sys.executable).parent / "llmc")], [sys.executable, "-m", "llmc"]):
        shown = subprocess.run([*start, "--version"], capture_output=True, text=True, timeout=600)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert re.match(r"llmc \d+\.\d+", shown.stdout)


def test_a_closed_pipe_is_no_error(artifact: Path) -> None:
    """`llmc inspect ... | true`: the reader goes away first."""
    shell = f"{sys.executable} -m llmc inspect {artifact} --weights | true"
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=600)
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr


def test_graph_diff_does_not_see_numbers() -> None:
    before = "a\n  %0 = x()\n  %1 = drop(%0)\n  %2 = y(%1)\n  %3 = z(%2)\n"
    after = "a\n  %0 = x()\n  %1 = y(%0)\n  %2 = z(%1)\n"
    diff = graph_diff(before, after, "before", "after")
    changed = [line for line in diff.splitlines() if line[:1] in "+-"][2:]
    assert changed == ["-  %1 = drop(%0)"]
    assert graph_diff(before, before, "a", "b") == ""


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")])
def test_sizes_for_people(count: int, text: str) -> None:
    assert size(count) == text


def test_usage_errors_are_those_of_the_parser() -> None:
    from llmc.cli.usage import is_usage_error

    assert is_usage_error(typer.BadParameter("x"))
    assert not is_usage_error(ValueError("x"))
