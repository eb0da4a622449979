"""llama.cpp through llama-cpp-python: the library's own decode calls, without its Python generation loop."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from gguf_writer import write_gguf
from protocol import Clock, Engine, Facts, Options, PeerError, Task, Timing, main

_FILE_TYPES = {"Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
               "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "BF16": None}  # fmt: skip
_UBATCH = 512


class LlamaEngine:
    def __init__(self, task: Task) -> None:
        import llama_cpp as library

        self._library = library
        self._lines: list[str] = []
        self._log = library.llama_log_callback(lambda _level, text, _data: self._lines.append(text.decode()))
        library.llama_log_set(self._log, ctypes.c_void_p(0))
        library.llama_backend_init()
        settings = library.llama_model_default_params()
        settings.use_extra_bufts = bool(task.options.get("repack", True))
        self._model = library.llama_model_load_from_file(task.file.encode(), settings)
        if not self._model:
            raise PeerError(f"llama.cpp does not load {task.file}: {' '.join(self._lines[-3:])}")
        context = library.llama_context_default_params()
        context.n_ctx = -(-task.context // 256) * 256 * task.batch
        context.n_seq_max = task.batch
        context.n_batch = max(_UBATCH, task.batch * task.prompt_tokens)
        context.n_ubatch = _UBATCH
        context.n_threads = context.n_threads_batch = task.threads
        context.flash_attn_type = int(task.options.get("flash_attention", library.LLAMA_FLASH_ATTN_TYPE_AUTO))
        context.kv_unified = bool(task.options.get("unified", False))
        context.no_perf = True
        self._context = library.llama_init_from_model(self._model, context)
        if not self._context:
            raise PeerError(f"llama.cpp makes no context: {' '.join(self._lines[-3:])}")
        self._words = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._batch = library.llama_batch_init(max(_UBATCH, task.batch * task.prompt_tokens), 0, 1)

    def uses(self) -> str:
        """The buffers that hold weights: "AMX" and "CPU_REPACK" ones have kernels of their own."""
        text = "".join(self._lines)
        found = [line.split("load_tensors:")[1].strip() for line in text.splitlines() if "model buffer size" in line]
        return "; ".join(" ".join(line.split()) for line in found)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), False)
        clock = Clock()
        following = self._decode(prompts, 0)
        clock.first()
        for step in range(new_tokens - 1):
            following = self._decode([[token] for token in following], len(prompts[0]) + step)
        return clock.done()

    def _decode(self, ids: list[list[int]], start: int) -> list[int]:
        """One step at positions from `start`, and the likeliest next token of each sequence."""
        batch = self._batch
        row = 0
        last = []
        for sequence, tokens in enumerate(ids):
            for position, token in enumerate(tokens, start):
                batch.token[row] = token
                batch.pos[row] = position
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = 0
                row += 1
            batch.logits[row - 1] = 1
            last.append(row - 1)
        batch.n_tokens = row
        status = self._library.llama_decode(self._context, batch)
        if status != 0:
            raise PeerError(f"llama_decode answered {status}")
        logits = [self._library.llama_get_logits_ith(self._context, row) for row in last]
        return [int(np.ctypeslib.as_array(pointer, (self._words,)).argmax()) for pointer in logits]


class LlamaAdapter:
    def check(self) -> Facts:
        import gguf  # noqa: F401 -- conversion needs it
        import llama_cpp

        info = llama_cpp.llama_print_system_info().decode()
        return {"version": f"llama-cpp-python {llama_cpp.__version__}", "machine": " ".join(info.split())}

    def convert(self, model: Path, out: Path, options: Options) -> Facts:
        kind = str(options["type"])
        plain = out.parent / f"{model.name}-source.gguf"
        newest = max(path.stat().st_mtime for path in model.iterdir())
        if not plain.exists() or plain.stat().st_mtime < newest:
            unfinished = plain.with_suffix(".part")
            write_gguf(model, unfinished)
            unfinished.rename(plain)
        file = plain
        if _FILE_TYPES[kind]:
            file = out / f"{kind}.gguf"
            quantize(plain, file, kind)
        return {"file": str(file), "file_bytes": file.stat().st_size, "bytes_per_token": bytes_per_token(file)}

    def load(self, task: Task) -> Engine:
        return LlamaEngine(task)


def quantize(source: Path, out: Path, kind: str) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, str(_FILE_TYPES[kind]))
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
    if status != 0:
        raise PeerError(f"llama_model_quantize to {kind} answered {status}")


def bytes_per_token(file: Path) -> int:
    """All weights but the embedding, of which one row is read, unless it is the head too."""
    import gguf

    found = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(str(file)).tensors}
    skipped = found.get("token_embd.weight", 0) if "output.weight" in found else 0
    return sum(found.values()) - skipped


if __name__ == "__main__":
    main(LlamaAdapter())
