"""Plans runs for hardware that is not available: whether a run fits, and the best possible speed."""
