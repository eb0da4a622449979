"""GGUF files (llama.cpp's format) to a graph, weights and text. Nothing else in llmc reads that format."""
