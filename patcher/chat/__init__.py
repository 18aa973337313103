"""Trying a steering vector out: base and steered model side by side, from the same prompt and the same seed."""
