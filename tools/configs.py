"""Does what `favchat_jax.py` does, for tools that import `configs` first."""

import favchat_jax  # noqa: F401
