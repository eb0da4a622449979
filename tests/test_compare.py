"""The comparison's own logic: pairing and order of runs, what fails, what is kept; no engine is needed."""

from __future__ import annotations

import io
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

ENGINE = """
import json, sys
MARK = "llmc-compare:"
command = sys.argv[1]
request = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
print("engines print what they like", end="")
def say(**answer):
    print("\\n" + MARK, json.dumps(answer), flush=True)
    sys.exit("error" in answer)
if command == "check":
    say(version="1")
if command == "convert":
    from pathlib import Path
    Path(request["out"]).mkdir(parents=True, exist_ok=True)
    with open(Path(request["out"]).parent / "log", "a") as log:
        log.write("converted\\n")
    if request["options"].get("broken"):
        say(error="cannot convert this")
    say(file=request["out"], file_bytes=2000, bytes_per_token=1000)
if command == "describe":
    say(uses="fast kernels")
if request["options"].get("crash"):
    raise SystemExit("out of memory")
speed = request["options"].get("speed", 10)
say(load_seconds=1.0, prefill_tokens_per_second=10.0 * speed, decode_tokens_per_second=float(speed),
    first_token_seconds=1.0 / speed)
"""


@pytest.fixture(scope="module")
def compare() -> Iterator[ModuleType]:
    """benchmarks/compare.py, which finds its modules beside itself as any script does."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import compare

        yield compare
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with one matrix of 4 x 8 in a block, one outside, and a norm."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"vocab_size": 64, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.layers.0.a.weight": [4, 8], "model.embed.weight": [16, 8], "model.layers.0.norm.weight": [8]}
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({**header, "__metadata__": {"format": "pt"}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


class Bench:
    """A comparison of fake engines. rows: (peer, name, options of convert, options of measure)."""

    def __init__(self, compare: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, model: Path) -> None:
        self.compare = compare
        self.model = model
        self.work = folder / "work"
        script = folder / "engine.py"
        script.write_text(ENGINE)
        peers = compare.variants.PEERS
        for name, peer in list(peers.items()):
            fake = type(peer)(name, str(script), f"pip install {name}")
            monkeypatch.setitem(peers, name, fake)

    def run(
        self,
        rows: list[tuple[str, str, dict[str, Any], dict[str, Any]]],
        rounds: int = 1,
        before: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        variant = self.compare.variants.Variant
        found = [variant(peer, name, "int4", convert, measure) for peer, name, convert, measure in rows]
        pythons = dict.fromkeys(self.compare.PEERS, sys.executable)
        pythons["mnn"] = "/nowhere/python"
        adapters = self.compare.Adapters(pythons, (), 600)
        comparison = self.compare.Comparison(adapters, [self.model], found, 1, self.work)
        if before is not None:
            comparison.restore(before)
        comparison.prepare(describe=True)
        workloads = [workload for workload in self.compare.metrics.WORKLOADS if workload.name != "eight"]
        comparison._measure_limits = lambda: comparison.limits.update(read=[2e4], int8=[64e3])
        comparison.run(workloads, rounds, None)
        report = comparison.report()
        json.dumps(report)
        return report


@pytest.fixture
def bench(compare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> Bench:
    return Bench(compare, monkeypatch, tmp_path, model)


def test_a_row_says_how_many_times_as_fast_llmc_is(bench: Bench) -> None:
    report = bench.run([("llmc", "int4", {}, {"speed": 30}), ("torch", "x", {}, {"speed": 10})], rounds=2)
    ours, theirs = report["rows"]
    assert ours["metrics"]["decode"]["median"] == 30
    assert "llmc_times_as_fast" not in ours["metrics"]["decode"]
    for metric in ("prefill", "decode", "first token"):  # also where less is better
        assert theirs["metrics"][metric]["llmc_times_as_fast"]["median"] == pytest.approx(3)
        assert theirs["metrics"][metric]["runs"] == 2
    assert theirs["uses"] == "fast kernels"


def test_what_fails_is_a_skipped_row_with_its_reason(bench: Bench) -> None:
    report = bench.run(
        [
            ("llmc", "int4", {}, {}),
            ("mnn", "absent", {}, {}),
            ("torch", "broken", {"broken": True}, {}),
            ("torch", "crash", {}, {"crash": True}),
        ]
    )
    reasons = {(skip["label"], skip["workload"]): skip["reason"] for skip in report["skipped"]}
    assert "pip install mnn" in reasons["mnn absent", ""]
    assert reasons["torch broken", ""] == "cannot convert this"
    assert "out of memory" in reasons["torch crash", "one"]
    assert "1024" in reasons["llmc int4", "long"]  # a prompt of 4,096 is more than the model takes
    assert [row["label"] for row in report["rows"] if row["metrics"]] == ["llmc int4"]


def test_conversion_happens_once_and_again_when_model_or_settings_change(bench: Bench) -> None:
    log = bench.work / "model" / "log"
    rows = [("llmc", "int4", {}, {}), ("torch", "a", {}, {}), ("torch", "b", {}, {"speed": 3})]
    for _ in range(2):
        bench.run(rows, rounds=0)
        assert log.read_text().count("converted") == 2, "rows that differ in how they run share a file"
    bench.run([*rows, ("torch", "c", {"bits": 4}, {})], rounds=0)
    assert log.read_text().count("converted") == 3
    config = bench.model / "config.json"
    config.write_text(config.read_text() + "\n")
    bench.run(rows, rounds=0)
    assert log.read_text().count("converted") == 5


def test_rounds_can_be_added_to_an_earlier_report(bench: Bench) -> None:
    rows = [("llmc", "int4", {}, {"speed": 30}), ("torch", "x", {}, {"speed": 10})]
    before = json.loads(json.dumps(bench.run(rows)))
    slower = [("llmc", "int4", {}, {"speed": 30}), ("torch", "x", {}, {"speed": 5})]
    found = bench.run(slower, rounds=2, before=before)["rows"][1]["metrics"]["decode"]
    assert found["values"] == {"0": 10, "1": 5, "2": 5}
    assert found["llmc_times_as_fast"] == {"median": 6, "least": 3, "most": 6, "runs": 3}
    other = bench.run([rows[0], ("torch", "y", {}, {})], before=before)
    assert [row["label"] for row in other["rows"]] == ["llmc int4", "torch y", "torch x"]


def test_every_round_has_every_row_once_and_the_first_changes(compare: ModuleType) -> None:
    for count in range(12):
        orders = [compare.metrics.order(count, turn) for turn in range(3)]
        assert all(sorted(found) == list(range(count)) for found in orders)
        assert count < 3 or len({found[0] for found in orders}) == 3


@given(st.dictionaries(st.integers(0, 9), st.floats(0.1, 1e4)), st.dictionaries(st.integers(0, 9), st.floats(0.1, 1e4)))
def test_ratios_pair_runs_of_the_same_round(
    compare: ModuleType, ours: dict[int, float], theirs: dict[int, float]
) -> None:
    found = compare.metrics.speedups("decode", ours, theirs)
    both = set(ours) & set(theirs)
    if not both:
        assert found is None
        return
    ratios = [ours[turn] / theirs[turn] for turn in both]
    assert (found.least, found.most, found.runs) == (min(ratios), max(ratios), len(both))
    assert found.least <= found.median <= found.most
    less_is_better = compare.metrics.speedups("load", theirs, ours)
    assert less_is_better.median == pytest.approx(found.median)


@pytest.mark.parametrize(
    ("printed", "answer"),
    [
        ("", None),
        ("noise\n", None),
        ('loading...\nllmc-compare: {"a": 1}\nbye\n', {"a": 1}),
        ('llmc-compare: {"a": 1}\nllmc-compare: {"a": 2}', {"a": 2}),
    ],
)
def test_only_the_last_marked_line_counts(compare: ModuleType, printed: str, answer: object) -> None:
    from peers.processes import last_answer

    assert last_answer(printed) == answer


def test_a_process_that_hangs_is_an_error(compare: ModuleType) -> None:
    adapters = compare.Adapters({}, (), 0.2)
    with pytest.raises(compare.AdapterError, match="no answer"):
        adapters._ask([sys.executable, "-c", "import time; time.sleep(1e6)"])
    with pytest.raises(compare.AdapterError, match="does not start"):
        adapters._ask(["/nowhere/python"])


def test_llmc_is_always_compared_and_unknown_names_are_refused(compare: ModuleType) -> None:
    rows = compare.variants.chosen(["int8"], ["torch"])
    assert {row.peer for row in rows} == {"llmc"}  # torch has no int8 row
    with pytest.raises(ValueError, match=r"no peer 'vllm'.*llama.cpp"):
        compare.variants.chosen(["int4"], ["vllm"])
    with pytest.raises(ValueError, match=r"no class 'int2'.*int4"):
        compare.variants.chosen(["int2"], [])


def test_every_class_starts_with_llmc_and_every_row_has_its_own_label(compare: ModuleType) -> None:
    rows = compare.variants.VARIANTS
    assert len({row.label for row in rows}) == len(rows)
    for precision in compare.CLASSES:
        assert next(row.peer for row in rows if row.precision == precision) == "llmc"
    assert {row.peer for row in rows} == set(compare.PEERS)
    assert all(peer.script.exists() for peer in compare.PEERS.values())


def test_interpreters_are_one_for_all_or_one_a_peer(compare: ModuleType) -> None:
    found = compare.interpreters(["openvino=/b/python", "/a/python"])
    assert (found["openvino"], found["llama.cpp"], found["llmc"]) == ("/b/python", "/a/python", sys.executable)


def test_limits_are_where_the_arithmetic_says(bench: Bench, compare: ModuleType) -> None:
    report = bench.run([("llmc", "int4", {}, {})])
    row = report["rows"][0]
    assert compare.metrics.limit_of("decode", row, report) == 20  # 2e4 bytes a second, 1000 a token
    assert compare.metrics.limit_of("prefill", row, report) == 1000  # 64e3 operations a second, 2 * 4 * 8 a token
    assert compare.metrics.limit_of("eight", row, report) is None


def test_the_best_peer_of_each_metric_may_be_of_two_rows(compare: ModuleType) -> None:
    def row(peer: str, label: str, **metrics: float) -> dict[str, Any]:
        return {"peer": peer, "label": label, "metrics": {name: {"median": value} for name, value in metrics.items()}}

    rows = [
        row("llmc", "ours", prefill=99, load=0.1),
        row("a", "a x", prefill=5, load=3),
        row("a", "a y", prefill=4, load=2),
    ]
    found = compare.metrics.best_peers(rows, "llmc")
    assert {metric: label for metric, (label, _) in found.items()} == {"prefill": "a x", "load": "a y"}


def test_a_picture_of_everything_and_of_nothing(bench: Bench, compare: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from peers import plots

    report = bench.run([("llmc", "int4", {}, {}), ("torch", "x", {}, {}), ("torch", "crash", {}, {"crash": True})])
    plots.draw(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plots.draw({**report, "rows": []}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_tables_show_every_row_and_every_skip(bench: Bench, compare: ModuleType) -> None:
    from rich.console import Console

    report = bench.run([("llmc", "int4", {}, {}), ("torch", "x", {}, {}), ("mnn", "absent", {}, {})], rounds=2)
    console = Console(width=200, record=True, file=io.StringIO())
    compare.table.show(console, report)
    text = console.export_text()
    assert "torch x" in text and "llmc x1.00 (1.00..1.00)" in text
    assert "10.0 (10.0..10.0)" in text and "50%" in text  # 10 tokens/s of 1000 bytes, of 2e4 bytes a second
    assert "mnn absent" in text and "pip install mnn" in text


def test_interleaving_turns_rotated_halves_into_rotated_neighbours(compare: ModuleType) -> None:
    """Both conventions of rotary embedding give the same scores: q . k is the same for any two positions."""
    sys.path.insert(0, str(BENCHMARKS / "peers"))
    try:
        from gguf_writer import interleave_halves
    finally:
        sys.path.remove(str(BENCHMARKS / "peers"))
    heads, size = 3, 8
    random = np.random.default_rng(0)
    halves = random.normal(size=(heads * size, 5))
    pairs = interleave_halves(halves, heads)
    angle = random.normal(size=size // 2)
    x = random.normal(size=5)
    first, second = (halves @ x).reshape(heads, 2, size // 2).swapaxes(0, 1)
    turned = first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)
    even, odd = (pairs @ x).reshape(heads, size // 2, 2).transpose(2, 0, 1)
    assert np.allclose(turned[0], even * np.cos(angle) - odd * np.sin(angle))
    assert np.allclose(turned[1], odd * np.cos(angle) + even * np.sin(angle))
