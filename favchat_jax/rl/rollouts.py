"""Draws the policy's responses to clips, rewards them, and encodes them as a batch for scores and updates."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from favchat_jax.checkpoints.run import Assembly
from favchat_jax.data import reasoning
from favchat_jax.data.loader import Source
from favchat_jax.data.record import Record
from favchat_jax.data.video import decode
from favchat_jax.generation.sampler import Sampler, Sampling
from favchat_jax.models.favchat import ClipFeatures
from favchat_jax.rl import rewards


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Holds G responses to each of a batch's clips. Fewer clips are padded to B, since one shape compiles once.

    Attributes:
        records: of the clips without padding, the first of the B.
        features: of all B clips.
        responses: token ids.
        shuffled: responses about the same frames in another order; None unless `rl.shuffled_frames` is set.
    """

    records: Sequence[Record]
    features: ClipFeatures
    responses: Int[np.ndarray, "B G n"]
    shuffled: Int[np.ndarray, "B G n"] | None


def response_mask(responses: Int[np.ndarray, "... n"], end: int) -> Bool[np.ndarray, "... n"]:
    """Returns True for the tokens of each response up to and including its first end."""
    ends = np.cumsum(responses == end, axis=-1)
    return (ends == 0) | ((ends == 1) & (responses == end))


class Rollouts:
    """Draws responses and rewards them.

    Args:
        parts: the model of the reinforcement stage and the encoders of its text inputs.
        functions: reward function and weight by name.
        weights: all weights of the policy.
    """

    def __init__(
        self,
        parts: Assembly,
        functions: Mapping[str, tuple[rewards.Reward, float]],
        weights: dict[str, jax.Array],
    ):
        config = parts.config
        self._batch, self._settings, self._longest = config.batch, config.reinforcement, max(config.data.buckets)
        self._functions = functions
        self._sampler = Sampler(parts, weights)

    def draw(self, weights: dict[str, jax.Array], records: Sequence[Record], group: int, sampling: Sampling) -> Rollout:
        """Draws `group` responses of the policy with these weights to each clip.

        Raises:
            VideoError: a clip cannot be decoded.
        """
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
        """Encodes prompts and responses for `rl.policy`: tokens and counted [B, G, L], prompt, prompt_mask [B, 1, P].

        `counted` is True at the positions that predict a response's tokens.
        """
        conversation, (clips, group, _) = self._sampler.conversation, rollout.responses.shape
        asked = conversation.encode([(reasoning.QUESTION, None)], self._sampler.frames, self._longest).tokens
        tokens = np.concatenate([np.broadcast_to(asked, (clips, group, len(asked))), rollout.responses], axis=-1)
        # Position i predicts token i + 1, so the last token of the prompt is the first position that counts.
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
        """Returns each reward of each response to the b clips of `rollout.records`; `total` is their weighted sum.

        Raises:
            UserError: a reward function fails, see `rewards.evaluate`.
        """
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

    def measure(self, weights: dict[str, jax.Array], clips: Source) -> dict[str, float]:
        """Returns the mean of each reward over the likeliest responses to some clips."""
        sampling, places = Sampling(self._settings.max_new_tokens), range(len(clips))
        rows = []
        for start in places[:: self._batch]:
            records = [clips[i] for i in places[start : start + self._batch]]
            rows.append(self.rewards(self.draw(weights, records, 1, sampling)))
        return {name: float(np.concatenate([row[name] for row in rows]).mean()) for name in rows[0]}
