"""Hugging Face model directories to graphs; `lift` is the way in, and brings torch, so this file imports nothing."""
