"""Capture over several processes, as torchrun starts them."""
