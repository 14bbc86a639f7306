"""Runs PyTorch's side of the benchmark with transformers, PEFT and DataLoader, in each of their settings."""

import contextlib
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers.generation.configuration_utils import CompileConfig

from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.tensors import read_json
from favchat_jax.config import Config
from favchat_jax.convert.torch_model import for_torch, torch_favchat
from favchat_jax.data.loader import Example
from tools.beside_pytorch import material
from tools.beside_pytorch.contest import Runs
from tools.beside_pytorch.ours import TOKENS, seconds_a_clip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(folder: str, preset: str) -> Runs:
    """Returns runs of stage 2's step: eager, compiled, and with checkpointed layers."""
    config, model = _model(folder, preset)
    return training_steps(config, model, material.batch(config))


def training_steps(config: Config, model: Any, arrays: dict[str, np.ndarray]) -> Runs:
    """Returns runs of a training step of the weights that have gradients: eager, compiled, with checkpointed layers."""
    model.train()
    batch = {name: tensor.to(DEVICE) for name, tensor in for_torch(arrays).items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    section = config.optimizer
    betas, decay = (section.b1, section.b2), section.weight_decay
    # A rate of 0 costs the same, and every setting's first loss is then that of our initial weights.
    optimizer = torch.optim.AdamW(trained, 0.0, betas, weight_decay=decay, fused=True)
    blocks = model.base_model.model.vision_encoder["encoder"].blocks
    counted: list[int] = []  # operations of one step's products and attention, as PyTorch counts them
    keeping = [block.forward for block in blocks]

    def steps(forward: Callable, checkpointed: bool) -> Callable[[], tuple[float, dict[str, float]]]:
        def run() -> tuple[float, dict[str, float]]:
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
            for block, plain in zip(blocks, keeping, strict=True):
                block.forward = functools.partial(checkpoint, plain, use_reentrant=False) if checkpointed else plain
            # Counting slows down only the first run, which is not timed.
            counter = FlopCounterMode(display=False) if forward is model and not counted else contextlib.nullcontext()
            started = time.perf_counter()
            with counter:
                with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE != "cpu"):
                    loss = forward(**batch, use_cache=False).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, section.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            result = _finished(loss.detach())
            seconds = time.perf_counter() - started
            if forward is model and not counted:
                counted.append(counter.get_total_flops())
            return seconds, {"loss": result, "flops": counted[0]}

        return run

    return {
        "eager": steps(model, False),
        "compiled": steps(torch.compile(model), False),
        "checkpointed": steps(model, True),
    }


def decode(folder: str, preset: str, batch: int) -> Runs:
    """Returns runs that `generate` `TOKENS` tokens with adapters unmerged or merged, and merged with each cache."""
    unmerged = _model(folder, preset)[1]
    merged, features, arrays = _asked(folder, preset, batch)

    def answers(model: Any, **how: Any) -> Callable[[], tuple[float, dict[str, Any]]]:
        inner = unmerged.base_model.model if model is unmerged else merged

        @torch.inference_mode()
        def run() -> tuple[float, dict[str, Any]]:
            started = time.perf_counter()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE != "cpu" and model is unmerged):
                visual, _ = inner.visual_tokens(features, arrays["prompt_ids"], arrays["prompt_mask"])
                embedded = inner.embed(arrays["input_ids"], visual)
                mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=DEVICE)
                tokens = model.generate(
                    inputs_embeds=embedded, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, **how
                )
            result = tokens.tolist()
            return time.perf_counter() - started, {"tokens": result}

        return run

    return {"unmerged adapters": answers(unmerged), **{name: answers(merged, **how) for name, how in _caches().items()}}


def rollout(folder: str, preset: str, group: int) -> Runs:
    """Returns runs that `generate` a group of responses to a prompt, with merged adapters and each cache."""
    merged, features, arrays = _asked(folder, preset, 1)
    drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": group}

    def responses(**how: Any) -> Callable[[], tuple[float, None]]:
        @torch.inference_mode()
        def run() -> tuple[float, None]:
            started = time.perf_counter()
            visual, _ = merged.visual_tokens(features, arrays["prompt_ids"], arrays["prompt_mask"])
            embedded = merged.embed(arrays["input_ids"], visual)
            mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=DEVICE)
            merged.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=TOKENS, **drawing, **how)
            return time.perf_counter() - started, None

        return run

    return {name: responses(**how) for name, how in _caches().items()}


def _caches() -> dict[str, dict[str, Any]]:
    """Returns `generate`'s settings for a growing, a static, and a static compiled cache, by name."""
    return {
        "merged": {},
        "merged with a static cache": {"cache_implementation": "static", "disable_compile": True},
        "merged with a static cache and compiled": compiled_cache(),
    }


def compiled_cache() -> dict[str, Any]:
    """Returns `generate`'s settings for a static compiled cache."""
    compiled = CompileConfig()
    compiled._compile_all_devices = True  # by default, transformers compiles only on GPUs
    return {"cache_implementation": "static", "compile_config": compiled}


def _asked(folder: str, preset: str, clips: int):
    """Returns the model with merged adapters, the features of `clips` clips, and the prompt for each."""
    config, unmerged = _model(folder, preset)
    merged = unmerged.merge_and_unload()
    if DEVICE != "cpu":
        merged.to(torch.bfloat16)
    with torch.inference_mode():
        return (
            merged,
            merged.encode(torch.tensor(material.frames(config, clips), device=DEVICE)),
            _prompt(config, clips),
        )


def loader(folder: str, preset: str, workers: tuple[int, ...], sides: tuple[int, ...], seconds: float) -> Runs:
    """Returns runs that measure a DataLoader's seconds per clip, with the same records and decoding."""
    jax.config.update("jax_platforms", "cpu")
    config = material.settings(folder, preset)
    parts = assembly.assemble(config)
    example = Example(
        conversation=parts.conversation,
        prompt=parts.prompt,
        text="qa",
        frames=config.model.frames,
        size=config.model.image_size,
        sampling="rand",
        augment=None,
        questions=1,
        max_length=config.data.buckets[-1],
    )

    def stream(count: int, side: int):
        def run() -> tuple[float, float]:
            clips = Clips(material.footage(folder, side), example)
            batches = DataLoader(
                clips,
                batch_size=material.CLIPS,
                sampler=torch.utils.data.RandomSampler(clips, replacement=True, num_samples=10**9),
                num_workers=count,
                collate_fn=stacked,
                multiprocessing_context="spawn",
            )
            return seconds_a_clip((len(batch["frames"]) for batch in batches), seconds)

        return run

    return {material.loader_setting(count, side): stream(count, side) for count in workers for side in sides}


class Clips(Dataset):
    """Records as rows of a batch."""

    def __init__(self, source: Any, example: Example):
        self._source, self._example = source, example

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        return self._example.random_map(self._source[index], np.random.default_rng(index))


def stacked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Returns a batch, with its texts padded to the longest."""
    longest = max(row["tokens"].shape[1] for row in rows)
    batch = {"frames": torch.from_numpy(np.stack([row["frames"] for row in rows]))}
    for name in ("tokens", "loss_mask"):
        padded = [np.pad(row[name], [(0, 0), (0, longest - row[name].shape[1])]) for row in rows]
        batch[name] = torch.from_numpy(np.stack(padded))
    return batch


def _model(folder: str, preset: str) -> tuple[Any, Any]:
    """Returns the config, and the model with unmerged adapters on PyTorch's device."""
    jax.config.update("jax_platforms", "cpu")  # the weights pass through jax; the accelerator is PyTorch's
    torch.set_num_threads(os.cpu_count() or 1)
    config = material.settings(folder, preset)
    model = torch_favchat(config, read_json(Path(config.llm.path) / "config.json"), material.weights(folder))
    if DEVICE != "cpu":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DEVICE, None if parameter.requires_grad else torch.bfloat16)
        model.to(DEVICE)
    return config, model


def _prompt(config: Config, batch: int) -> dict[str, torch.Tensor]:
    """Returns the question for each clip, as the sampler encodes it."""
    parts = assembly.assemble(config)
    turns = [(material.QUESTION, None)]
    tokens = parts.conversation.encode(turns, config.model.frames, config.data.buckets[-1]).tokens
    ids, mask = parts.prompt.encode(material.QUESTION)
    rows = {"input_ids": tokens, "prompt_ids": ids, "prompt_mask": mask}
    return {
        name: torch.tensor(np.broadcast_to(row, (batch, len(row))).copy(), device=DEVICE).long()
        for name, row in rows.items()
    }


def _finished(loss: torch.Tensor) -> float:
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    return float(loss)
