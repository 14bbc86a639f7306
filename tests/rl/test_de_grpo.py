"""Tests the reinforcement stage on the small world: scores, trained weights, files and exact resumption."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.weights_folder import load_weights
from favchat_jax.config import VARIANTS
from favchat_jax.data import reasoning
from favchat_jax.errors import UserError
from favchat_jax.generation.sampler import Sampler, Sampling
from favchat_jax.generation.weights import from_run
from favchat_jax.models import favchat
from favchat_jax.rl import de_grpo, policy
from favchat_jax.rl.curves import read_lines
from favchat_jax.rl.iteration import UTILITY_BINS
from favchat_jax.rl.pool import STATES
from favchat_jax.rl.rollouts import Rollout, Rollouts, response_mask
from favchat_jax.sharding import training_mesh
from favchat_jax.training.progress import Outcome
from tests.conftest import newest, same_weights
from tests.models.tiny_parts import MISTRAL, drawn_flat, favchat_shapes, tiny_config
from tests.rl.test_samples import damaged

SMALL = {
    "steps": 4,
    "batch": 2,
    "checkpoint_every": 2,
    "rl__group": 3,
    "rl__max_new_tokens": 6,
    "rl__samples": 6,  # one of them is bad
    "rl__heldout_samples": 4,  # one of them is bad
    "rl__measure_every": 2,
}


def favour_short_words(group):
    """Returns rewards that differ even for responses of a policy that has learned very little."""
    return [text.count("e") / (1 + len(text)) for text in group.responses]


def count_shuffled(group):
    """Returns the number of responses about shuffled frames."""
    return [len(group.shuffled)] * len(group.responses)


ASKED = []  # groups that `keep_group` was called with


def keep_group(group):
    """Keeps the group and returns favour_short_words."""
    ASKED.append(group)
    return favour_short_words(group)


@pytest.fixture(scope="module", autouse=True)
def bad_clips():
    """Cuts a training clip and a held-out clip short, which all runs here leave out."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        damaged(monkeypatch, 2, heldout=[1])
        yield


@pytest.fixture(scope="module")
def config_of(small_world, trained, tmp_path_factory):
    """Builds configs of small runs from stage 3, renamed to a cold start; `changes` as in `SmallWorld.config`."""
    start = tmp_path_factory.mktemp("start") / "coldstart"
    shutil.copytree(trained.folder / "stage3", start)
    settings = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**settings, "stage": "coldstart"}))

    def config(argument="", /, **changes):
        ours = {"init__from_run": str(start), "rl__rewards__form__path": "tests.rl.test_de_grpo:favour_short_words"}
        return small_world.config("grpo", argument, **{**SMALL, **ours, **changes})

    return config


def train(config, workdir) -> Outcome:
    return de_grpo.train(config, workdir, training_mesh(config))


@pytest.fixture(scope="module")
def undisturbed(config_of, tmp_path_factory):
    """Trains a run without an interruption."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "grpo"
    assert train(config_of(), workdir) == Outcome(step=4, steps=4, resumed_at=0)
    return workdir


def test_a_bad_clip_is_left_out_and_kept_in_mind_by_each_checkpoint(undisturbed):
    folders = sorted((undisturbed / "checkpoints").glob("*/data/metadata"))
    states = [json.loads(folder.read_text()) for folder in folders]
    assert len(states) == 2
    for state in states:
        assert len(state["bad"]) == state["samples"]["bad"] == 1 and state["visits"][state["bad"][0]] == 0
        reason = next(iter(state["samples"]["bad_ids"].values()))
        assert "cannot be read as a video" in reason


def test_a_run_writes_each_reward_the_states_and_curves(undisturbed):
    lines = read_lines(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["reward"] == pytest.approx(line["reward_facial"] + line["reward_form"])
        assert sum(line[f"share_{state}"] for state in STATES) == pytest.approx(1)
        assert sum(line[f"utility_{i}"] for i in range(UTILITY_BINS)) == pytest.approx(1)
        assert 1 <= line["response_tokens"] <= 6 and line["rollouts"] == 6
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["kl"] > 0
    assert [line["step"] for line in read_lines(undisturbed / "heldout.jsonl")] == [0, 2, 4]
    assert (undisturbed / "curves.png").stat().st_size > 10_000


def test_only_adapters_and_lora_train_and_the_reference_is_constant(undisturbed, config_of):
    start = assembly.load_trained(config_of().init.from_run)
    trained, reference = newest(undisturbed), load_weights(undisturbed / "reference")
    assert all(path.startswith("adapter/") or "lora_" in path for path in trained)
    assert same_weights(reference, {path: start[path] for path in reference})
    assert not same_weights(trained, reference)


def test_an_interrupted_run_ends_with_the_same_bits(undisturbed, config_of, tmp_path, monkeypatch):
    workdir, original, seen = tmp_path / "grpo", Rollouts.batch, []

    def end_after_three(self, rollout):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(rollout)
        return original(self, rollout)

    monkeypatch.setattr(Rollouts, "batch", end_after_three)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(), workdir)
    monkeypatch.undo()
    assert train(config_of(), workdir) == Outcome(step=4, steps=4, resumed_at=2)
    assert same_weights(newest(workdir), newest(undisturbed))
    kept = [
        [{k: v for k, v in line.items() if "second" not in k} for line in read_lines(folder / "metrics.jsonl")]
        for folder in (workdir, undisturbed)
    ]
    assert kept[0] == kept[1]
    assert read_lines(workdir / "heldout.jsonl") == read_lines(undisturbed / "heldout.jsonl")


def test_a_finished_run_answers(undisturbed, small_world):
    run = assembly.load_run(undisturbed)
    sampler = Sampler(run.parts, from_run(run))
    frames = np.zeros((1, sampler.frames, sampler.image_size, sampler.image_size, 3), np.uint8)
    assert isinstance(sampler.answer(sampler.encode(frames), [[[("Which hat?", None)]]], Sampling(4))[0][0], str)


def test_an_empty_pool_ends_the_run_with_a_message(config_of, tmp_path, caplog):
    config = config_of(steps=9, rl__pool__tau_remove=1.0, rl__pool__discovery=1)
    with caplog.at_level("INFO", logger="favchat_jax"):
        outcome = train(config, tmp_path / "grpo")
    assert outcome.finished and outcome.step == 3, "five samples in batches of two"
    assert "the pool ran empty at step 3" in caplog.text
    assert read_lines(tmp_path / "grpo" / "metrics.jsonl")[-1]["rollouts"] == 3
    assert [line["step"] for line in read_lines(tmp_path / "grpo" / "heldout.jsonl")] == [0, 2, 3]
    assert train(config, tmp_path / "grpo") == Outcome(step=3, steps=3, resumed_at=3)
    assert [line["step"] for line in read_lines(tmp_path / "grpo" / "heldout.jsonl")] == [0, 2, 3]


@pytest.mark.slow
def test_the_published_recipe_asks_questions_and_reinforces_with_its_four_rewards(config_of, tmp_path):
    ASKED.clear()
    path = "tests.rl.test_de_grpo:keep_group"
    config = config_of("recipe=published", steps=2, batch=2, data__buckets=(320,), rl__rewards__form__path=path)
    assert train(config, tmp_path / "grpo").step == 2
    lines = read_lines(tmp_path / "grpo" / "metrics.jsonl")
    assert all(line["rollouts"] == 6 and {"reward_temporal", "reward_length"} <= line.keys() for line in lines)
    assert all(group.answer and group.question != reasoning.QUESTION for group in ASKED)
    drawn = [group for group in ASKED if len(group.responses) == 3]
    assert len(drawn) == 4 and all(len(group.shuffled) == 1 for group in drawn)


def test_a_reward_that_cannot_be_imported_is_refused_before_any_work(config_of, tmp_path):
    with pytest.raises(UserError, match="reward 'nowhere:facial' cannot be imported"):
        train(config_of(rl__rewards__facial__path="nowhere:facial"), tmp_path / "grpo")
    assert not (tmp_path / "grpo").exists()


def test_the_temporal_reward_gets_responses_about_shuffled_frames_if_the_config_sets_them(config_of, tmp_path):
    settings = {"steps": 1, "rl__rewards__facial__path": "favchat_jax.rl.rewards:temporal"}
    with pytest.raises(UserError, match="needs responses about shuffled frames"):
        train(config_of(**settings), tmp_path / "without")
    settings["rl__rewards__facial__path"] = "tests.rl.test_de_grpo:count_shuffled"
    config = config_of(**settings, rl__shuffled_frames=True, rl__measure_every=5)
    train(config, tmp_path / "with")
    assert read_lines(tmp_path / "with" / "metrics.jsonl")[0]["reward_facial"] == config.rl.group // 2
    assert [line["facial"] for line in read_lines(tmp_path / "with" / "heldout.jsonl")] == [1, 1], "one greedy response"


# Calls: 3 held-out clips, 2 iterations of 2 clips, 3 held-out clips. Call 10 is of a held-out clip, 11 of iteration 3.
@pytest.mark.parametrize("good", [9, 10])
def test_a_reward_that_fails_late_loses_no_iteration(good, undisturbed, config_of, tmp_path, monkeypatch):
    workdir, calls, original = tmp_path / "grpo", [], favour_short_words

    def fails_late(group):
        calls.append(group.id)
        if len(calls) > good:
            raise ValueError("out\nof words")
        return original(group)

    monkeypatch.setitem(globals(), "favour_short_words", fails_late)
    with pytest.raises(UserError, match="raised ValueError: out$"):
        train(config_of(checkpoint_every=100), workdir)
    monkeypatch.undo()
    assert [line["step"] for line in read_lines(workdir / "metrics.jsonl")] == [1, 2]
    assert train(config_of(checkpoint_every=100), workdir) == Outcome(step=4, steps=4, resumed_at=2)
    assert same_weights(newest(workdir), newest(undisturbed))


def test_prompts_of_different_lengths_are_padded_after_the_response():
    samples = [SimpleNamespace(tokens=np.array(tokens), prompt=None) for tokens in ([7, 8], [7, 8, 9])]
    responses = np.array([[[5, 2, 2], [5, 6, 4]]] * 2)
    rollouts = SimpleNamespace(
        _longest_prompt=4,
        _sampler=SimpleNamespace(
            conversation=SimpleNamespace(pad=0, eos=2),
            prompt=SimpleNamespace(encode=lambda _: (np.zeros(3, np.int32), np.ones(3, bool))),
        ),
    )
    batch = Rollouts.batch(rollouts, Rollout(samples, 2, None, responses, None))
    assert batch["tokens"].tolist() == [
        [[7, 8, 5, 2, 2, 0, 0], [7, 8, 5, 6, 4, 0, 0]],
        [[7, 8, 9, 5, 2, 2, 0], [7, 8, 9, 5, 6, 4, 0]],
    ]
    # A position counts if the token after it belongs to the response.
    assert batch["counted"].astype(int).tolist() == [
        [[0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0]],
        [[0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]],
    ]
    assert batch["prompt"].shape == batch["prompt_mask"].shape == (2, 1, 3)


def test_a_response_counts_up_to_its_first_end():
    mask = response_mask(np.array([[5, 2, 7, 2, 2], [5, 6, 7, 8, 9], [2, 2, 2, 2, 2]]), end=2)
    assert mask.astype(int).tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_equal_those_of_the_full_model_for_one_sequence(variant):
    model = favchat.build(tiny_config().model, MISTRAL, variant=variant, lora_rank=2)
    weights = drawn_flat(favchat_shapes(model, 2, 32), spread=0.3)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MISTRAL.vocab_size, (2, 3, 9)).astype(np.int32)
    tokens[:, :, 1:4] = -1
    frames = rng.integers(0, 256, (2, 2, 32, 32, 3), np.uint8)
    prompt = rng.integers(0, 512, (2, 1, 4)).astype(np.int32)
    mask = np.arange(4) < np.array([[[3]], [[4]]])
    params = {"params": unflatten_dict(weights, sep="/")}
    batch = {"tokens": tokens, "prompt": prompt, "prompt_mask": mask}

    @jax.jit
    def full_model(params, *inputs):
        logits = model.apply(params, *inputs, method=lambda m, *x: m.llm.logits(m(*x).hidden[0]))
        return jax.nn.log_softmax(logits / 0.7)

    @jax.jit
    def both_ways(weights):
        features = model.apply({"params": unflatten_dict(weights, sep="/")}, frames, method="encode")
        score = policy.token_log_probabilities
        return [score(model, weights, features, batch, temperature=0.7, chunk=chunk) for chunk in (4, 256)]

    expected = np.zeros((2, 3, 5))
    for clip, response in np.ndindex(2, 3):
        one = (slice(clip, clip + 1), slice(response, response + 1))
        alone = full_model(params, frames[clip : clip + 1], tokens[one], prompt[clip : clip + 1], mask[clip : clip + 1])
        expected[clip, response] = alone[0, np.arange(3, 8), tokens[clip, response, 4:]]
    for scored in both_ways(weights):
        np.testing.assert_allclose(scored[:, :, 3:-1], expected, atol=1e-4)
