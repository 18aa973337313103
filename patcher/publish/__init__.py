"""A patched folder on the Hub: one commit, or nothing."""
