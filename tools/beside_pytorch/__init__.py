"""The two sides of tools.benchmark: the same work on the same weights, ours in one process and PyTorch's in another."""
