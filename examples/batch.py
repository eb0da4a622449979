"""Several prompts at once: each step of the model serves all of them."""

from pathlib import Path

import llmc

PROMPTS = ["def main():", "class Error(Exception):", "import os\nimport sys\n", "for line in "]

model = llmc.from_hf(Path(__file__).parent / "pycoder", dtype="int4")
for prompt, text in zip(PROMPTS, model.generate_batch(PROMPTS, max_tokens=16), strict=True):
    print(f"{prompt}{text}\n{'-' * 40}")
