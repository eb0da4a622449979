"""The lines of a text that mean the most similar to a question, by an embedding model.

    python examples/search.py [QUESTION] [FILE] [MODEL]

MODEL is a directory or hub name of a sentence-transformers model, such as sentence-transformers/all-MiniLM-L6-v2.
Without one, the mean over the last layer of examples/pycoder serves, which knows code a little and no words' meaning.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

import llmc

HERE = Path(__file__).parent
parser = argparse.ArgumentParser()
parser.add_argument("question", nargs="?", default="read all lines of a file")
parser.add_argument("file", nargs="?", type=Path, default=HERE / "batch.py")
parser.add_argument("model", nargs="?")
given = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    source = given.model
    if source is None:  # a directory as sentence-transformers writes it: the model, and how its tokens are pooled
        source = shutil.copytree(HERE / "pycoder", Path(folder) / "embedder")
        kinds = {"": "Transformer", "1_Pooling": "Pooling"}
        modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                   for i, (path, kind) in enumerate(kinds.items())]  # fmt: skip
        (source / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
        size = json.loads((source / "config.json").read_text(encoding="utf-8"))["hidden_size"]
        (source / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": size, "pooling_mode_mean_tokens": True}
        (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    model = llmc.from_hf(source, dtype="int8")

lines = [line for line in given.file.read_text(encoding="utf-8").splitlines() if line.strip()]
vectors = model.embed(lines, normalize=True)  # float32 [lines, dimension]; long and short lines run side by side
similarity = vectors @ model.embed(given.question, normalize=True)
for index in np.argsort(-similarity)[:5]:
    print(f"{similarity[index]:.3f}  {lines[index]}")
