"""Checkpoint folders: read by their headers, copied and written as a whole or not at all."""
