"""GGUF files: their headers are read, their bytes are placed, nothing else is touched."""
