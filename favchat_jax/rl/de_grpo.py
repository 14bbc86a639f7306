"""Data-Efficient GRPO: groups of responses, their rewards, and updates of LoRA and adapters (FaVChat v2).

An iteration: draw samples from the living pool, answer each G times, reward the responses, let the pool judge the
samples, and move the policy by `rl/objective.py`. The reference policy is the frozen copy of the LoRA and adapters
that the run started from, over the one base; encoders and Q-Formers do not train, so a clip is encoded once an
iteration. Everything that decides the next iteration is in the checkpoint, so that a resumed run is exact.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.store import Checkpoints
from favchat_jax.checkpoints.weights_folder import load_weights, save_weights
from favchat_jax.data import reasoning
from favchat_jax.data.record import Record
from favchat_jax.data.sources import open_dataset, prepare
from favchat_jax.data.video import decode
from favchat_jax.errors import RunError, UserError
from favchat_jax.files import replace_file
from favchat_jax.generation.sampler import Sampler, Sampling
from favchat_jax.rl import objective, rewards
from favchat_jax.rl.curves import draw_curves, read_lines
from favchat_jax.rl.policy import make_score, make_update, response_mask
from favchat_jax.rl.pool import Pool, Settings
from favchat_jax.sharding import one_device
from favchat_jax.signals import termination
from favchat_jax.training import loop
from favchat_jax.training.checks import claim
from favchat_jax.training.optimizer import make_optimizer
from favchat_jax.training.programs import keep_programs

log = logging.getLogger("favchat_jax")

UTILITY_BINS = 5
TAKEN = ("step", "rollouts", "total")  # names in heldout.jsonl that no reward may have


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> loop.Outcome:
    """Trains in `workdir`, from its newest checkpoint if there is one; a step is an iteration.

    Raises:
        UserError: a group of one, no usable samples, a reward that misbehaves, or what `training.loop.train` says.
        RunError: the loss became NaN or infinite.
    """
    workdir, settings = Path(workdir), config.rl
    check(config)
    claim(workdir, config)
    keep_programs(workdir)
    functions = {name: (rewards.load(reward.path), reward.weight) for name, reward in settings.rewards.items()}
    prepare(config.data.name, config.data.root or None, config.data.packed)
    records = UsableRecords(config, settings.split, settings.samples)
    heldout = UsableRecords(config, settings.heldout_split, settings.heldout_samples)
    parts = assembly.assemble(config)
    pool = Pool(len(records), pool_settings(settings), config.seed, settings.data_efficient)
    optimizer = make_optimizer(config.optimizer, config.steps * settings.updates)
    checkpoints = Checkpoints(workdir, config.checkpoints_kept)
    try:
        state, frozen = loop.start(config, workdir, parts, optimizer, checkpoints, pool, one_device())
        if int(state.step) == 0:
            save_weights(workdir / "reference", state.trainable, {"of": "the policy that a run started from"})
        reference = {path: jnp.asarray(leaf) for path, leaf in load_weights(workdir / "reference").items()}
        run = _Run(config, parts, state, frozen, reference, optimizer, pool, functions, workdir)
        resumed_at = int(state.step)
        with loop.Metrics(workdir, resumed_at, config.log_every) as metrics:
            ended = run.go_on(records, heldout, checkpoints, metrics)
    finally:
        checkpoints.close()
    draw_curves(workdir)
    return loop.Outcome(int(run.state.step), ended, resumed_at)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError where the reinforcement stage's own settings suit no run."""
    settings = config.rl
    if jax.process_count() > 1:
        raise UserError("stage=grpo computes on one device, in one process: leave out --processes")
    if settings.group < 2:
        raise UserError(
            f"rl.group={settings.group} is too small: a group of one has nothing to compare; give 2 or more"
        )
    if settings.temperature <= 0:
        raise UserError("rl.temperature=0 makes all responses of a group the same: give more than 0")
    if settings.utility not in ("scale_free", "published"):
        raise UserError(f"rl.utility={settings.utility} is unknown: choose scale_free or published")
    if config.llm.storage != "full":
        raise UserError(f"llm.storage={config.llm.storage} cannot be answered from, as stage=grpo does: leave it out")
    if not settings.rewards:
        raise UserError("rl.rewards is empty: give at least one, with its path (module:function) and weight")
    for name, reward in settings.rewards.items():
        if name in TAKEN:
            raise UserError(f"rl.rewards.{name}: what is measured beside rewards is called so; rename it")
        if not math.isfinite(reward.weight):
            raise UserError(f"rl.rewards.{name}.weight={reward.weight} is no weight: give a finite number")
        rewards.load(reward.path)
    for name in ("updates", "max_new_tokens", "measure_every"):
        if settings[name] < 1:
            raise UserError(f"rl.{name}={settings[name]}: give at least 1")
    if config.steps < 1:
        raise UserError(f"steps={config.steps}: give at least 1")
    pool_settings(settings)


def pool_settings(settings: ml_collections.ConfigDict) -> Settings:
    """The pool's part of `config.rl`."""
    pool = settings.pool
    return Settings(
        smoothing=pool.smoothing,
        tau_remove=pool.tau_remove,
        tau_keep=pool.tau_keep,
        discovery=pool.discovery,
        rest=pool.rest,
        published=settings.utility == "published",
        baseline=pool.published_baseline,
    )


class UsableRecords:
    """The first `limit` records of a split (0: all) of which something can be told, read when they are asked for.

    Raises:
        UserError: there is none.
    """

    def __init__(self, config: ml_collections.ConfigDict, split: str, limit: int):
        self._source = open_dataset(config.data.name, config.data.packed, split)
        usable = (i for i in range(len(self._source)) if reasoning.can_be_told(self._source[i]))
        self._places = list(itertools.islice(usable, limit or None))
        if not self._places:
            raise UserError(
                f"no clip of split {split} has attribute, emotion and action targets: name another rl.split"
            )

    def __len__(self) -> int:
        return len(self._places)

    def read(self, chosen: Iterable[int]) -> list[Record]:
        """The records at these positions."""
        return [self._source[self._places[i]] for i in chosen]


class _Run:
    """One call of `train`: the policy, who draws from it, and what moves it."""

    def __init__(self, config, parts, state, frozen, reference, optimizer, pool, functions, workdir: Path):
        self.config, self.settings, self.workdir = config, config.rl, workdir
        self.state, self._frozen, self._reference, self._pool = state, frozen, reference, pool
        self._functions = functions
        self._sampler = Sampler(config, {**state.trainable, **frozen}, parts.tokenizer, parts.prompt_tokenizer)
        self._score = make_score(parts.model, config.rl, config.loss_chunk)
        self._update = make_update(parts.model, optimizer, config.rl, config.loss_chunk)

    def go_on(self, records, heldout, checkpoints, metrics) -> int:
        """Iterates until the end, SIGTERM, Ctrl-C or an empty pool; returns the step at which the run is finished."""
        begun, steps = int(self.state.step), self.config.steps
        step = begun
        _keep_until(self.workdir / "heldout.jsonl", step)
        with (
            termination("this step is finished and saved, and the same command goes on") as stop,
            tqdm(total=steps, initial=step, desc="grpo", unit="step", mininterval=1) as bar,
        ):
            if step == 0:
                self._measure(heldout, 0)
            try:
                while step < steps and not stop.is_set():
                    started, kept = time.perf_counter(), self._pool.get_state()
                    samples = self._pool.draw(self.config.batch)
                    if not len(samples):
                        log.info("the pool ran empty at step %d: every sample was discarded; the run ends here", step)
                        steps = step
                        break
                    values = self._iterate(samples, records.read(samples))
                    step, kept = step + 1, self._pool.get_state()
                    self.state = self.state.replace(step=jnp.asarray(step, jnp.int32))
                    values["seconds"] = time.perf_counter() - started
                    metrics.add(step, values, len(samples), 0.0)
                    if step % self.settings.measure_every == 0:
                        self._measure(heldout, step)
                    if step % self.config.checkpoint_every == 0:
                        self._save(checkpoints, kept)
                    bar.update()
                    bar.set_postfix(reward=f"{values['reward']:.3f}", kl=f"{values['kl']:.3f}")
                if step == steps > begun and step % self.settings.measure_every:
                    self._measure(heldout, step)
            except UserError:  # a reward misbehaves: the iterations before are kept
                metrics.flush(step)
                self._save(checkpoints, kept)
                raise
            metrics.flush(step)
            self._save(checkpoints, self._pool.get_state())
            checkpoints.wait()
        return steps

    def _save(self, checkpoints: Checkpoints, pool: dict[str, Any]) -> None:
        """Saves the policy with the pool's state, unless that step is there or the run's start."""
        if int(self.state.step) not in (0, checkpoints.latest()):
            checkpoints.save(self.state, pool)

    def _iterate(self, samples: Int[np.ndarray, " b"], records: Sequence[Record]) -> dict[str, float]:
        """Responses, rewards, judgement and updates for one batch of samples."""
        count = len(records)
        # The pool may hold fewer than a batch, whose shape stays the same.
        padded = [*records, *[records[0]] * (self.config.batch - count)]
        self._sampler.load({**self.state.trainable, **self._frozen})
        seed = self.config.seed * 1_000_003 + self._pool.iteration
        sampling = Sampling(self.settings.max_new_tokens, self.settings.temperature, self.settings.top_p, seed)
        features, responses, shuffled = self._roll_out(padded, self.settings.group, sampling)
        batch = self._batch(responses)
        batch["old"] = self._score(self.state.trainable, self._frozen, features, batch)
        batch["reference"] = self._score(self._reference, self._frozen, features, batch)

        lengths = batch["counted"].sum(-1)
        certainty = np.where(batch["counted"], np.asarray(batch["old"]), 0).sum(-1) / lengths
        parts = self._reward(records, responses, lengths, shuffled)
        weights, utility = self._pool.update(samples, parts["total"], certainty[:count])
        advantages = np.zeros(lengths.shape, np.float32)
        advantages[:count] = weights[:, None] * objective.group_advantages(parts["total"])
        batch["advantages"] = advantages
        batch["counted"] = batch["counted"] & (np.arange(len(padded)) < count)[:, None, None]
        for _ in range(self.settings.updates):
            self.state, values = self._update(self.state, self._frozen, features, batch)
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        if not np.isfinite(values["gradient_norm"]):
            raise RunError(
                f"the gradient of step {int(self.state.step) + 1} is not finite, clips "
                f"{', '.join(record.id for record in records)}: lower optimizer.learning_rate"
            )
        return values | self._summary(parts, lengths[:count], utility)

    def _roll_out(self, records: Sequence[Record], group: int, sampling: Sampling):
        """Features of the clips, G responses to each, and as many about shuffled frames where they are asked for."""
        frames = self._frames(records)
        features = self._sampler.encode(frames)
        responses = self._respond(features, len(records), group, sampling)
        if not self.settings.shuffled_frames:
            return features, responses, None
        order = np.random.default_rng(sampling.seed).permutation(frames.shape[1])
        return features, responses, self._respond(self._sampler.encode(frames[:, order]), len(records), group, sampling)

    def _summary(self, parts, lengths: Int[np.ndarray, "b G"], utility: Float[np.ndarray, " b"]) -> dict[str, float]:
        """What is logged of an iteration beside the update's own metrics."""
        values = {f"reward_{name}": float(part.mean()) for name, part in parts.items()}
        values["reward"] = values.pop("reward_total")
        values |= {"rollouts": float(lengths.size), "tokens": float(lengths.sum())}
        values["response_tokens"] = float(lengths.mean())
        values["tied_groups"] = float(np.mean(np.ptp(parts["total"], axis=1) == 0))
        values |= {f"share_{state}": count / self._pool.size for state, count in self._pool.counts().items()}
        bins = np.histogram(np.clip(utility, 0, 1), UTILITY_BINS, (0, 1))[0] / len(utility)
        return values | {f"utility_{i}": float(share) for i, share in enumerate(bins)}

    def _respond(self, features, clips: int, group: int, sampling: Sampling) -> Int[np.ndarray, "B G n"]:
        return self._sampler.responses(features, [reasoning.QUESTION] * clips, group, sampling)

    def _frames(self, records: Sequence[Record]) -> UInt8[np.ndarray, "B T H W 3"]:
        frames, size = self._sampler.frames, self._sampler.image_size
        return np.stack([decode(r.clip, frames=frames, size=size, name=r.id).frames for r in records])

    def _batch(self, responses: Int[np.ndarray, "B G n"]) -> dict[str, np.ndarray]:
        """Prompt and response of each sequence, shaped alike in every iteration."""
        conversation, clips, group = self._sampler.conversation, *responses.shape[:2]
        turns, longest = [(reasoning.QUESTION, None)], max(self.config.data.buckets)
        asked = conversation.encode(turns, self._sampler.frames, longest).tokens
        written = response_mask(responses, conversation.eos)
        tokens = np.concatenate([np.broadcast_to(asked, (clips, group, len(asked))), responses], axis=-1)
        # Position i predicts token i + 1: the last of the prompt is the first that counts.
        counted = np.zeros(tokens.shape, bool)
        counted[..., len(asked) - 1 : -1] = written
        ids, mask = self._sampler.prompt.encode(reasoning.QUESTION)
        return {
            "tokens": tokens.astype(np.int32),
            "counted": counted,
            "prompt": np.broadcast_to(ids, (clips, 1, len(ids))),
            "prompt_mask": np.broadcast_to(mask, (clips, 1, len(mask))),
        }

    def _reward(self, records, responses, tokens, shuffled=None) -> dict[str, Float[np.ndarray, "B G"]]:
        end = self._sampler.conversation.eos
        rows = []
        for i, record in enumerate(records):
            ids, lengths = responses[i], tokens[i]
            group = rewards.Group(
                id=record.id,
                question=reasoning.QUESTION,
                targets=record.targets,
                responses=tuple(self._sampler.text(row) for row in ids),
                lengths=tuple(int(length) for length in lengths),
                complete=tuple(bool((row == end).any()) for row in ids),
                shuffled=() if shuffled is None else tuple(self._sampler.text(row) for row in shuffled[i]),
            )
            rows.append(rewards.evaluate(self._functions, group))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _measure(self, records: UsableRecords, step: int) -> None:
        """Writes the mean rewards of the likeliest responses about held-out clips."""
        self._sampler.load({**self.state.trainable, **self._frozen})
        sampling, batch, rows = Sampling(self.settings.max_new_tokens), self.config.batch, []
        for start in range(0, len(records), batch):
            chosen = records.read(range(start, min(start + batch, len(records))))
            padded = [*chosen, *[chosen[0]] * (batch - len(chosen))]
            _, responses, shuffled = self._roll_out(padded, 1, sampling)
            tokens = response_mask(responses, self._sampler.conversation.eos).sum(-1)
            rows.append(self._reward(chosen, responses, tokens, shuffled))
        means = {name: float(np.concatenate([row[name] for row in rows]).mean()) for name in rows[0]}
        rollouts = step * self.config.batch * self.settings.group
        with (self.workdir / "heldout.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "rollouts": rollouts, **means}) + "\n")
        log.info("step %d, held-out: %s", step, ", ".join(f"{name} {value:.3f}" for name, value in means.items()))


def _keep_until(path: Path, step: int) -> None:
    """Cuts off what was measured after the step that a run goes on from; a run from the start measures all anew."""
    kept = [line for line in read_lines(path) if step and line["step"] <= step]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))
