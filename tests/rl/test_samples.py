"""Tests the samples of the reinforcement stage: what they ask, and that bad ones are named, counted and left out."""

import dataclasses
import json

import pytest

from favchat_jax.checkpoints.run import assemble
from favchat_jax.config import PoolConfig
from favchat_jax.data import bad_records, reasoning
from favchat_jax.data.sources import open_dataset
from favchat_jax.errors import UserError
from favchat_jax.rl import samples as rooms
from favchat_jax.rl.pool import Pool
from favchat_jax.rl.samples import Samples, draw
from tests.conftest import DATA


def records(packed, split="train"):
    source = open_dataset(DATA, packed, split)
    return [source[i] for i in range(len(source))]


def damaged(monkeypatch, *train, heldout=()):
    """Cuts the clips at these places of the splits short, as the reinforcement stage reads them."""
    bad = {"train": train, "heldout": heldout}

    def opened(_, packed, split):
        held = records(packed, split)
        return [dataclasses.replace(r, clip=r.clip[:40]) if i in bad[split] else r for i, r in enumerate(held)]

    monkeypatch.setattr(rooms, "open_dataset", opened)


@pytest.fixture(scope="module")
def parts_of(small_world):
    return lambda argument="", **changes: assemble(small_world.config("grpo", argument, **changes))


def ids(small_world, split="train"):
    return [record.id for record in records(small_world.packed, split)]


def test_a_sample_is_a_clip_with_the_question_of_the_cold_start(parts_of, small_world):
    samples = Samples(parts_of(), "heldout", 3)
    read = list(samples)
    assert [sample.record.id for sample in read] == ids(small_world, "heldout")[:3]
    assert {sample.prompt for sample in read} == {reasoning.QUESTION} and read[0].question.answer == ""
    assert read[0].frames.shape == (2, 32, 32, 3)
    assert samples.longest_prompt == len(read[0].tokens)


def test_as_published_a_sample_is_each_question_of_a_clip_with_a_request_to_think(parts_of, small_world):
    samples = Samples(parts_of("recipe=published"), "train", 7)
    record = records(small_world.packed)[0]
    read = list(samples)
    asked = [sample.question for sample in read if sample.record.id == record.id]
    assert len(read) == 7 and asked == list(record.questions)[:7]
    assert all(s.prompt.startswith(s.question.question + "\n") and "<think>" in s.prompt for s in read)
    assert samples.longest_prompt == max(len(sample.tokens) for sample in read)


def test_bad_samples_are_named_once_and_left_out(parts_of, small_world, monkeypatch, caplog):
    damaged(monkeypatch, 1, 3)
    samples, names = Samples(parts_of(), "train", 5), ids(small_world)
    for _ in range(2):
        assert [sample.record.id for sample in samples] == [names[0], names[2], names[4]]
    assert (samples.counted.seen, list(samples.counted.reasons)) == (5, [names[1], names[3]])
    assert caplog.text.count(f"record {names[1]} is skipped (1 of 2 so far): clip {names[1]} cannot be read") == 1
    assert caplog.text.count("is skipped") == 2


def test_a_question_over_the_limit_is_bad_and_makes_no_other_prompt_longer(parts_of):
    fitting = Samples(parts_of("recipe=published"), "train", 2)
    limit = min(len(sample.tokens) for sample in fitting)
    samples = Samples(parts_of("recipe=published", data__buckets=(limit,)), "train", 0)
    assert samples.longest_prompt == limit
    assert all(len(sample.tokens) <= limit for sample in [samples.read(0), samples.read(1)] if sample)
    assert f"over the limit of {limit}" in next(iter(samples.counted.reasons.values()))


def test_a_bad_sample_is_replaced_by_another_in_the_same_iteration(parts_of, monkeypatch):
    damaged(monkeypatch, 0, 2, 4)
    samples = Samples(parts_of(), "train", 6)
    pool = Pool(6, PoolConfig(), seed=0)
    for iteration in range(1, 4):
        places, read = draw(pool, samples, 2)
        assert pool.iteration == iteration and len(read) == 2 and not set(places.tolist()) & {0, 2, 4}
    assert pool.bad <= {0, 2, 4} and samples.counted.bad == len(pool.bad) > 0


def test_draws_resume_exactly_with_bad_samples(parts_of, monkeypatch):
    damaged(monkeypatch, 0, 2, 4)

    def start():
        return Pool(9, PoolConfig(), seed=0), Samples(parts_of(), "train", 9)

    one, other = start(), start()
    for _ in range(2):
        draw(*one, 2)
    state = json.loads(json.dumps([part.get_state() for part in one]))
    assert state[0]["bad"]
    for part, saved in zip(other, state, strict=True):
        part.set_state(saved)
    for _ in range(4):
        assert draw(*one, 2)[0].tolist() == draw(*other, 2)[0].tolist()
    assert [part.get_state() for part in one] == [part.get_state() for part in other]


def test_a_split_with_only_bad_samples_is_refused(parts_of, monkeypatch):
    damaged(monkeypatch, 0, 1)
    samples = Samples(parts_of(), "train", 2)
    with pytest.raises(UserError, match="2 of 2 records are bad.*.the last: clip .* cannot be read"):
        list(samples)
    with pytest.raises(UserError, match="2 of 2 records are bad"):
        draw(Pool(2, PoolConfig(), seed=0), Samples(parts_of(), "train", 2), 1)


def test_a_large_share_of_bad_samples_ends_the_run(parts_of, monkeypatch):
    damaged(monkeypatch, *range(12))
    monkeypatch.setattr(bad_records, "BAD_AFTER", 10)
    with pytest.raises(UserError, match="records are bad, more than 1%: fix or remove"):
        list(Samples(parts_of(), "train", 0))


def test_a_split_without_targets_is_refused(parts_of, small_world, monkeypatch):
    bare = [dataclasses.replace(record, targets={}) for record in records(small_world.packed)]
    monkeypatch.setattr(rooms, "open_dataset", lambda *_: bare)
    with pytest.raises(UserError, match="no clip of split train has attribute, emotion and action targets"):
        Samples(parts_of(), "train", 0)
    asked = sum(len(record.questions) for record in bare if record.has_face)
    assert len(Samples(parts_of("recipe=published"), "train", 0)) == asked
