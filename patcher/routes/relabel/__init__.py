"""Two classes that compute the same function: how one becomes the other, and the proof that it does."""
