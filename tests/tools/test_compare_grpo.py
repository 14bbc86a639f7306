"""Comparing runs: runs of a kind are grouped, and the rollouts to reach a reward are interpolated."""

import json

import pytest

from favchat_jax.errors import UserError
from tools.compare_grpo import draw, last_reward, read_runs, rollouts_to_reach

LINES = [{"step": s, "rollouts": 10 * s, "facial": r} for s, r in ((0, 0.1), (2, 0.3), (4, 0.2), (6, 0.6))]


@pytest.mark.parametrize(
    ("reward", "rollouts"), [(0.1, 0), (0.2, 10), (0.3, 20), (0.4, 50), (0.6, 60), (0.61, None), (0.05, 0)]
)
def test_a_reward_is_reached_on_the_line_between_two_measurements(reward, rollouts):
    reached = rollouts_to_reach(LINES, reward)
    assert reached is None if rollouts is None else reached == pytest.approx(rollouts)


def test_the_last_reward_is_the_mean_of_the_last_three():
    assert last_reward(LINES) == pytest.approx(1.1 / 3)


def run(folder, lines=LINES, seed=0, reward="ours:facial", **settings):
    folder.mkdir()
    (folder / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewards = {"facial": {"path": reward, "weight": 1.0}}
    config = {"seed": seed, "rl": {"data_efficient": True, "utility": "scale_free", "rewards": rewards, **settings}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_runs_that_differ_only_in_the_seed_are_of_one_kind(tmp_path):
    folders = [
        run(tmp_path / "a"),
        run(tmp_path / "b", seed=1),
        run(tmp_path / "plain", data_efficient=False),
        run(tmp_path / "hot", temperature=2.0),
    ]
    kinds = read_runs(folders)
    assert {kind: list(runs) for kind, runs in kinds.items()} == {
        "Data-Efficient GRPO": folders[:2],
        "GRPO": folders[2:3],
        f"Data-Efficient GRPO, {folders[3]}": folders[3:],
    }
    draw(kinds, str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_an_incomplete_last_line_is_skipped(tmp_path):
    folder = run(tmp_path / "a")
    with (tmp_path / "a" / "heldout.jsonl").open("a") as file:
        file.write('{"step": 8, "roll')
    assert read_runs([folder])["Data-Efficient GRPO"][folder] == LINES


def test_runs_that_cannot_be_compared_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="none holds no heldout.jsonl"):
        read_runs([str(tmp_path / "none")])
    with pytest.raises(UserError, match="own has no reward named facial"):
        read_runs([run(tmp_path / "own", [{"step": 0, "rollouts": 0, "mine": 1.0}])])
    with pytest.raises(UserError, match="cannot be compared: .*one has ours:facial, .*two published:facial"):
        read_runs([run(tmp_path / "one"), run(tmp_path / "two", reward="published:facial")])
    with pytest.raises(UserError, match="GRPO were measured at different iterations"):
        read_runs([run(tmp_path / "a"), run(tmp_path / "b", LINES[:2], seed=1)])
