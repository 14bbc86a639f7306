"""The sweep over numbers of frames evaluates a model of each length and returns its figures."""

from types import SimpleNamespace

import pytest

from favchat_jax.checkpoints.run import Run
from tests.models.tiny_parts import tiny_config
from tools import frame_length


def figure(value):
    return {"accuracy": {"value": value, "low": value - 0.1, "high": value + 0.1, "scale": 100}}


@pytest.fixture
def rows(monkeypatch):
    """The rows of a sweep over a model whose accuracy depends only on its number of frames."""
    asked = []

    def run(config, frames):
        asked.append((config.data.name, config.limit, frames))
        return {"n": 4, "figures": figure(frames / 10), "groups": {"motion": {"n": 2, "figures": figure(frames / 20)}}}

    monkeypatch.setattr(frame_length, "benchmark", SimpleNamespace(run=run))
    monkeypatch.setattr(frame_length, "assemble", lambda config: config)
    monkeypatch.setattr(frame_length, "from_run", lambda run: run.weights)
    monkeypatch.setattr(frame_length, "Sampler", lambda config, weights: config)
    monkeypatch.setattr(frame_length, "Session", SimpleNamespace(of=lambda config, *_: config.model.frames))
    config = tiny_config().updated({"model.frames": 8, "data.name": "faces"})
    run = Run(SimpleNamespace(config=config), weights={})
    rows = frame_length.sweep(run, [2, 8], limit=3)
    assert asked == [("faces", 3, 2), ("faces", 3, 8)]
    return rows


def test_every_length_has_figures_for_all_questions_and_for_each_kind(rows):
    assert [row["frames"] for row in rows] == [2, 8]
    assert rows[1]["figures"]["all"] == {"n": 4, **figure(0.8)["accuracy"]}
    assert rows[0]["figures"]["motion"] == {"n": 2, **figure(0.1)["accuracy"]}


def test_the_table_has_one_column_per_length(rows):
    lines = [line.split() for line in frame_length.table(rows).splitlines()]
    assert lines[0] == ["frames", "n", "2", "8"]
    assert lines[2] == ["motion", "2", "0.100", "[0.000,", "0.200]", "0.400", "[0.300,", "0.500]"]


def test_the_figure_is_written(rows, tmp_path):
    frame_length.draw(rows, 8, str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
