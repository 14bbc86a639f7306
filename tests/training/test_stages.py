import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax import stages
from favchat_jax.checkpoints import run as assembly
from favchat_jax.config import ABLATIONS, VARIANTS, OptimizerConfig
from favchat_jax.training.optimizer import ADAM_SHARE, decays, make_optimizer, schedule

# The papers' tables: what trains in each stage of v1 (Section 4.2) and of v2 (its figure of the training paradigm).
EVERYTHING_VISUAL = {"encoders", "fusion", "qformers", "linears", "adapter"}
TRAINS = {
    ("v1", "stage1"): EVERYTHING_VISUAL,
    ("v1", "stage2"): EVERYTHING_VISUAL | {"lora"},
    ("v1", "stage3"): {"adapter", "lora"},
    ("v2", "stage1"): {"encoders", "fusion", "adapter"},
    ("v2", "stage2"): {"encoders", "fusion", "qformers", "linears", "lora"},
    ("v2", "stage3"): {"qformers", "linears", "adapter", "lora"},
}
# One weight of each part of the model, and the group that the table puts it in.
SHARED = {
    "umt/blocks/attn/qkv/kernel": "encoders",
    "vision_layernorm/scale": "encoders",
    "facexformer/stages_0/blocks_0/norm1/scale": "encoders",
    "general_qformer/query_tokens": "qformers",
    "facial_qformer/query_tokens": "qformers",
    "general_proj/kernel": "linears",
    "facial_proj/bias": "linears",
    "llm/layers/self_attn/q_proj/lora_a": "lora",
    "llm/lm_head/lora_b": "lora",
    "llm/layers/self_attn/q_proj/kernel": "llm",
    "llm/embed_tokens/embedding": "llm",
    "llm/norm/scale": "llm",
}
EXAMPLES = {
    "v1": SHARED | {"fusion/step_1/query/kernel": "fusion", "adapter/gate_in/kernel": "adapter"},
    "v2": SHARED
    | {
        "fusion/mlp_0/in/kernel": "fusion",
        "fusion/ca2_3/text/query/kernel": "fusion",
        "facial_mlp/in/kernel": "linears",
        "adapter/facial/words/kernel": "adapter",
    },
}


@pytest.fixture(scope="module")
def shapes(small_world):
    """Shapes of all weights by stage, ablation and variant, computed once each."""
    known = {}

    def of(stage: str, ablation: str = "none", variant: str = "v1") -> dict[str, jax.ShapeDtypeStruct]:
        if (stage, ablation, variant) not in known:
            config = small_world.config(stage, f"variant={variant},ablation={ablation}")
            known[stage, ablation, variant] = assembly.assemble(config).shapes
        return known[stage, ablation, variant]

    return of


@pytest.mark.parametrize(("variant", "stage"), TRAINS)
def test_exactly_the_groups_of_the_papers_table_train(variant, stage, shapes):
    weights, trains = shapes(stage, variant=variant), TRAINS[variant, stage]
    trainable, frozen = stages.split(weights, variant, stage)
    assert trainable.keys() | frozen.keys() == weights.keys() and not trainable.keys() & frozen.keys()
    assert {stages.group_of(path) for path in trainable} == trains
    for path, group in EXAMPLES[variant].items():
        if stage == "stage1" and group == "lora":
            assert path not in weights, "stage 1 has no adapters in its language model"
        else:
            assert path in (trainable if group in trains else frozen)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_weight_of_every_ablation_belongs_to_one_group(ablation, shapes):
    groups = {stages.group_of(path) for path in shapes("stage2", ablation)}
    assert groups == EVERYTHING_VISUAL | {"lora", "llm"}


def test_a_weight_outside_the_table_is_a_mistake_of_the_program():
    with pytest.raises(ValueError, match="weight decoder/kernel is in groups \\[\\]"):
        stages.group_of("decoder/kernel")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_weight_decay_spares_every_one_dimensional_weight_and_no_matrix(ablation, variant, shapes):
    for path, leaf in shapes("stage2", ablation, variant).items():
        layers = path.startswith(("umt/blocks/", "llm/layers/"))  # stacked by the scan over layers
        assert decays(path) == (len(leaf.shape) - layers > 1), path


def optimizer_section(**changes) -> OptimizerConfig:
    settings = dict(name="adamw", learning_rate=1e-2, encoder_rate=1.0, b1=0.9, b2=0.999)
    settings |= dict(weight_decay=0.5, clip_norm=1.0, warmup=0.2, floor=0.25)
    return OptimizerConfig(**{**settings, **changes})


def test_without_gradients_only_matrices_decay():
    weights = {"a/kernel": jnp.ones((2, 2)), "a/bias": jnp.ones(2), "layers/norm/scale": jnp.ones((3, 2))}
    optimizer = make_optimizer(optimizer_section(), steps=10)
    moments, zeros = optimizer.init(weights), jax.tree.map(jnp.zeros_like, weights)
    _, moments = optimizer.update(zeros, moments, weights)  # the first step of the warm-up has rate 0
    updates, _ = optimizer.update(zeros, moments, weights)
    np.testing.assert_allclose(updates["a/kernel"], -0.5 * schedule(optimizer_section(), 10)(1))
    assert not updates["a/bias"].any() and not updates["layers/norm/scale"].any()


def test_gradients_are_clipped_by_their_norm_over_all_weights():
    weights = {"a/kernel": jnp.zeros((2, 2)), "b/kernel": jnp.zeros((2, 2))}
    huge = {"a/kernel": jnp.full((2, 2), 3e6), "b/kernel": jnp.full((2, 2), 4e6)}
    unit = {"a/kernel": jnp.full((2, 2), 0.3), "b/kernel": jnp.full((2, 2), 0.4)}  # the same, of norm 1
    optimizer = make_optimizer(optimizer_section(), steps=10)
    clipped, wanted = (optimizer.update(g, optimizer.init(weights), weights)[1] for g in (huge, unit))
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-5), clipped, wanted))


def test_muon_turns_kernels_by_orthogonal_steps_and_moves_all_else_as_adam():
    keys = jax.random.split(jax.random.key(0), 3)
    weights = {
        "layers/a/kernel": jax.random.normal(keys[0], (3, 8, 4)),  # of three scanned layers
        "words/embedding": jax.random.normal(keys[1], (8, 4)),
        "a/bias": jax.random.normal(keys[2], (4,)),
    }
    section = optimizer_section(name="muon", weight_decay=0.0)
    optimizer, rate = make_optimizer(section, steps=10), float(schedule(section, 10)(1))
    moments = optimizer.init(weights)
    _, moments = optimizer.update(weights, moments, weights)  # the first step of the warm-up has rate 0
    updates, _ = optimizer.update(weights, moments, weights)
    for layer in range(3):
        stretch = np.linalg.svd(updates["layers/a/kernel"][layer], compute_uv=False) / rate
        assert np.all((stretch > 0.6) & (stretch < 1.3)), "Newton and Schulz's five steps bring all of them near 1"
        assert jnp.vdot(updates["layers/a/kernel"][layer], weights["layers/a/kernel"][layer]) < 0
    for path in ("words/embedding", "a/bias"):
        # Adam's step under an unchanging gradient has one size everywhere, with Nesterov's look ahead 1.16 of the rate.
        steps = updates[path] / (ADAM_SHARE * rate)
        np.testing.assert_allclose(steps, -1.157 * jnp.sign(weights[path]), rtol=1e-3)


def test_muon_moves_kernels_of_one_shape_as_it_moves_each_alone():
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = {"a/kernel": (8, 4), "b/kernel": (8, 4), "layers/c/kernel": (3, 8, 4), "d/kernel": (4, 8)}
    weights = {path: jax.random.normal(key, shape) for key, (path, shape) in zip(keys, shapes.items(), strict=True)}
    # Without clipping, which looks at all gradients at once.
    optimizer = make_optimizer(optimizer_section(name="muon", clip_norm=1e9), steps=10)

    def second_update(weights):
        _, moments = optimizer.update(weights, optimizer.init(weights), weights)
        return optimizer.update(weights, moments, weights)[0]

    together = second_update(weights)
    assert together.keys() == weights.keys()
    for path, leaf in weights.items():
        np.testing.assert_allclose(together[path], second_update({path: leaf})[path], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_encoders_learn_by_adam_at_their_share_of_the_rate(name):
    section = optimizer_section(name=name, encoder_rate=0.1, weight_decay=0.0)
    weights = {path: jnp.full((2, 2), 3.0) for path in ("umt/a/kernel", "facexformer/a/kernel", "fusion/a/kernel")}
    optimizer, rate = make_optimizer(section, steps=10), float(schedule(section, 10)(1))
    moments = optimizer.init(weights)
    _, moments = optimizer.update(weights, moments, weights)
    updates, _ = optimizer.update(weights, moments, weights)
    for path in ("umt/a/kernel", "facexformer/a/kernel"):
        np.testing.assert_allclose(updates[path], -0.1 * rate, rtol=1e-4)
    assert jnp.linalg.norm(updates["fusion/a/kernel"]) > 0.5 * rate


def test_the_rate_rises_in_a_line_to_its_peak_and_falls_along_a_cosine_to_its_floor():
    rate = schedule(optimizer_section(), steps=100)
    assert rate(0) == 0
    np.testing.assert_allclose([rate(5), rate(10), rate(20)], [0.0025, 0.005, 0.01], rtol=1e-6)
    # Halfway down, a cosine stands in the middle between peak and floor.
    np.testing.assert_allclose([rate(60), rate(100), rate(500)], [0.00625, 0.0025, 0.0025], rtol=1e-6)
    falling = [float(rate(step)) for step in range(20, 101)]
    assert falling == sorted(falling, reverse=True)


def test_a_run_of_a_single_step_has_a_schedule():
    assert np.isfinite(schedule(optimizer_section(), steps=1)(1))
