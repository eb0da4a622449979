"""Hugging Face model directories to graphs; `lift` is the way in. (Importing it brings torch, so this file does not.)"""
