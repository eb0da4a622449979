"""From a model's directory to text: compiled the first time, loaded from the cache afterwards."""

from pathlib import Path

import llmc

model = llmc.from_hf(Path(__file__).parent / "pycoder", dtype="int4")
print(model.generate("def read_lines(path):", max_tokens=48))
