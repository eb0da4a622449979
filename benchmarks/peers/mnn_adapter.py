"""MNN: the wheel's engine, and the exporter of MNN's source tree, which the wheel leaves out.

MNN_SOURCE names a checkout of that tree. The wheel has AVX2 code only, and takes one sequence at a time.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

from protocol import Engine, Facts, Options, PeerError, Task, Timing, folder_bytes, main

# The wheel's converter imports a module that sends usage to a log service and installs packages. An empty one takes its
# place; then the exporter runs as it is. It leaves sys.argv empty, which `runpy` would not survive.
_EXPORT = """
import sys, types
log = types.ModuleType("MNN.tools.utils.log")
log.mnn_logger = None
sys.modules["MNN.tools.utils.log"] = log
script = sys.argv[1]
sys.argv = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
exec(compile(open(script, encoding="utf-8").read(), script, "exec"), {"__name__": "__main__", "__file__": script})
"""


def exporter() -> Path:
    """The script that exports language models."""
    named = os.environ.get("MNN_SOURCE", "")
    script = Path(named).expanduser().resolve() / "transformers/llm/export/llmexport.py"
    if not named or not script.is_file():
        raise PeerError("the MNN wheel has no exporter: set MNN_SOURCE to a checkout of github.com/alibaba/MNN")
    return script


class MnnEngine:
    def __init__(self, task: Task) -> None:
        llm = importlib.import_module("MNN.llm")  # `from MNN import llm` is the extension below it

        if task.batch > 1:
            raise PeerError("MNN's Python interface takes one sequence at a time")
        self._llm = llm.create(task.file)
        self._llm.set_config({"thread_num": task.threads, "sampler_type": "greedy", "reuse_kv": False})
        self._llm.load()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        self._llm.reset()
        self._llm.generate_init()
        start = time.perf_counter()
        written = self._llm._c_obj.generate(prompts[0], new_tokens)
        whole = time.perf_counter() - start
        if len(written) != new_tokens:
            raise PeerError(f"asked for {new_tokens} tokens, MNN wrote {len(written)}")
        first = self._llm._c_obj.get_context()["prefill_us"] / 1e6
        return Timing(first, whole - first)

    def uses(self) -> str:
        return "AVX2"


class MnnAdapter:
    def check(self) -> Facts:
        from importlib.metadata import version

        importlib.import_module("MNN.llm")

        exporter()
        return {"version": f"MNN {version('MNN')}", "machine": "AVX2"}

    def convert(self, model: Path, out: Path, options: Options) -> Facts:
        script = exporter()
        command = [sys.executable, "-c", _EXPORT, str(script), "--path", str(model), "--export", "mnn"]
        command += ["--quant_bit", str(options["bits"]), "--quant_block", str(options["block_size"])]
        command += ["--dst_path", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=out)
        config = out / "config.json"
        if done.returncode != 0 or not config.is_file():
            raise PeerError(f"{script.name} failed: {(done.stderr or done.stdout).strip()[-800:]}")
        # Weights of the matrices, the head among them; an embedding that is not the head too lies in its own file.
        weights = folder_bytes(out, ".mnn.weight")
        size = weights + folder_bytes(out, ".mnn", "embeddings_bf16.bin")
        return {"file": str(config), "file_bytes": size, "bytes_per_token": weights}

    def load(self, task: Task) -> Engine:
        return MnnEngine(task)


if __name__ == "__main__":
    main(MnnAdapter())
