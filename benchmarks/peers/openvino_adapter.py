"""OpenVINO GenAI's LLMPipeline; models exported by optimum-intel with weights compressed by nncf."""

from __future__ import annotations

import collections
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from protocol import Engine, Facts, Options, PeerError, Task, Timing, config_of, folder_bytes, main

# What is not set here is left to OpenVINO: on a CPU with AMX or AVX512-BF16 its default precision is bf16.
_BASE: Options = {"NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}


class OpenVinoEngine:
    def __init__(self, task: Task) -> None:
        import openvino
        import openvino_genai

        self._openvino = openvino
        self._genai = openvino_genai
        self._properties = {**_BASE, "INFERENCE_NUM_THREADS": task.threads, **task.options}
        self._folder = task.file
        self._pipeline = openvino_genai.LLMPipeline(task.file, "CPU", **self._properties)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        settings = self._genai.GenerationConfig()
        settings.max_new_tokens = new_tokens
        settings.ignore_eos = True
        settings.do_sample = False
        ids = np.array(prompts, np.int64)
        tensor = self._openvino.Tensor
        inputs = self._genai.TokenizedInputs(tensor(ids), tensor(np.ones_like(ids)))
        start = time.perf_counter()
        results = self._pipeline.generate(inputs, settings)
        total = time.perf_counter() - start
        written = {len(tokens) for tokens in results.tokens}
        if written != {new_tokens}:
            raise PeerError(f"asked for {new_tokens} tokens, OpenVINO wrote {sorted(written)}")
        first = results.perf_metrics.get_ttft().mean / 1000
        return Timing(first, total - first)

    def uses(self) -> str:
        """How often which kernels compute linear layers: from a profile of the model compiled alone, without GenAI."""
        core = self._openvino.Core()
        properties = {name: value for name, value in self._properties.items() if name != "ATTENTION_BACKEND"}
        compiled = core.compile_model(f"{self._folder}/openvino_model.xml", "CPU", {**properties, "PERF_COUNT": True})
        request = compiled.create_infer_request()
        kernels = []
        for tokens in (64, 1):
            row = np.arange(tokens, dtype=np.int64)[None]
            feeds = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": row,
                     "beam_idx": np.zeros(1, np.int32)}  # fmt: skip
            names = {name for port in compiled.inputs for name in port.get_names()}
            request.reset_state()
            request.infer({name: value for name, value in feeds.items() if name in names})
            counts = collections.Counter(
                step.exec_type for step in request.get_profiling_info() if step.node_type.startswith("FullyConnected")
            )
            kernels.append(f"{tokens} rows: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
        chosen = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "KV_CACHE_PRECISION")
        return "; ".join(kernels + [f"{name}={compiled.get_property(name)}" for name in chosen])


class OpenVinoAdapter:
    def check(self) -> Facts:
        from importlib.metadata import version

        import openvino
        import openvino_genai

        core = openvino.Core()
        return {
            "version": f"openvino-genai {openvino_genai.__version__} (optimum-intel {version('optimum-intel')}, "
            f"nncf {version('nncf')})",
            "machine": " ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        }

    def convert(self, model: Path, out: Path, options: Options) -> Facts:
        tool = Path(sys.executable).with_name("optimum-cli")
        command = [str(tool), "export", "openvino", "--model", str(model), "--task", "text-generation-with-past"]
        command += ["--weight-format", str(options["weights"])]
        if "group_size" in options:
            command += ["--group-size", str(options["group_size"]), "--ratio", "1.0", "--sym"]
        done = subprocess.run([*command, str(out)], capture_output=True, text=True)
        if done.returncode != 0:
            raise PeerError(f"{' '.join(command)} failed: {done.stderr.strip()[-800:]}")
        size = folder_bytes(out, "openvino_model.bin")
        return {"file": str(out), "file_bytes": size, "bytes_per_token": size - unread_bytes(model, out)}

    def load(self, task: Task) -> Engine:
        return OpenVinoEngine(task)


def unread_bytes(model: Path, out: Path) -> int:
    """Bytes of the embedding where the head is another matrix: one row of it is read for a token."""
    config = config_of(model)
    if config.get("tie_word_embeddings"):
        return 0
    import openvino

    shape = [config["vocab_size"], config["hidden_size"]]
    ops = openvino.Core().read_model(out / "openvino_model.xml").get_ordered_ops()
    tables = [
        op.data.nbytes for op in ops if op.get_type_name() == "Constant" and list(op.get_output_shape(0)) == shape
    ]
    return max(tables[1:], default=0)


if __name__ == "__main__":
    main(OpenVinoAdapter())
