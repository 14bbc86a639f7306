"""Planning a run for hardware that is not here: whether it fits, and how fast it can be at best."""
