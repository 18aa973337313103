"""Contrast pairs: from a data set or the recipe to token ids and the positions whose residuals are read."""
