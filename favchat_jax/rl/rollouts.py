"""Responses of a policy to clips, what they are worth, and the batch that scores and updates read."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from favchat_jax.checkpoints.run import Assembly
from favchat_jax.config import Config
from favchat_jax.data import reasoning
from favchat_jax.data.record import Record
from favchat_jax.data.video import decode
from favchat_jax.generation.sampler import Sampler, Sampling
from favchat_jax.models.favchat import ClipFeatures
from favchat_jax.rl import rewards
from favchat_jax.rl.policy import response_mask


@dataclasses.dataclass(frozen=True)
class Rollout:
    """G responses to each of some clips, padded to B clips, since one shape compiles once.

    Attributes:
        records: of the clips that count, the first of the B.
        features: of all B.
        responses: tokens [B, G, n].
        shuffled: responses about the same frames in another order; None unless a reward needs them.
    """

    records: Sequence[Record]
    features: ClipFeatures
    responses: Int[np.ndarray, "B G n"]
    shuffled: Int[np.ndarray, "B G n"] | None


class Rollouts:
    """Draws responses and rewards them.

    Args:
        config: of the reinforcement stage.
        parts: its model and tokenizers.
        functions: reward function and weight by name.
        weights: all weights of the policy.
    """

    def __init__(
        self,
        config: Config,
        parts: Assembly,
        functions: Mapping[str, tuple[rewards.Reward, float]],
        weights: dict[str, jax.Array],
    ):
        self._batch, self._settings, self._longest = config.batch, config.reinforcement, max(config.data.buckets)
        self._functions = functions
        self._sampler = Sampler(config, weights, parts.tokenizer, parts.prompt_tokenizer)

    def draw(self, weights: dict[str, jax.Array], records: Sequence[Record], group: int, sampling: Sampling) -> Rollout:
        """Responses of the policy with these weights, `group` to each clip."""
        self._sampler.load(weights)
        count, size = self._sampler.frames, self._sampler.image_size
        padded = [*records, *[records[0]] * (self._batch - len(records))]
        frames = np.stack([decode(record.clip, frames=count, size=size, name=record.id).frames for record in padded])

        def respond(features: ClipFeatures) -> Int[np.ndarray, "B G n"]:
            return self._sampler.responses(features, [reasoning.QUESTION] * len(padded), group, sampling)

        features = self._sampler.encode(frames)
        responses, shuffled = respond(features), None
        if self._settings.shuffled_frames:
            order = np.random.default_rng(sampling.seed).permutation(frames.shape[1])
            shuffled = respond(self._sampler.encode(frames[:, order]))
        return Rollout(records, features, responses, shuffled)

    def batch(self, rollout: Rollout) -> dict[str, np.ndarray]:
        """Prompt and response of each sequence, and which positions predict a response's tokens."""
        conversation, (clips, group, _) = self._sampler.conversation, rollout.responses.shape
        asked = conversation.encode([(reasoning.QUESTION, None)], self._sampler.frames, self._longest).tokens
        tokens = np.concatenate([np.broadcast_to(asked, (clips, group, len(asked))), rollout.responses], axis=-1)
        # Position i predicts token i + 1: the last of the prompt is the first that counts.
        counted = np.zeros(tokens.shape, bool)
        counted[..., len(asked) - 1 : -1] = response_mask(rollout.responses, conversation.eos)
        ids, mask = self._sampler.prompt.encode(reasoning.QUESTION)
        return {
            "tokens": tokens.astype(np.int32),
            "counted": counted,
            "prompt": np.broadcast_to(ids, (clips, 1, len(ids))),
            "prompt_mask": np.broadcast_to(mask, (clips, 1, len(mask))),
        }

    def rewards(self, rollout: Rollout) -> dict[str, Float[np.ndarray, "b G"]]:
        """Each reward of each response to the clips that count, and under `total` their weighted sum."""
        sampler, end, rows = self._sampler, self._sampler.conversation.eos, []
        for i, record in enumerate(rollout.records):
            ids = rollout.responses[i]
            group = rewards.Group(
                id=record.id,
                question=reasoning.QUESTION,
                targets=record.targets,
                responses=tuple(map(sampler.text, ids)),
                lengths=tuple(map(int, response_mask(ids, end).sum(-1))),
                complete=tuple(bool((row == end).any()) for row in ids),
                shuffled=() if rollout.shuffled is None else tuple(map(sampler.text, rollout.shuffled[i])),
            )
            rows.append(rewards.evaluate(self._functions, group))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def measure(self, weights: dict[str, jax.Array], clips: Sequence[Record]) -> dict[str, float]:
        """Mean of each reward of the likeliest responses about some clips."""
        sampling = Sampling(self._settings.max_new_tokens)
        batches = [clips[start : start + self._batch] for start in range(0, len(clips), self._batch)]
        rows = [self.rewards(self.draw(weights, batch, 1, sampling)) for batch in batches]
        return {name: float(np.concatenate([row[name] for row in rows]).mean()) for name in rows[0]}
