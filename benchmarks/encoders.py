"""Encoders beside ONNX Runtime: ragged batches of sentences, the same weights, threads and token ids.

    python benchmarks/encoders.py [MODEL_DIR] [--threads 2] [--rounds 5] [--precisions f32,int8] [--json out.json]

MODEL_DIR is a Hugging Face encoder's directory; without one, BERT-base with random weights is made. It is exported to
ONNX, quantized by ONNX Runtime's own dynamic quantization for int8, and compiled by llmc, once, into --work.

Sequences of 16 to 256 tokens, uniformly, come in batches of 8. llmc takes them as they are. ONNX Runtime gets them in
three ways, and the fastest is its number: padded to the longest of the batch; one sequence at a time; and all sequences
sorted by length before they are cut into batches, which a caller can do who has them all at once. Tokens a second count
real tokens only. Every number comes from a process of its own, all kinds in turn each round; a ratio is the median over
rounds of two numbers of the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

SHORTEST, LONGEST, BATCH, BATCHES = 16, 256, 8, 6
MARK = "llmc-encoders:"
WAYS = ("padded", "one by one", "sorted")
Ids = list[int]


def batches_of(vocabulary: int, is_sorted: bool = False) -> list[list[Ids]]:
    """The sentences, as token ids, in batches; the same every time."""
    random = np.random.default_rng(0)
    lengths = random.integers(SHORTEST, LONGEST + 1, BATCH * BATCHES)
    sentences = [random.integers(vocabulary // 8, vocabulary, length).tolist() for length in lengths]
    if is_sorted:
        sentences.sort(key=len)
    return [sentences[i : i + BATCH] for i in range(0, len(sentences), BATCH)]


def prepare(model: Path | None, work: Path, precisions: Sequence[str]) -> dict[str, str]:
    """Every engine's file, by engine and precision; made where it is missing."""
    work.mkdir(parents=True, exist_ok=True)
    if model is None:
        model = work / "bert-base"
        if not (model / "config.json").exists():
            import torch
            from transformers import BertConfig, BertModel

            torch.manual_seed(0)
            BertModel(BertConfig()).eval().save_pretrained(model)
    files = {"model": str(model)}
    exported = work / "model.onnx"
    if not exported.exists():
        _export(model, exported)
    files["onnxruntime f32"] = str(exported)
    if "int8" in precisions:
        quantized = work / "model-int8.onnx"
        if not quantized.exists():
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(exported, quantized, weight_type=QuantType.QInt8)
        files["onnxruntime int8"] = str(quantized)
    for precision in precisions:
        import llmc

        compiled = work / f"model-{precision}.so"
        print(f"compiling {precision}", flush=True)
        llmc.compile(str(model), compiled, precision, calibrate="none")
        files[f"llmc {precision}"] = str(compiled)
    return files


def _export(model: Path, path: Path) -> None:
    import torch
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.encoder(input_ids=ids, attention_mask=mask)[0]

    ids = torch.ones(2, 16, dtype=torch.long)
    axes = {name: {0: "batch", 1: "tokens"} for name in ("input_ids", "attention_mask", "last_hidden_state")}
    with torch.no_grad():
        torch.onnx.export(
            Hidden(), (ids, ids), path, dynamo=False, opset_version=17, dynamic_axes=axes,
            input_names=["input_ids", "attention_mask"], output_names=["last_hidden_state"],
        )  # fmt: skip


def worker(request: dict[str, object]) -> None:
    """Measures one engine in this process, and prints tokens a second."""
    model = Path(str(request["model"]))
    vocabulary = int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    batches = batches_of(vocabulary, request["way"] == "sorted")
    load = _llmc if request["engine"] == "llmc" else _onnxruntime
    run = load(str(request["file"]), int(str(request["threads"])), str(request["way"]))
    run(batches[0])
    run(batches[-1])
    tokens = sum(len(ids) for batch in batches for ids in batch)
    rates = []
    started = time.perf_counter()
    while len(rates) < 2 or time.perf_counter() - started < float(str(request["seconds"])):
        begin = time.perf_counter()
        for batch in batches:
            run(batch)
        rates.append(tokens / (time.perf_counter() - begin))
    print(f"\n{MARK} {statistics.median(rates)}", flush=True)


def _llmc(file: str, threads: int, way: str) -> Callable[[list[Ids]], None]:
    from llmc import Runtime

    runtime = Runtime.load(file, threads)

    def run(batch: list[Ids]) -> None:
        runtime.encode(batch)

    return run


def _onnxruntime(file: str, threads: int, way: str) -> Callable[[list[Ids]], None]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(batch: list[Ids]) -> None:
        for part in [[ids] for ids in batch] if way == "one by one" else [batch]:
            longest = max(map(len, part))
            ids, mask = np.zeros((2, len(part), longest), np.int64)
            for row, sentence in enumerate(part):
                ids[row, : len(sentence)], mask[row, : len(sentence)] = sentence, 1
            session.run(None, {"input_ids": ids, "attention_mask": mask})

    return run


def measure(engine: str, precision: str, way: str, files: dict[str, str], threads: int, seconds: float) -> float:
    """Tokens a second, from a process of its own."""
    request = {
        "engine": engine, "file": files[f"{engine} {precision}"], "model": files["model"], "way": way,
        "threads": threads, "seconds": seconds,
    }  # fmt: skip
    command = [sys.executable, __file__, "--worker", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return float(line.removeprefix(MARK))
    raise SystemExit(f"{engine} {precision} {way} failed: {done.stderr.strip()[-600:]}")


def spread(values: Sequence[float], digits: int = 0) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each process, at least")
    parser.add_argument("--precisions", default="f32,int8")
    parser.add_argument("--work", type=Path, default=Path("build/encoders"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    precisions = given.precisions.split(",")
    files = prepare(given.model, given.work, precisions)
    kinds = [("llmc", "ragged"), *(("onnxruntime", way) for way in WAYS)]
    rates: dict[str, list[float]] = {}
    for turn in range(given.rounds):
        for precision in precisions:
            for engine, way in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
                rate = measure(engine, precision, way, files, given.threads, given.seconds)
                rates.setdefault(f"{precision} {engine} {way}", []).append(rate)
                print(f"round {turn + 1}: {precision} {engine} {way}: {rate:,.0f} tokens/s", flush=True)
    report = {"threads": given.threads, "tokens_per_second": rates, "times_the_best": {}}
    for precision in precisions:
        ours = rates[f"{precision} llmc ragged"]
        theirs = [rates[f"{precision} onnxruntime {way}"] for way in WAYS]
        for way, values in zip(WAYS, theirs, strict=True):
            print(f"{precision}: ONNX Runtime, {way}: {spread(values)} tokens/s")
        ratios = [mine / max(others) for mine, *others in zip(ours, *theirs, strict=True)]
        print(f"{precision}: llmc: {spread(ours)} tokens/s, {spread(ratios, 2)} times the fastest of these")
        report["times_the_best"][precision] = ratios  # type: ignore[index]
    if given.json:
        given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
