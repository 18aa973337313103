"""Residual activations: read early in the forward, shared between prompts, in batches, streamed from the disk."""
