"""Runs PyTorch's side of the accelerator check: transformers and PEFT with fused attention, on drawn weights."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import torch

from favchat_jax.config import Config
from favchat_jax.convert.torch_model import is_base, unfilled_favchat
from favchat_jax.planning import plan
from tools.beside_pytorch.contest import Runs
from tools.beside_pytorch.material import frames
from tools.beside_pytorch.theirs import DEVICE, compiled_cache, training_steps
from tools.on_accelerator import drawn, ours

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def steps(preset: str, stage: str, folder: str) -> Runs:
    """Returns runs of a stage's training step, with all activations kept and with checkpointed layers."""
    config, model = _model(preset, stage, folder)
    mixture_only = stage == "stage3"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or (".adapter." in name if mixture_only else not is_base(name)))
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[config.model.dtype])
    runs = training_steps(config, model, drawn.batch(config, config.batch))
    return {name: _or_out_of_memory(runs[name]) for name in ("checkpointed", "eager")}


def answers(preset: str, folder: str) -> Runs:
    """Returns runs of the same answers as ours, by `generate` with merged adapters; then the same, compiled."""
    config, model = _model(preset, "stage3", folder)
    merged = model.merge_and_unload().to(DTYPES[config.model.dtype]).eval()

    def answer(clips: int, copies: int, tokens: int, temperature: float, **how: Any):
        pixels = torch.tensor(frames(config, clips), device=DEVICE)
        arrays = drawn.question(config, clips, ours.prompt_length(config))
        ids, prompt, mask = (
            torch.tensor(arrays[name][:, 0], device=DEVICE) for name in ("tokens", "prompt", "prompt_mask")
        )
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

        def written(count: int) -> float:
            """Reads the prompts, draws `count` tokens for each, and waits for them; returns their sum."""
            inputs = merged.embed(ids.long(), merged.visual_tokens(features, prompt.long(), mask)[0])
            attended = torch.ones(inputs.shape[:2], dtype=torch.long, device=DEVICE)
            result = merged.generate(
                inputs_embeds=inputs,
                attention_mask=attended,
                max_new_tokens=count,
                min_new_tokens=count,
                num_return_sequences=copies,
                **drawing,
                **how,
            )
            return float(result.sum())

        features = None

        @torch.inference_mode()
        def run() -> tuple[float, dict[str, float]]:
            nonlocal features
            started = time.perf_counter()
            features = merged.encode(pixels)
            _wait()
            encoded = time.perf_counter()
            written(1)
            read = time.perf_counter()
            written(tokens)
            done = time.perf_counter()
            # The second call reads the prompt again.
            each = {"encode_seconds": encoded - started, "prompt_seconds": read - encoded}
            each["seconds_a_token"] = (done - read - (read - encoded)) / (tokens - 1)
            return done - read + encoded - started, {**each, "tokens": clips * copies * tokens}

        return _or_out_of_memory(run)

    runs = {name: answer(*how) for name, how in ours.ANSWERS.items()}
    return runs | {f"{name}, compiled": answer(*how, **compiled_cache()) for name, how in ours.ANSWERS.items()}


def _model(preset: str, stage: str, folder: str) -> tuple[Config, Any]:
    """Returns a stage's config and PyTorch's model with unmerged adapters, in float32 but the language model's base."""
    jax.config.update("jax_platforms", "cpu")  # the accelerator is PyTorch's
    config = drawn.settings(preset, stage, Path(folder))
    llm = {**dataclasses.asdict(plan.language_model(config)), "model_type": "mistral"}
    model = unfilled_favchat(config, {**llm, "hidden_act": "silu", "tie_word_embeddings": False})
    base = DTYPES[config.model.dtype]
    tensors = {
        name: _drawn(name, tensor, base if is_base(name) else torch.float32)
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(tensors, assign=True)
    return config, model.to(DEVICE)


def _drawn(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=DEVICE)
    if tensor.dim() < 2:
        return torch.full(tensor.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=DEVICE)
    inputs = math.prod(tensor.shape[1:])
    return torch.empty(tensor.shape, dtype=dtype, device=DEVICE).normal_(std=inputs**-0.5)


def _or_out_of_memory(run: Callable[[], tuple[float, Any]]) -> Callable[[], tuple[float, Any]]:
    """Returns a run that adds the peak of the card's memory to its result.

    It reports, instead of raising, that the memory does not suffice; its time is then nan.
    """

    def guarded() -> tuple[float, Any]:
        if DEVICE == "cpu":
            return run()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds, result = run()
            return seconds, {**result, "peak_bytes": torch.cuda.max_memory_allocated()}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return math.nan, {"failed": "out of memory"}

    return guarded


def _wait() -> None:
    if DEVICE != "cpu":
        torch.cuda.synchronize()
