"""A block that is inserted into a model and does nothing but add a constant."""
