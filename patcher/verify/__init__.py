"""The proof: a patched folder in stock software against the base under a hook."""
