"""Captured activations that are kept for the next run."""
