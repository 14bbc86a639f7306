"""Models that compile fast: a language model of two layers, a config of the complete model, and weights for both."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import stage2
from favchat_jax.config import Config
from favchat_jax.models.favchat import FaVChat
from favchat_jax.models.mistral import Mistral, MistralConfig

MISTRAL = MistralConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    sliding_window=None,
    max_position_embeddings=64,
)

# Fields of Mistral-7B-v0.2's published config.json.
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


def config_json(config: MistralConfig) -> dict:
    """Returns the content of a Hugging Face folder's config.json for `config`."""
    return {**MISTRAL_7B, **dataclasses.asdict(config)}


def drawn(shapes: dict, spread: float, seed: int = 0) -> dict:
    """Draws weights without zeros, so that every part shows in the output, with NumPy, which compiles nothing."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1 if path[-1].key == "scale" else 0
        return jnp.asarray(mean + spread * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def drawn_for(model: nn.Module, *inputs, **options) -> dict:
    """Draws the weights that a module creates for these inputs and options."""
    shapes = jax.eval_shape(functools.partial(model.init, **options), jax.random.key(0), *inputs)
    return drawn(shapes, spread=0.3)


def mistral_shapes(model: Mistral) -> dict:
    """Returns the tree of shapes of a language model's weights."""
    words = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda key, words: model.init(key, words, method="read"), jax.random.key(0), words)["params"]


def favchat_shapes(model: FaVChat, frames: int, image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns path -> shape of every weight of the complete model."""
    clip = jax.ShapeDtypeStruct((1, frames, image_size, image_size, 3), jnp.uint8)
    ids, mask = (jax.ShapeDtypeStruct((1, 1, 4), dtype) for dtype in (jnp.int32, bool))
    return flatten_dict(jax.eval_shape(model.init, jax.random.key(0), clip, ids, ids, mask)["params"], sep="/")


def drawn_flat(shapes: dict[str, jax.ShapeDtypeStruct], spread: float, seed: int = 0) -> dict[str, jax.Array]:
    """Draws weights by path, as `drawn` does."""
    return flatten_dict(drawn(unflatten_dict(shapes, sep="/"), spread, seed), sep="/")


def tiny_config(argument: str = "") -> Config:
    """Returns stage 2's config with every size reduced until it compiles in seconds."""
    return Config.from_ml_collections(stage2.get_config(argument)).updated(
        {
            "model.image_size": 32,
            "model.frames": 2,
            "model.umt": {"width": 8, "depth": 3, "layers_run": 2, "heads": 2, "patch": 16, "checkpoint_size": 32},
            "model.no_face_taps": (1, 2),
            "model.facexformer": {"patch": 4, "width": 4, "depths": (1, 1), "heads": (1, 2), "window": 4},
            "model.fusion.heads": 2,
            **{f"model.qformer.{name}": 8 for name in ("width", "mlp")},
            **{f"model.qformer.{name}": 2 for name in ("depth", "heads", "queries")},
            "model.qformer.extra_queries": 1,
            "model.adapter.hidden": 8,
            "model.lora.rank": 2,
            "model.lora.alpha": 3.0,
        }
    )
