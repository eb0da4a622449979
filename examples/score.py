"""How likely the model finds each token of a text: `forward` gives the logits after every token."""

from pathlib import Path

import numpy as np

import llmc

model = llmc.from_hf(Path(__file__).parent / "pycoder", dtype="int4")
ids = [0, *model.tokenizer.encode("for i in range(10):", add_special=False)]  # <|bos|> in front
logits = model.forward(ids)  # float32 [tokens, vocabulary]
log_probabilities = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
for position, token in enumerate(ids[1:]):
    print(f"{model.tokenizer.decode([token])!r:>12} {np.exp(log_probabilities[position, token]):6.1%}")
