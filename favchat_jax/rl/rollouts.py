"""Draws the policy's responses to clips, rewards them, and encodes them as a batch for scores and updates."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from favchat_jax.checkpoints.run import Assembly
from favchat_jax.generation.sampler import Sampler, Sampling
from favchat_jax.generation.weights import from_training
from favchat_jax.models.favchat import ClipFeatures
from favchat_jax.processes import agreed
from favchat_jax.rl import rewards
from favchat_jax.rl.samples import Sample, Samples


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Holds G responses to each of a batch's samples. Fewer are padded to B, since one shape compiles once.

    Attributes:
        samples: all B; the last ones repeat the first if fewer than B were drawn.
        count: b, number of samples without padding.
        features: of the clips.
        responses: token ids.
        shuffled: responses about the same frames in another order; None unless `rl.shuffled_frames` is set.
    """

    samples: Sequence[Sample]
    count: int
    features: ClipFeatures
    responses: Int[np.ndarray, "B G n"]
    shuffled: Int[np.ndarray, "B H n"] | None


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
        longest_prompt: number of tokens of the longest prompt that is learned from.
        mesh: devices that hold them.
    """

    def __init__(
        self,
        parts: Assembly,
        functions: Mapping[str, tuple[rewards.Reward, float]],
        weights: dict[str, jax.Array],
        longest_prompt: int,
        mesh: Mesh,
    ):
        config = parts.config
        self._batch, self._settings, self._functions = config.batch, config.reinforcement, functions
        self._longest_prompt = longest_prompt
        merged = self._settings.merged_rollouts
        to_decoding = functools.partial(from_training, config=config, llm=parts.llm, mesh=mesh)
        self._form: Callable[..., dict[str, jax.Array]] = to_decoding if merged else dict
        self._sampler = Sampler(parts, self._form(weights), config.llm.storage, mesh, trained=not merged)

    def draw(self, weights: dict[str, jax.Array], samples: Sequence[Sample], group: int, sampling: Sampling) -> Rollout:
        """Draws G = `group` responses of the policy with these weights to each sample, G // 2 to shuffled frames."""
        self._sampler.unload()  # so that memory holds one merged language model only
        self._sampler.load(self._form(weights))
        padded = [*samples, *[samples[0]] * (self._batch - len(samples))]
        frames = np.stack([sample.frames for sample in padded])
        prompts = [sample.prompt for sample in padded]
        features = self._sampler.encode(frames)
        responses, shuffled = self._sampler.responses(features, prompts, group, sampling), None
        if self._settings.shuffled_frames:
            order = np.random.default_rng(sampling.seed).permutation(frames.shape[1])
            reordered = self._sampler.encode(frames[:, order])
            shuffled = self._sampler.responses(reordered, prompts, max(1, group // 2), sampling)
        return Rollout(padded, len(samples), features, responses, shuffled)

    def batch(self, rollout: Rollout) -> dict[str, np.ndarray]:
        """Encodes prompts and responses for `rl.policy`: tokens and counted [B, G, L], prompt, prompt_mask [B, 1, P].

        `counted` is True at the positions that predict a response's tokens. L is the same for all batches, so shorter
        prompts leave padding at the end.
        """
        conversation, (clips, group, length) = self._sampler.conversation, rollout.responses.shape
        tokens = np.full((clips, group, self._longest_prompt + length), conversation.pad, np.int32)
        counted = np.zeros(tokens.shape, bool)
        for i, sample in enumerate(rollout.samples):
            start = len(sample.tokens)
            tokens[i, :, :start] = sample.tokens
            tokens[i, :, start : start + length] = rollout.responses[i]
            # Position i predicts token i + 1, so the last token of the prompt is the first position that counts.
            counted[i, :, start - 1 : start + length - 1] = response_mask(rollout.responses[i], conversation.eos)
        asked = [self._sampler.prompt.encode(sample.prompt) for sample in rollout.samples]
        prompt, prompt_mask = (np.stack(part)[:, None] for part in zip(*asked, strict=True))
        return {"tokens": tokens, "counted": counted, "prompt": prompt, "prompt_mask": prompt_mask}

    def rewards(self, rollout: Rollout) -> dict[str, Float[np.ndarray, "b G"]]:
        """Returns each reward of each response to the b samples without padding; `total` is their weighted sum.

        The first of several processes computes them, since a reward function need not give the same value twice.

        Raises:
            UserError: a reward function fails, see `rewards.evaluate`.
        """
        found = agreed(lambda: {name: part.tolist() for name, part in self._rewards(rollout).items()})
        return {name: np.array(part) for name, part in found.items()}

    def _rewards(self, rollout: Rollout) -> dict[str, Float[np.ndarray, "b G"]]:
        sampler, end, rows = self._sampler, self._sampler.conversation.eos, []
        for i, sample in enumerate(rollout.samples[: rollout.count]):
            ids = rollout.responses[i]
            group = rewards.Group(
                id=sample.record.id,
                question=sample.question.question,
                targets=sample.record.targets,
                responses=tuple(map(sampler.text, ids)),
                lengths=tuple(map(int, response_mask(ids, end).sum(-1))),
                complete=tuple(bool((row == end).any()) for row in ids),
                shuffled=() if rollout.shuffled is None else tuple(map(sampler.text, rollout.shuffled[i])),
                answer=sample.question.answer,
            )
            rows.append(rewards.evaluate(self._functions, group))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def measure(self, weights: dict[str, jax.Array], samples: Samples) -> dict[str, float]:
        """Returns the mean of each reward over the likeliest responses to all samples that are not bad.

        Raises:
            UserError: as for an iteration over `Samples`, or a reward function fails.
        """
        sampling, unread, rows = Sampling(self._settings.max_new_tokens), iter(samples), []
        while read := list(itertools.islice(unread, self._batch)):
            rows.append(self.rewards(self.draw(weights, read, 1, sampling)))
        return {name: float(np.concatenate([row[name] for row in rows]).mean()) for name in rows[0]}
