"""FaVChat in JAX: a video language model that answers fine-grained questions about faces.

    import favchat_jax

    model = favchat_jax.load("runs/tiny-v1/stage3")
    print(model.answer("clip.mp4", "What color is the hair?"))

Importing the package is quick: JAX and the model's code are imported when `load` or `Model` is first used.
"""

import gc
import os
import sys
from typing import TYPE_CHECKING, Any

from favchat_jax.errors import UserError

# transformers reads it when it is imported, and would otherwise print that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if sys.argv[:1] == ["-m"]:  # Python is about to run a command of this package, whose imports take seconds
    from favchat_jax.signals import end_at_interrupt

    end_at_interrupt("favchat")
    # Imports and traces make millions of objects that stay. Searching them for garbage takes a tenth of a start.
    gc.set_threshold(50_000, 20, 100)

if TYPE_CHECKING:
    from favchat_jax.api import Dialogue, EncodedClip, Model, load

__version__ = "0.1.0"
__all__ = ["Dialogue", "EncodedClip", "Model", "UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'favchat_jax' has no attribute {name!r}")
    from favchat_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
