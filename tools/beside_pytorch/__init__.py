"""Runs the two sides of tools.benchmark, ours and PyTorch's, on the same weights and in separate processes."""
