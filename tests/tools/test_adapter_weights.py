"""The figure of the adapters: its numbers are right and it is written."""

import numpy as np
import pytest

from favchat_jax.data.record import Record
from tests.data.video_files import encode_video
from tools import adapter_weights

GROUPS = {"face clips": [0.6, 0.8], "general clips": [0.2, 0.3, 0.4]}


class Weighing:
    """A sampler whose facial weight is the share of the brightest red in a clip."""

    frames, image_size = 2, 8

    def encode(self, frames):
        return frames[..., 0].mean(axis=(1, 2, 3)) / 255

    def stream_weights(self, features, questions):
        assert [len(asked) for asked in questions] == [1] * len(features)
        return np.stack([1 - features, features], axis=-1)[:, None]


def test_every_clip_counts_once_even_in_a_partial_batch():
    clip = encode_video(4)
    one = Record("clip", clip, np.zeros(83, np.uint8), "", (), {}, "source", True)
    weights = adapter_weights.facial_weights(Weighing(), [one] * (adapter_weights.BATCH + 1), "What is seen?")
    assert len(weights) == adapter_weights.BATCH + 1
    assert max(weights) - min(weights) < 1e-9 and 0 < weights[0] < 1


def test_the_summary_equals_a_calculation_by_hand():
    result = adapter_weights.summarise(GROUPS)
    assert result["face clips"] == {"n": 2, "mean": pytest.approx(0.7), "std": pytest.approx(0.02**0.5)}
    assert result["general clips"] == {"n": 3, "mean": pytest.approx(0.3), "std": pytest.approx(0.1)}
    assert result["cohens_d"] == pytest.approx(0.4 / (0.04 / 3) ** 0.5)


def test_the_figure_is_written(tmp_path):
    adapter_weights.draw(GROUPS, adapter_weights.summarise(GROUPS), str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
