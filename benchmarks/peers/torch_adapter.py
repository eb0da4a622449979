"""PyTorch with transformers' model code, eager or compiled, and a loop that does nothing but steps."""

from __future__ import annotations

from pathlib import Path

from protocol import Clock, Engine, Facts, Options, Task, Timing, config_of, folder_bytes, main

_BYTES = {"bfloat16": 2, "float32": 4}


class TorchEngine:
    def __init__(self, task: Task) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(task.threads)
        self._torch = torch
        dtype = getattr(torch, str(task.options["dtype"]))
        self._model = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype, attn_implementation="sdpa").eval()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        torch = self._torch
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            clock = Clock()
            result = self._model(ids, use_cache=True, logits_to_keep=1)
            following = result.logits[:, -1:].argmax(-1)
            clock.first()
            for _ in range(new_tokens - 1):
                result = self._model(following, past_key_values=result.past_key_values, use_cache=True)
                following = result.logits[:, -1:].argmax(-1)
            return clock.done()

    def uses(self) -> str:
        return f"oneDNN for bf16: {self._torch.backends.mkldnn.is_available()}"


class TorchAdapter:
    def check(self) -> Facts:
        import torch
        import transformers

        return {
            "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "machine": torch.backends.cpu.get_cpu_capability(),
        }

    def convert(self, model: Path, out: Path, options: Options) -> Facts:
        size = folder_bytes(model, ".safetensors")
        config = config_of(model)
        embedding = 0 if config.get("tie_word_embeddings") else config["vocab_size"] * config["hidden_size"]
        stored = 4 if str(config.get("dtype", config.get("torch_dtype"))).endswith("float32") else 2
        weights = size // stored
        width = _BYTES[str(options["dtype"])]
        return {"file": str(model), "file_bytes": weights * width, "bytes_per_token": (weights - embedding) * width}

    def load(self, task: Task) -> Engine:
        return TorchEngine(task)


if __name__ == "__main__":
    main(TorchAdapter())
