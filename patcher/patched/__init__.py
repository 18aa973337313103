"""The patched folder: the only reader and writer of ``steering.json`` and of its tensors."""
