"""Writes the code that finds, follows and cuts out faces as one file that needs nothing of this package.

The exported model cuts out the same pixels, since it runs the same lines.
"""

import ast
import inspect
from types import ModuleType

from favchat_jax import errors
from favchat_jax.data.faces import crops, detectors, search, tracks

MODULES = (errors, detectors, search, tracks, crops)  # in the order of their imports
HEAD = '''"""Finds faces in clips, follows them over time, and cuts out the square that the facial encoder sees."""

from __future__ import annotations  # nothing reads the shapes in them here

try:
    import cv2
except ImportError:  # OpenCV is only needed for face crops
    cv2 = None
'''
LEFT_OUT = ("favchat_jax", "jaxtyping", "cv2")


def source() -> str:
    """Returns the file's text."""
    return "\n\n".join([HEAD, *map(_alone, MODULES)])


def _alone(module: ModuleType) -> str:
    """Returns a module's code without its docstring and the imports that are left out."""
    text = inspect.getsource(module)
    title, *rest = ast.parse(text).body
    dropped = [title, *filter(_is_left_out, rest)]
    gone = {number for node in dropped for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    kept = (line for number, line in enumerate(text.splitlines(), start=1) if number not in gone)
    return "\n".join(kept).strip() + "\n"


def _is_left_out(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return str(node.module).partition(".")[0] in LEFT_OUT
    return isinstance(node, ast.Import) and node.names[0].name in LEFT_OUT
