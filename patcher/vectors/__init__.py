"""Steering vectors: how one is found in activations, scaled, placed, and kept in files."""
