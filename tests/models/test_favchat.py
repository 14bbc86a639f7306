"""The complete model: published numbers of weights, groups of the freeze table, ablations, and flow of inputs."""

import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from configs import common, stage2
from favchat_jax.config import ABLATIONS, VARIANTS, Config
from favchat_jax.models import favchat
from favchat_jax.models.mistral import MistralConfig
from favchat_jax.models.umt import sinusoid_table
from favchat_jax.stages import STAGES, TRAINS, group_of, split
from tests.models.tiny_parts import MISTRAL, MISTRAL_7B, drawn_flat, favchat_shapes, tiny_config

PAPER_LLM = MistralConfig.from_json(MISTRAL_7B)


@functools.cache
def paper_shapes():
    """Returns path -> shape of every weight of the paper preset with adapters."""
    return shapes_of(Config.from_ml_collections(stage2.get_config("preset=paper")))


@functools.cache
def shallow_shapes(preset, ablation, variant="v1"):
    """Returns the same for a preset with few layers; more layers would repeat them under other numbers."""
    config = Config.from_ml_collections(stage2.get_config(f"preset={preset},variant={variant},ablation={ablation}"))
    return shapes_of(config.updated({"model.facexformer.depths": (1, 1, 1, 1), "model.qformer.depth": 2}))


def shapes_of(config):
    rank = config.model.lora.rank
    model = favchat.build(config.model, PAPER_LLM, variant=config.variant, ablation=config.ablation, lora_rank=rank)
    return favchat_shapes(model, config.model.frames, config.model.image_size)


def count(shapes, start, adapters=False):
    """Counts the weights below `start`: those of adapters, or all others."""
    return sum(
        math.prod(leaf.shape)
        for path, leaf in shapes.items()
        if path.startswith(start) and adapters == ("lora_" in path)
    )


class Tiny:
    """A model that compiles fast, with weights, inputs and its compiled forward pass."""

    def __init__(self, variant):
        self.model = favchat.build(tiny_config().model, MISTRAL, variant=variant, lora_rank=2)
        self.shapes = favchat_shapes(self.model, 2, 32)
        self.params = {"params": unflatten_dict(drawn_flat(self.shapes, spread=0.3), sep="/")}
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, MISTRAL.vocab_size, (2, 3, 9))
        tokens[:, :, 2:5] = -1
        self.inputs = {
            "clips": rng.integers(0, 256, (2, 2, 32, 32, 3), np.uint8),
            "tokens": tokens.astype(np.int32),
            "prompt": rng.integers(0, 512, (2, 3, 4)).astype(np.int32),
            "prompt_mask": np.arange(4) < rng.integers(1, 5, (2, 3, 1)),
        }
        self.compiled = jax.jit(self.model.apply)

    def forward(self, **changed):
        return self.compiled(self.params, **{**self.inputs, **changed})


@functools.cache
def tiny_model(variant):
    return Tiny(variant)


@pytest.fixture(scope="module", params=VARIANTS)
def either(request):
    """The model of each variant."""
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("v1")


PUBLISHED = {
    "umt/": 290_477_056,
    "facexformer/": 86_741_176,
    "general_qformer/": 182_194_944,
    "facial_qformer/": 182_194_944,
    "llm/": 7_241_732_096,
    "vision_layernorm/": 2 * 1024,
    "general_proj/": 768 * 4096 + 4096,
    "facial_proj/": 768 * 4096 + 4096,
}


@pytest.mark.parametrize("part", PUBLISHED)
def test_each_part_of_the_paper_preset_has_its_published_number_of_weights(part):
    assert count(paper_shapes(), part) == PUBLISHED[part]


def test_the_paper_presets_adapters_are_rank_16_on_every_linear_layer_of_mistral():
    wide, narrow, hidden, vocabulary = 4096, 1024, 14336, 32000
    attention = 2 * (wide + wide) + 2 * (wide + narrow)
    mlp = 3 * (wide + hidden)
    expected = 16 * (32 * (attention + mlp) + wide + vocabulary)
    assert count(paper_shapes(), "llm/", adapters=True) == expected == 42_520_576


def test_the_paper_presets_fusion_reads_swins_four_widths_into_the_general_encoders():
    widths, d = (128, 256, 512, 1024), 1024
    norms = sum(2 * width + 2 * d for width in widths)
    query_and_skip = sum(2 * (width * d + d) for width in widths)
    key_value_out = 4 * 3 * (d * d + d)
    assert count(paper_shapes(), "fusion/") == norms + query_and_skip + key_value_out


# Of the sorted paths and shapes of all weights, so that old checkpoints load.
LAYOUTS = {
    ("v1", "none"): "c077481a1c2a0eb9",
    ("v1", "no_face"): "35485579ef49e93b",
    ("v1", "no_granularity"): "6d5cf64cc1eee8fa",
    ("v1", "no_moe"): "ee5e9f0033ccc422",
    ("v2", "none"): "caa2227f2f999a0a",
    ("v2", "no_face"): "ffe38f1f842acc50",
    ("v2", "no_granularity"): "882bd1ba69c3f21d",
    ("v2", "no_moe"): "61bdff1f2d3b008d",
}


@pytest.mark.parametrize(("variant", "ablation"), LAYOUTS)
def test_the_paths_and_shapes_of_weights_are_those_of_checkpoints_made_so_far(variant, ablation):
    model = favchat.build(tiny_config().model, MISTRAL, variant=variant, ablation=ablation, lora_rank=2)
    lines = (f"{path} {leaf.shape}" for path, leaf in sorted(favchat_shapes(model, 2, 32).items()))
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == LAYOUTS[variant, ablation]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("preset", common.PRESETS)
def test_every_weight_in_every_stage_is_in_exactly_one_group_and_every_group_that_trains_has_weights(
    preset, ablation, variant
):
    shapes_with_adapters = shallow_shapes(preset, ablation, variant)
    for stage, settings in STAGES.items():
        shapes = {path: leaf for path, leaf in shapes_with_adapters.items() if settings.lora or "lora" not in path}
        groups = {group_of(path) for path in shapes}  # raises for a path of no group or of two
        missing = set(TRAINS[variant][stage]) - groups
        assert not missing, f"{variant} {stage} trains {missing}"
        trainable, frozen = split(shapes, variant, stage)
        assert trainable.keys() | frozen.keys() == shapes.keys()
        assert not trainable.keys() & frozen.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_groups_hold_what_their_names_say(variant):
    groups = {}
    for path in shallow_shapes("tiny", "none", variant):
        groups.setdefault(group_of(path), set()).add(path.split("/")[0])
    mlps = {"general_mlp", "facial_mlp"} if variant == "v2" else set()
    assert groups == {
        "encoders": {"umt", "vision_layernorm", "facexformer"},
        "fusion": {"fusion"},
        "qformers": {"general_qformer", "facial_qformer"},
        "linears": {"general_proj", "facial_proj"} | mlps,
        "adapter": {"adapter"},
        "lora": {"llm"},
        "llm": {"llm"},
    }
    for path in shallow_shapes("tiny", "none"):
        assert (group_of(path) == "lora") == path.endswith(("lora_a", "lora_b"))


def test_a_model_without_adapters_has_exactly_the_other_weights(tiny):
    plain = favchat_shapes(favchat.build(tiny_config().model, MISTRAL, lora_rank=0), 2, 32)
    assert plain == {path: leaf for path, leaf in tiny.shapes.items() if "lora" not in path}


def test_no_face_has_no_facial_encoder_and_fuses_the_general_encoders_own_blocks():
    shapes = shallow_shapes("paper", "no_face")
    assert not [path for path in shapes if path.startswith("facexformer")]
    inputs = [shapes[f"fusion/step_{i}/query/kernel"].shape[0] for i in (1, 2, 3, 4)]
    assert inputs == [1024] * 4


def test_no_granularity_uses_the_facial_encoders_own_fusion():
    shapes = shallow_shapes("paper", "no_granularity")
    assert not [path for path in shapes if path.startswith("fusion/")]
    assert count(shapes, "facexformer/") > 0
    # Four projections to 256 channels, one pointwise convolution over all, and one layer to the width of e_g.
    own_fusion = sum(width * 256 + 256 for width in (128, 256, 512, 1024)) + 4 * 256 * 256
    assert count(shapes, "linear_fuse/") == own_fusion
    assert count(shapes, "fuse_proj/") == 256 * 1024 + 1024


def test_no_moe_has_two_scalars_for_an_adapter():
    shapes = shallow_shapes("paper", "no_moe")
    adapter = {path: leaf.shape for path, leaf in shapes.items() if path.startswith("adapter/")}
    assert adapter == {"adapter/weights": (2,)}


def test_the_paper_presets_ca2_has_an_mlp_and_two_attentions_per_stage_of_swin():
    shapes, d, words = shallow_shapes("paper", "none", "v2"), 1024, 768

    def attention(queries):
        return 2 * queries + 2 * d + 2 * (queries * d + d) + 3 * (d * d + d)

    mlps = sum(2 * width + 2 * (width * d + d) + d * d + d for width in (128, 256, 512, 1024))
    assert count(shapes, "fusion/") == mlps + attention(words) + 3 * attention(d) + 4 * (d * d + d + attention(words))


def test_v2_has_one_mlp_and_one_weight_adapter_per_stream():
    shapes, d, hidden = shallow_shapes("paper", "none", "v2"), 4096, 1024
    norm = 2 * d
    assert count(shapes, "facial_mlp/") == norm + d * hidden + hidden + hidden * d + d
    assert count(shapes, "adapter/general/") == norm + d * hidden + hidden + 768 * hidden + hidden + hidden + 1
    assert count(shapes, "adapter/facial/") == count(shapes, "adapter/general/") == count(shapes, "adapter/") / 2


def test_ablations_of_v2_remove_the_parts_that_they_name():
    parts = {name: set(shallow_shapes("tiny", name, "v2")) for name in ABLATIONS}
    assert not [path for path in parts["no_face"] if path.startswith("facexformer")]
    assert "fusion/ca2_3/text/query/kernel" in parts["no_face"]
    assert not [path for path in parts["no_granularity"] if path.startswith("fusion/")]
    assert {path for path in parts["no_moe"] if path.startswith("adapter/")} == {"adapter/weights"}
    assert parts["none"] - parts["no_moe"] == {path for path in parts["none"] if path.startswith("adapter/")}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_runs_and_gives_the_same_shapes(ablation, variant, tiny):
    model = favchat.build(tiny_config().model, MISTRAL, variant=variant, ablation=ablation, lora_rank=2)
    output, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), **tiny.inputs)
    assert output.hidden.shape == (2, 3, 9, MISTRAL.hidden_size)
    assert output.stream_weights.shape == (2, 3, 3, 2)


def test_placeholders_become_the_visual_tokens_in_order_and_nothing_else_changes(tiny):
    tokens = jnp.array([[[3, -1, -1, 5, -1, 7], [-1, 4, -1, 4, 4, -1]]])
    visual = jax.random.normal(jax.random.key(0), (1, 2, 3, MISTRAL.hidden_size))
    embedded = tiny.model.apply(tiny.params, tokens, visual, method="embed")
    words = tiny.params["params"]["llm"]["embed_tokens"]["embedding"]
    first = [words[3], visual[0, 0, 0], visual[0, 0, 1], words[5], visual[0, 0, 2], words[7]]
    second = [visual[0, 1, 0], words[4], visual[0, 1, 1], words[4], words[4], visual[0, 1, 2]]
    np.testing.assert_array_equal(embedded, [[first, second]])


def test_three_questions_at_once_give_what_each_gives_alone(either):
    together = either.forward()
    for question in range(3):
        own = {
            name: value if name == "clips" else value[:, question : question + 1]
            for name, value in either.inputs.items()
        }
        output = either.forward(**own)
        np.testing.assert_allclose(together.hidden[:, question], output.hidden[:, 0], atol=1e-4)
        np.testing.assert_allclose(together.stream_weights[:, question], output.stream_weights[:, 0], atol=1e-5)


def test_a_clips_frames_change_its_own_answers_only(either):
    frames = either.inputs["clips"].copy()
    frames[1, 0, 8:24, 8:24] = 255
    before, after = either.forward(), either.forward(clips=frames)
    moved = np.abs(before.hidden - after.hidden).max((1, 3))
    np.testing.assert_array_equal(moved[0], 0)
    np.testing.assert_array_equal(moved[1, :2], 0)  # text before the visual tokens
    assert (moved[1, 2:] > 1e-4).all()


def test_a_question_reaches_its_own_visual_tokens(either):
    prompt = either.inputs["prompt"].copy()
    prompt[0, 1, 0] = (prompt[0, 1, 0] + 1) % 512
    before, after = either.forward(), either.forward(prompt=prompt)
    moved = np.abs(before.stream_weights - after.stream_weights).max((2, 3))
    assert moved[0, 1] > 1e-5
    moved[0, 1] = 0
    np.testing.assert_array_equal(moved, 0)


def test_words_at_a_prompts_padding_change_nothing(either):
    mask = either.inputs["prompt_mask"]
    assert not mask.all()
    before = either.forward()
    other = either.forward(prompt=np.where(mask, either.inputs["prompt"], 7).astype(np.int32))
    np.testing.assert_allclose(before.hidden, other.hidden, atol=1e-5)
    longer = {name: np.pad(either.inputs[name], [(0, 0), (0, 0), (0, 2)]) for name in ("prompt", "prompt_mask")}
    np.testing.assert_allclose(before.hidden, either.forward(**longer).hidden, atol=1e-4)


def test_v2_weighs_the_streams_once_per_question():
    weights = tiny_model("v2").forward().stream_weights
    np.testing.assert_array_equal(weights, np.broadcast_to(weights[:, :, :1], weights.shape))
    assert np.ptp(np.asarray(weights[:, :, 0, 1])) > 1e-4


def test_in_v2_blocks_of_the_frames_of_a_still_clip_differ_only_by_their_time():
    model = tiny_model("v2")
    frames = np.repeat(model.inputs["clips"][:, :1], 2, axis=1)
    encode = jax.jit(lambda frames: model.model.apply(model.params, frames, method="encode").facial)
    for block in encode(frames):
        first, second = jnp.split(block, 2, axis=1)
        half = first.shape[-1] // 2  # of the channels; the other holds the place, which is the same
        table = sinusoid_table(2, half)
        expected = np.concatenate([table[1] - table[0], np.zeros(half)])
        np.testing.assert_allclose(second - first, np.broadcast_to(expected, first.shape), atol=1e-5)


def test_facial_tokens_of_the_frames_of_a_still_clip_differ_only_by_their_time(tiny):
    # e_g depends on time. Without it, the last step of Eq. 2 passes its query stream only.
    params = jax.tree.map(lambda leaf: leaf, tiny.params)
    params["params"]["fusion"]["step_2"]["out"] = jax.tree.map(
        jnp.zeros_like, params["params"]["fusion"]["step_2"]["out"]
    )
    frames = np.repeat(tiny.inputs["clips"][:, :1], 2, axis=1)
    encode = jax.jit(lambda params, frames: tiny.model.apply(params, frames, method="encode").facial[0])
    first, second = jnp.split(encode(params, frames), 2, axis=1)
    half = first.shape[-1] // 2  # of the channels; the other holds the place, which is the same
    table = sinusoid_table(2, half)
    expected = np.concatenate([table[1] - table[0], np.zeros(half)])
    np.testing.assert_allclose(second - first, np.broadcast_to(expected, first.shape), atol=1e-5)


def test_frames_are_normalised_as_the_encoders_were_trained(tiny):
    seen = []

    class Spy(type(tiny.model.umt)):
        def __call__(self, frames):
            seen.append(np.asarray(frames))
            raise StopIteration

    model = tiny.model.clone(umt=Spy(**vars(tiny_config().model.umt), taps=()))
    frames = np.zeros((1, 2, 32, 32, 3), np.uint8)
    frames[..., 0], frames[..., 1] = 255, 128
    with pytest.raises(StopIteration):
        model.apply(tiny.params, frames, method="encode")
    expected = [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, -0.406 / 0.225]
    np.testing.assert_allclose(seen[0][0, 0, 0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_six_channels_the_general_stream_reads_the_first_three_and_the_facial_stream_the_last(variant):
    model = tiny_model(variant)
    whole, face = np.random.default_rng(1).integers(0, 256, (2, 2, 2, 32, 32, 3), np.uint8)

    @jax.jit
    def blocks(frames):
        return model.model.apply(model.params, frames, method="encoders")

    def read(*parts):
        return jax.tree.leaves(blocks(np.concatenate(parts, axis=-1)))

    general, *facial = read(whole, face)
    np.testing.assert_allclose(general, read(whole)[0], atol=1e-6)
    for block, expected in zip(facial, read(face)[1:], strict=True):
        np.testing.assert_allclose(block, expected, atol=1e-6)
    for one, other in zip(read(whole, whole), read(whole), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
