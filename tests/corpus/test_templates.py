"""The offline back end states the labels, in words that differ from clip to clip."""

import itertools
from pathlib import Path

import pytest

from favchat_jax.corpus.checks import check_pair
from favchat_jax.corpus.claims import contradictions
from favchat_jax.corpus.describe import Clip, Unannotated
from favchat_jax.corpus.templates import DOING, FEATURES, FEELING, HAIR_COLORS, HAIR_SHAPES, WORN, TemplateWriter
from favchat_jax.data import vocabulary
from tests.corpus.corpus_folder import LABELS


def clip(labels, digest="0") -> Clip:
    return Clip("clip", Path("clip.mp4"), {group: tuple(names) for group, names in labels.items()}, 40, digest)


def test_a_text_states_every_label_and_nothing_else():
    annotation = TemplateWriter().write(clip(LABELS))
    for word in ("young man", "brown hair", "eyeglasses", "no beard", "talking", "nodding", "happy"):
        assert word in annotation.summary
    assert contradictions(annotation.summary, LABELS) == []
    assert len(annotation.questions) == 4
    assert {pair.kind for pair in annotation.questions} == {"emotion", "motion", "appearance"}


@pytest.mark.parametrize(
    "labels", [{**LABELS, "appearance": [name]} for name in vocabulary.APPEARANCE], ids=vocabulary.APPEARANCE
)
def test_the_text_of_every_appearance_label_passes_the_checks(labels):
    annotation = TemplateWriter().write(clip(labels))
    assert contradictions(annotation.summary, labels) == []
    assert [check_pair(pair, labels) for pair in annotation.questions] == [[]] * len(annotation.questions)


@pytest.mark.parametrize("group", ["action", "emotion"])
def test_clips_of_sources_with_one_kind_of_label_get_a_text_too(group):
    for name in {"action": vocabulary.ACTION, "emotion": vocabulary.EMOTION}[group]:
        annotation = TemplateWriter().write(clip({group: [name]}))
        word = FEELING[name] if group == "emotion" else DOING.get(name, name)
        assert word in annotation.summary and word in annotation.questions[0].answer


def test_words_differ_between_clips_and_attempts_and_are_the_same_in_every_run():
    texts = [TemplateWriter().write(clip(LABELS, str(n))).line() for n in range(20)]
    assert texts == [TemplateWriter().write(clip(LABELS, str(n))).line() for n in range(20)]
    assert len({line.split('"summary"')[1] for line in texts}) > 10
    tries = [TemplateWriter().write(clip(LABELS), ["x"] * n).summary for n in range(6)]
    assert len(set(tries)) > 2


def test_a_clip_without_labels_gets_no_text_but_a_reason():
    with pytest.raises(Unannotated, match="no labels.*--backend=openai"):
        TemplateWriter().write(clip({}))


def test_every_word_list_names_labels_that_exist():
    named = itertools.chain(HAIR_COLORS, HAIR_SHAPES, FEATURES, WORN, DOING, FEELING)
    assert set(named) <= set(vocabulary.VOCABULARY)
