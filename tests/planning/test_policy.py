"""The plan of a reinforcement iteration counts the memory and the operations of a run."""

import jax.numpy as jnp
import pytest

from favchat_jax import stages
from favchat_jax.generation.weights import from_training
from favchat_jax.planning import cost, plan, policy
from favchat_jax.planning.answer import program_products
from favchat_jax.sharding import one_device


@pytest.fixture(scope="module")
def config(small_world):
    return small_world.config("grpo", batch=2)


@pytest.fixture(scope="module")
def laid_out(config):
    return policy._lay_out(config, 2, one_device())


def test_the_memory_held_between_programs_is_the_weights_and_the_samplers_merged_copies(config, laid_out):
    held, _ = laid_out
    _, shapes = plan.model_and_weights(config)
    weights = {path: jnp.zeros(leaf.shape, config.model.dtype) for path, leaf in shapes.items()}
    trainable, frozen = stages.split(weights, config.variant, config.stage)
    assert held["frozen"] == sum(leaf.nbytes for leaf in frozen.values())
    assert held["trained"] == held["reference"] == sum(leaf.nbytes for leaf in trainable.values())

    own = {leaf.unsafe_buffer_pointer() for leaf in weights.values()}
    merged = from_training(weights, config, plan.language_model(config)).values()
    assert held["merged"] == sum(leaf.nbytes for leaf in merged if leaf.unsafe_buffer_pointer() not in own)


def test_the_programs_of_an_iteration_compile_and_come_in_order(laid_out):
    held, programs = laid_out
    assert [program.name for program in programs] == ["encode", "begin", "advance", "score", "update"]
    for program in programs:
        compiled = program.function.lower(*program.arguments, **program.options).compile()
        given = plan.device_bytes(program.arguments)
        assert 0 < compiled.memory_analysis().argument_size_in_bytes <= given
        assert sum(held.values()) > program.weights and given > program.weights


def test_operations_count_all_tokens_of_all_responses(config, laid_out):
    _, programs = laid_out
    by_name = {program.name: program for program in programs}
    llm = plan.language_model(config)
    kernels = llm.num_hidden_layers * (
        2 * llm.hidden_size * llm.head_dim * (llm.num_attention_heads + llm.num_key_value_heads)
        + 3 * llm.hidden_size * llm.intermediate_size
    )
    kernels += llm.hidden_size * llm.vocab_size
    drawn = config.rl.max_new_tokens - 1
    rows, slots = 2 * config.rl.group, policy.PROMPT + config.rl.max_new_tokens
    attended = llm.num_hidden_layers * 2 * llm.num_attention_heads * llm.head_dim * slots
    expected = drawn * rows * 2 * (kernels + attended)
    assert cost.total_flops(program_products(by_name["advance"])) == expected
    assert by_name["score"].times == 2 and by_name["update"].times == config.rl.updates


def test_without_merged_rollouts_no_second_copy_of_the_language_model_is_held(config, laid_out):
    shared = config.updated({"rl.merged_rollouts": False})
    held, programs = policy._lay_out(shared, 2, one_device())
    assert held["merged"] == 0 and held["frozen"] == laid_out[0]["frozen"]
    for program in programs:
        assert program.function.lower(*program.arguments, **program.options).compile()
    narrow, _ = policy._lay_out(shared.updated({"llm.storage": "int8"}), 2, one_device())
    assert narrow["merged"] == 0 and narrow["frozen"] < held["frozen"]


def test_a_plan_that_does_not_fit_suggests_a_change(config):
    shared = config.updated({"rl.merged_rollouts": False})
    assert policy._advice(config, 30, 20) == "rl.merged_rollouts=False"
    assert policy._advice(shared, 10, 20) == "a smaller rl.group or rl.max_new_tokens"
    assert policy._advice(shared, 30, 20) == "llm.storage=int8"
    narrow = shared.updated({"llm.storage": "int8"})
    assert policy._advice(narrow, 30 * 2**30, 20).startswith("more devices: 30.0 GiB of weights")
