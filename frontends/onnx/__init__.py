"""ONNX files to graphs."""

from llmc.frontends.onnx.lift import lift

__all__ = ["lift"]
