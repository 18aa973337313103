"""The search for a layer and a coefficient: a grid of cells, chosen on some pairs and reported on others."""
