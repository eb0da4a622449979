"""Standard streams that are closed, full, busy or of another encoding: one clear line, and --json is one object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_artifact
import pytest
from fake_kinds import write_encoder
from test_cli import run

from llmc.cli.encoding import read_texts
from llmc.errors import LlmcError

LLMC = f"{sys.executable} -m llmc"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_artifact.write(tmp_path_factory.mktemp("streams") / "fake.so")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("streams") / "encoder.so")


def shell(command: str, **variables: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a line of bash; nothing in either may be a traceback."""
    ended = subprocess.run(["bash", "-c", command], capture_output=True, env={**os.environ, **variables})
    out, err = ended.stdout.decode(errors="replace"), ended.stderr.decode(errors="replace")
    for said in ("Traceback", "a bug in llmc", "Exception ignored"):
        assert said not in out + err
    return ended.returncode, out, err


@pytest.mark.parametrize("options", ["", "--json"])
@pytest.mark.parametrize(
    ("stream", "said"),
    [(">&-", "stdout: it is closed"), ("> /dev/full", "stdout: No space left on device")],
    ids=["closed", "full"],
)
def test_results_that_nobody_gets_are_an_error(artifact: Path, options: str, stream: str, said: str) -> None:
    status, out, err = shell(f"{LLMC} inspect {artifact} {options} {stream}")
    assert (status, out) == (1, "")
    assert said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("stream", ["2>&-", "2> /dev/full"])
def test_messages_that_nobody_gets_change_nothing(artifact: Path, encoder: Path, tmp_path: Path, stream: str) -> None:
    status, out, _ = shell(f"{LLMC} inspect {tmp_path}/nothing.so --json {stream}")
    assert status == 1 and "no such file" in json.loads(out)["error"]
    status, out, _ = shell(f"{LLMC} embed {encoder} a --json -o {tmp_path}/v.npy {stream}")
    assert status == 0 and json.loads(out)["path"] == f"{tmp_path}/v.npy"


def test_all_streams_closed_writes_into_no_file_by_accident(encoder: Path, tmp_path: Path) -> None:
    status, _, _ = shell(f"{LLMC} embed {encoder} a -o {tmp_path}/v.npy <&- >&- 2>&-")
    assert status == 0
    assert (tmp_path / "v.npy").read_bytes().startswith(b"\x93NUMPY")


def test_a_closed_stdin_is_an_empty_one(artifact: Path, encoder: Path) -> None:
    _, _, closed = shell(f"{LLMC} run {artifact} - -n 3 <&-")
    _, _, empty = shell(f"{LLMC} run {artifact} - -n 3 < /dev/null")
    assert closed == empty and "the prompt is empty" in closed
    assert "no texts" in shell(f"{LLMC} embed {encoder} --file - <&-")[2]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
def test_characters_that_a_terminal_has_not_are_escaped(encoder: Path, encoding: str) -> None:
    status, out, _ = shell(f"{LLMC} classify --help; {LLMC} embed {encoder} 日本é", PYTHONIOENCODING=encoding)
    assert status == 0
    assert "\\u65e5\\u672c" in out
    status, out, _ = shell(f"{LLMC} embed {encoder} 日本é😀 --json", PYTHONIOENCODING=encoding)
    assert status == 0 and json.loads(out)["texts"] == ["日本é😀"]


def test_what_is_typed_may_be_of_another_encoding(tmp_path: Path) -> None:
    text = {**fake_artifact.manifest()["tokenizer"], "chat_template": "{{ messages[-1].content }}"}  # type: ignore[dict-item]
    chat = fake_artifact.write(tmp_path / "chat.so", tokenizer_facts=text)
    ask = f"{LLMC} chat {chat} --json -n 1"
    for printed, variables, said in (
        ("é日", {"PYTHONIOENCODING": "ascii"}, "é日"),
        ("\\xe9", {"PYTHONIOENCODING": "latin-1"}, "é"),
    ):
        status, out, _ = shell(f"printf '{printed}\n' | {ask}", **variables)
        assert status == 0 and json.loads(out)["messages"][0]["content"] == said
    status, out, err = shell(f"printf '\\xff\n' | {ask}")
    assert "is not valid Unicode" in out + err


def test_a_pipe_that_is_not_ready_is_waited_for(artifact: Path) -> None:
    """As programs leave pipes that they read asynchronously: more is written than the pipe holds."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    child = subprocess.Popen([sys.executable, "-c", MANY], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert len(stream.read()) == 1 << 20
    assert child.communicate()[1] == b"" and child.returncode == 0


MANY = "from llmc.cli.streams import prepare; prepare(); print('x' * ((1 << 20) - 1), flush=True)"


def test_what_others_print_does_not_get_into_the_object(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A library that prints, and an error after the object: stdout has one object all the same."""
    from llmc.cli import output

    printed = output.print_json

    def chatty(value: object) -> None:
        monkeypatch.undo()
        print("a note of some library")
        printed(value)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(output, "print_json", chatty)
    status, out, err = run(capfd, "inspect", artifact, "--json")
    assert status == 1 and json.loads(out)["path"] == str(artifact)
    assert "a note of some library" in err and "Input/output error" in err


def test_numbers_that_json_has_not_are_an_error(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmc.cli.reporting._check", lambda _: [float("nan")])
    status, out, err = run(capfd, "inspect", artifact, "--json")
    assert status == 1 and "NaN" in json.loads(out)["error"] and "bug" not in err


def test_ctrl_c_is_an_object_too(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmc.runtime.artifact.Artifact.open", interrupt)
    status, out, err = run(capfd, "inspect", artifact, "--json")
    assert status == 130 and json.loads(out) == {"error": "stopped"} and err == "llmc: stopped\n"


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"\xef\xbb\xbfone\r\ntwo\n", ["one", "two"]),
        (b"one\rtwo", ["one", "two"]),
        ("one\u2028still one\x0cand\x85still\ntwo\n".encode(), ["one\u2028still one\x0cand\x85still", "two"]),
        (b"one\n\ntwo\n", ["one", "", "two"]),
        (b"one", ["one"]),
    ],
    ids=["byte order mark", "carriage returns", "other separators", "empty line", "no last newline"],
)
def test_the_lines_of_a_file(tmp_path: Path, data: bytes, texts: list[str]) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(data)
    assert read_texts(["given"], path) == ["given", *texts]


def test_what_is_not_utf8_is_named(artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(b"good\n\xff\xfe")
    with pytest.raises(LlmcError, match=r"--file .*lines.txt is not UTF-8: byte 5"):
        read_texts(None, path)
    status, _, err = shell(f"{LLMC} run {artifact} - < {path}")
    assert status == 1 and "stdin is not UTF-8: byte 5" in err


def test_no_command_shows_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd)
    assert (status, err) == (0, "") and "compile" in out


def test_an_option_before_its_command_says_where_it_belongs(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "--json", "run")
    assert status == 2 and "--json stands behind the command: `llmc COMMAND ... --json`" in err
    assert list(json.loads(out)) == ["error"]
