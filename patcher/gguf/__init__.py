"""Vectors in GGUF files: which tensor of llama.cpp's holds one, and what has to move for it."""
