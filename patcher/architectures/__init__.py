"""What the stock classes of transformers offer: analysis of the installed classes, and rows of data."""
