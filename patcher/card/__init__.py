"""The model card of a patched folder."""
