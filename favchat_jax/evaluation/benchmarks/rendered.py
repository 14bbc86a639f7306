"""The embedded benchmark: short questions about held-out rendered clips, scored by normalised exact match."""

from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from tqdm import tqdm

from favchat_jax.data.datasets import Record, open_dataset, prepare
from favchat_jax.data.video import decode
from favchat_jax.errors import UserError
from favchat_jax.evaluation.metrics import accuracy_by_kind, exact_matches, majority_baseline
from favchat_jax.generation.sampler import Sampler, Sampling


def run(config: ml_collections.ConfigDict, sampler: Sampler) -> dict[str, Any]:
    """Answers every question of the split.

    Returns:
        n, accuracy, majority_baseline, by_kind (n, accuracy and majority_baseline of each kind of question), and the
        answers themselves.

    Raises:
        UserError: the split holds no questions, or one of its clips cannot be decoded.
    """
    prepare(config.data.name, config.data.root or None, config.data.packed)
    source = open_dataset(config.data.name, config.data.packed, config.data.split)
    records = [record for record in (source[i] for i in range(len(source))) if record.questions]
    if not records:
        raise UserError(f"split {config.data.split} of {config.data.name} holds no questions: name another data.split")
    if config.limit:
        records = records[: config.limit]
    answers = []
    with tqdm(total=len(records), desc="answering", unit="clip", mininterval=1) as bar:
        for start in range(0, len(records), config.batch):
            batch = records[start : start + config.batch]
            answers += _answer(batch, sampler, config)
            bar.update(len(batch))
    return score(answers)


def score(answers: Sequence[dict[str, str]]) -> dict[str, Any]:
    """The benchmark's figures from rows of clip, kind, question, reference and prediction."""
    kinds, references = [row["kind"] for row in answers], [row["reference"] for row in answers]
    hits = exact_matches([row["prediction"] for row in answers], references)
    by_kind, baseline = accuracy_by_kind(hits, kinds), majority_baseline(references, kinds)
    commonest = sum(baseline[kind] * row["n"] for kind, row in by_kind.items()) / len(answers)
    return {
        "n": len(answers),
        "accuracy": sum(hits) / len(hits),
        "majority_baseline": commonest,
        "by_kind": {kind: {**row, "majority_baseline": baseline[kind]} for kind, row in by_kind.items()},
        "answers": [{**row, "correct": hit} for row, hit in zip(answers, hits, strict=True)],
    }


def _answer(records: Sequence[Record], sampler: Sampler, config: ml_collections.ConfigDict) -> list[dict[str, str]]:
    # A short last batch is filled up with its first clip, so that its shape is that of the others.
    padded = [*records, *[records[0]] * (config.batch - len(records))]
    frames = [decode(r.clip, frames=sampler.frames, size=sampler.image_size, name=r.id).frames for r in padded]
    conversations = [_fill([[(q.question, None)] for q in r.questions], config.questions) for r in padded]
    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    predictions = sampler.answer(sampler.encode(np.stack(frames)), conversations, sampling)
    return [
        {"clip": r.id, "kind": q.kind, "question": q.question, "reference": q.answer, "prediction": prediction}
        for r, texts in zip(records, predictions, strict=False)
        for q, prediction in zip(r.questions, texts, strict=False)
    ]


def _fill(conversations: list, count: int) -> list:
    return (conversations * count)[:count] if len(conversations) < count else conversations
