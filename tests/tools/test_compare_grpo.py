"""Comparing runs: where a reward is first reached."""

import pytest

from tools.compare_grpo import draw, rollouts_to_reach

LINES = [{"step": s, "rollouts": 10 * s, "facial": r} for s, r in ((0, 0.1), (2, 0.3), (4, 0.2), (6, 0.6))]


@pytest.mark.parametrize(
    ("reward", "rollouts"), [(0.1, 0), (0.2, 10), (0.3, 20), (0.4, 50), (0.6, 60), (0.61, None), (0.05, 0)]
)
def test_a_reward_is_reached_on_the_line_between_two_measurements(reward, rollouts):
    reached = rollouts_to_reach(LINES, reward)
    assert reached is None if rollouts is None else reached == pytest.approx(rollouts)


def test_the_picture_is_written(tmp_path):
    draw({"one": LINES, "other": LINES[:2]}, str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
