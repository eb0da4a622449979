"""One file a group of architectures, from a file's description to a config and weights of transformers' model."""
