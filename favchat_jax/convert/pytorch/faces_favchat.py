"""Faces of a clip: detectors, search, tracks and crops. An exported folder has their code here, not these imports."""

from favchat_jax.data.faces.crops import cut, squares
from favchat_jax.data.faces.detectors import load_detector
from favchat_jax.data.faces.search import LOOKS, search
from favchat_jax.data.faces.tracks import link, listing

__all__ = ["LOOKS", "cut", "link", "listing", "load_detector", "search", "squares"]
