"""Models larger than memory: one pass over the weights, block after block, all batches through each."""
