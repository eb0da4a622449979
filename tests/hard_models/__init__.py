"""A generator of hard models: unusual attention, masks, biases, rotations, norms and residuals, drawn from a grammar.

    python -m hard_models --first 0 --count 100      (in tests/)

compares such models with onnxruntime (or, as torch modules, with torch) and prints how each was taken. `parts` says
what a model is made of, `ops_onnx` and `ops_torch` write it down, `drawing` chooses, `comparing` compares.
"""
