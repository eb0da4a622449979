"""The lines of a file that mean the most similar to a question, by an embedding model.

    python examples/search.py README.md 'how fast is it?' [MODEL]

MODEL is a directory or hub name of a sentence-transformers model, or a compiled `.so`.
"""

import sys
from pathlib import Path

import numpy as np

import llmc

path, question, *rest = sys.argv[1:] or sys.exit(__doc__)
source = rest[0] if rest else "sentence-transformers/all-MiniLM-L6-v2"
model = llmc.Runtime.load(source) if source.endswith(".so") else llmc.from_hf(source, dtype="int8")
lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
vectors = model.embed(lines, normalize=True)  # float32 [lines, dimension]; long and short ones run side by side
similarity = vectors @ model.embed(question, normalize=True)
for index in np.argsort(-similarity)[:5]:
    print(f"{similarity[index]:.3f}  {lines[index]}")
