"""Text piece by piece as it is written, its speed, and an artifact to keep."""

import sys
import tempfile
from pathlib import Path

import llmc

model = llmc.from_hf(Path(__file__).parent / "pycoder", dtype="int4")
stream = model.stream("class Queue:", max_tokens=48, temperature=0.7, top_p=0.95, seed=1, stop=["\n\n\n"])
for piece in stream:
    print(piece, end="", flush=True)
print()
print(f"{len(stream.tokens)} tokens, then {stream.finish_reason}", file=sys.stderr)

with tempfile.TemporaryDirectory() as folder:
    kept = Path(folder) / "pycoder.so"
    model.save(kept)  # one file: kernels, weights, tokenizer
    again = llmc.Runtime.load(kept)
    assert again.generate("import ", max_tokens=4) == model.generate("import ", max_tokens=4)
