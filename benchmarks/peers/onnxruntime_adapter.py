"""ONNX Runtime GenAI: its model builder's CPU models, and its generator's own loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from protocol import Clock, Engine, Facts, Options, PeerError, Task, Timing, folder_bytes, main


class OnnxRuntimeEngine:
    def __init__(self, task: Task) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        set_threads(Path(task.file), task.threads)
        self._model = onnxruntime_genai.Model(task.file)
        self._task = task

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        parameters = self._genai.GeneratorParams(self._model)
        length = len(prompts[0]) + new_tokens
        # min_length keeps the end-of-text token from ending a sequence.
        parameters.set_search_options(
            max_length=length, min_length=length, batch_size=len(prompts), do_sample=False,
            past_present_share_buffer=True,
        )  # fmt: skip
        generator = self._genai.Generator(self._model, parameters)
        ids = np.array(prompts, np.int32)
        clock = Clock()
        generator.append_tokens(ids)
        generator.generate_next_token()
        clock.first()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        timing = clock.done()
        for row in range(len(prompts)):
            written = len(generator.get_sequence(row))
            if written != length:
                raise PeerError(f"asked for {length} tokens in all, ONNX Runtime GenAI ended with {written}")
        return timing

    def uses(self) -> str:
        return ""


class OnnxRuntimeAdapter:
    def check(self) -> Facts:
        import onnxruntime
        import onnxruntime_genai

        return {
            "version": f"onnxruntime-genai {onnxruntime_genai.__version__} (onnxruntime {onnxruntime.__version__})",
            "machine": " ".join(onnxruntime.get_available_providers()),
        }

    def convert(self, model: Path, out: Path, options: Options) -> Facts:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out)]
        command += ["-p", str(options["precision"]), "-e", "cpu", "-c", str(out / "cache"), "--extra_options"]
        command += [f"accuracy_level={options['accuracy_level']}", f"block_size={options['block_size']}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise PeerError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-800:]}")
        size = folder_bytes(out, ".onnx", ".onnx.data")
        return {"file": str(out), "file_bytes": size, "bytes_per_token": size - unread_bytes(out / "model.onnx")}

    def load(self, task: Task) -> Engine:
        return OnnxRuntimeEngine(task)


def set_threads(folder: Path, threads: int) -> None:
    """The builder leaves the thread count to the machine; it is set in the model's configuration file."""
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    options = config["model"]["decoder"]["session_options"]
    if options.get("intra_op_num_threads") != threads:
        options["intra_op_num_threads"] = threads
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")


def unread_bytes(file: Path) -> int:
    """Bytes of the tensors that only gathers use: the embedding, of which one row is read for a token."""
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    users: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    return sum(
        tensor_bytes(tensor)
        for tensor in graph.initializer
        if users.get(tensor.name, set()) <= {"Gather", "GatherBlockQuantized"}
    )


def tensor_bytes(tensor: object) -> int:
    """Bytes of an initializer that lies in another file, as the entry says; small ones do not matter here."""
    entries = {entry.key: entry.value for entry in tensor.external_data}  # type: ignore[attr-defined]
    return int(entries.get("length", 0))


if __name__ == "__main__":
    main(OnnxRuntimeAdapter())
