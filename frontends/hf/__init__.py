"""Hugging Face model directories to graphs."""

from llmc.frontends.hf.lift import lift

__all__ = ["lift"]
