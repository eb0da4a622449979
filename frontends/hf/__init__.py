"""Hugging Face model directories to graphs."""

from llmc.frontends.hf.lift import Lifted, lift

__all__ = ["Lifted", "lift"]
