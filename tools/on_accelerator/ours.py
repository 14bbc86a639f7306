"""Runs our side of the accelerator check: training steps, answers and rollouts with drawn weights."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from favchat_jax import sharding
from favchat_jax.config import Config
from favchat_jax.generation.decoding import Decoder
from favchat_jax.generation.sampler import Sampling
from favchat_jax.generation.weights import from_training
from favchat_jax.planning import plan
from tools.beside_pytorch.contest import Runs
from tools.beside_pytorch.material import frames
from tools.on_accelerator import drawn

NEVER = -1  # no token ends an answer, so that all have the same length
SIDE = 8192  # of the square matrices whose product measures the rate of arithmetic
READ = 2**30  # bytes whose copy measures the rate of the memory
# Setting -> clips, copies of each answer, tokens of an answer, temperature.
ANSWERS = {"batch 1": (1, 1, 128, 0.0), "batch 8": (8, 1, 128, 0.0), "rollout 8 x 256": (1, 8, 256, 1.0)}
# Form of the weights -> width of the language model's kernels, whether it is the training form, and what is measured.
FORMS = {"int8": ("int8", False, ("batch 1", "batch 8")), "training weights": ("full", True, ("rollout 8 x 256",))}
PROMPT = 512  # tokens


def steps(preset: str, stage: str, folder: str) -> Runs:
    """Returns runs of a stage's training step: layers as the config has them, then with all activations kept."""
    config = drawn.settings(preset, stage, Path(folder))
    mesh = sharding.one_device()
    arguments = plan.lay_out(config, mesh, config.batch)
    frozen = drawn.draw(arguments.frozen)
    state = [drawn.state(config, arguments)]
    batch = sharding.place_batch(drawn.batch(config, config.batch), mesh)

    def step(remat: str) -> Callable[[], tuple[float, Any]]:
        compiled: list[Any] = []

        def run() -> tuple[float, dict[str, Any]]:
            started = time.perf_counter()
            if not compiled:
                compiled.append(compiled_step(config, remat))
            state[0], metrics = compiled[0](state[0], frozen, batch)
            loss = float(jax.block_until_ready((state[0], metrics))[1]["loss"])
            seconds = time.perf_counter() - started
            planned = compiled[0].memory_analysis().peak_memory_in_bytes
            return seconds, {"loss": loss, "planned_bytes": planned, "peak_bytes": peak_bytes()}

        return or_out_of_memory(run)

    return {f"remat={remat or 'none'}": step(remat) for remat in dict.fromkeys((config.model.remat, ""))}


def compile_ahead(preset: str, stage: str, setting: str, folder: str) -> None:
    """Compiles a stage's training step into JAX's cache, with the config's rematerialisation (`given`) or with none."""
    config = drawn.settings(preset, stage, Path(folder))
    compiled_step(config, config.model.remat if setting == "given" else "")


def compiled_step(config: Config, remat: str) -> jax.stages.Compiled:
    """Compiles the training step of a config on one device, with another rematerialisation."""
    given = plan.lay_out(config.updated({"model.remat": remat}), sharding.one_device(), config.batch)
    return given.step.lower(given.state, given.frozen, given.batch).compile()


def answers(preset: str, folder: str) -> Runs:
    """Returns runs of answers to one and to eight questions, and of a group of sampled responses."""
    return _answers(drawn.settings(preset, "stage3", Path(folder)), "full", False, tuple(ANSWERS))


def forms(preset: str, folder: str) -> Runs:
    """Returns runs of answers with other forms of the weights (`FORMS`)."""
    config = drawn.settings(preset, "stage3", Path(folder))
    runs = {form: _answers(config, *how) for form, how in FORMS.items()}
    return {f"{name}, {form}": run for form, named in runs.items() for name, run in named.items()}


def _answers(config: Config, storage: str, trained: bool, names: Sequence[str]) -> Runs:
    """Returns runs of `ANSWERS` with one form of the weights, whose arguments are those of `Decoder`."""
    llm, shapes = plan.language_model(config), plan.model_and_weights(config)[1]
    decoder = Decoder(config, llm, NEVER, storage=storage, trained=trained)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    dtype = jnp.dtype(config.model.dtype)
    form = shapes if trained else jax.eval_shape(lambda weights: from_training(weights, config, llm, storage), shapes)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        narrow = jnp.issubdtype(leaf.dtype, jnp.integer)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if narrow else dtype, sharding=here)

    params = drawn.draw(jax.tree.map(placed, {"params": unflatten_dict(form, sep="/")}))
    read = {path: leaf for path, leaf in params["params"]["llm"].items() if path != "embed_tokens"}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(read))

    def answer(clips: int, copies: int, tokens: int, temperature: float) -> Callable[[], tuple[float, Any]]:
        how = Sampling(temperature=temperature).drawing()
        pixels = frames(config, clips)
        prompt = drawn.question(config, clips, prompt_length(config))
        key = jax.random.key_data(jax.random.key(0))

        def run() -> tuple[float, dict[str, float]]:
            started = time.perf_counter()
            features = jax.block_until_ready(decoder.encode(params, pixels))
            encoded = time.perf_counter()
            begun = decoder.begin(params, features, prompt, key, how, room=tokens, copies=copies)
            jax.block_until_ready(begun)
            read = time.perf_counter()
            written = decoder.advance(params, begun, how, count=tokens - 1)[1]
            written.block_until_ready()
            done = time.perf_counter()
            each = {"encode_seconds": encoded - started, "prompt_seconds": read - encoded}
            each |= {"seconds_a_token": (done - read) / (tokens - 1), "weight_bytes": weights}
            return done - started, {**each, "tokens": clips * copies * tokens, "peak_bytes": peak_bytes()}

        return or_out_of_memory(run)

    return {name: answer(*ANSWERS[name]) for name in names}


def prompt_length(config: Config) -> int:
    """Returns the length of a prompt: `PROMPT`, or what the longest bucket holds at a smaller size."""
    return min(PROMPT, config.data.buckets[-1])


def or_out_of_memory(run: Callable[[], tuple[float, Any]]) -> Callable[[], tuple[float, Any]]:
    """Returns a run that reports, instead of raising, that the device's memory does not suffice; its time is nan."""

    def guarded() -> tuple[float, Any]:
        try:
            return run()
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return math.nan, {"failed": "out of memory"}

    return guarded


def rates(preset: str) -> dict[str, float]:
    """Measures what the device reaches: operations a second in a product of matrices, bytes a second of its memory."""
    small = preset != "paper"
    side, size = (512, 2**22) if small else (SIDE, READ)
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    array = jnp.ones(size // 4)
    copy = jax.jit(lambda x: x + 1)
    return {
        "flops_a_second": 2 * side**3 / _fastest(lambda: product(matrix)),
        "bytes_a_second": 2 * size / _fastest(lambda: copy(array)),
    }


def _fastest(run: Callable[[], jax.Array]) -> float:
    """Returns the shortest time of a run, of three rounds of ten in a row."""
    run().block_until_ready()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(10):
            result = run()
        result.block_until_ready()
        seconds.append((time.perf_counter() - started) / 10)
    return min(seconds)


def peak_bytes() -> int:
    """Returns the peak of the device's memory so far; 0 where the platform does not count it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
