"""Holds the parts of tools.accelerator_check. `python -m tools.on_accelerator PART ...` runs one in its own process."""
