"""A Hugging Face folder of Mistral is read and written without loss, and each problem gets one clear line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from favchat_jax.checkpoints.mistral_folder import fingerprint, read_config, read_weights, weight_shapes, write_weights
from favchat_jax.errors import UserError
from tests.models.tiny_parts import MISTRAL, config_json, drawn

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def weights():
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in weight_shapes(MISTRAL).items()}
    return drawn(unflatten_dict(shapes, sep="/"), spread=0.3)


@pytest.fixture
def folder(tmp_path, weights):
    (tmp_path / "config.json").write_text(json.dumps(config_json(MISTRAL)))
    write_weights(tmp_path, weights)
    return tmp_path


def change_tensors(folder, change):
    """Rewrites the folder's single file after `change` has edited its dictionary of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """Parts the folder's single file into two with an index, as large models are published."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    where = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


def assert_same_bits(a, b):
    a, b = flatten_dict(a), flatten_dict(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        assert np.asarray(leaf).dtype == np.asarray(b[path]).dtype
        assert np.asarray(leaf).tobytes() == np.asarray(b[path]).tobytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_written_weights_are_read_back_bit_for_bit(tmp_path, weights, dtype):
    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), weights)
    (tmp_path / "config.json").write_text(json.dumps(config_json(MISTRAL)))
    write_weights(tmp_path, weights)
    assert_same_bits(read_weights(tmp_path, dtype), weights)


def test_a_bfloat16_folder_is_read_into_float32_with_equal_values(tmp_path, weights):
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    (tmp_path / "config.json").write_text(json.dumps(config_json(MISTRAL)))
    write_weights(tmp_path, weights)
    assert_same_bits(read_weights(tmp_path), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights))


def test_the_file_holds_the_published_names_and_shapes(folder):
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    layer = {
        "input_layernorm.weight": (16,),
        "self_attn.q_proj.weight": (24, 16),
        "self_attn.k_proj.weight": (12, 16),
        "self_attn.v_proj.weight": (12, 16),
        "self_attn.o_proj.weight": (16, 24),
        "post_attention_layernorm.weight": (16,),
        "mlp.gate_proj.weight": (20, 16),
        "mlp.up_proj.weight": (20, 16),
        "mlp.down_proj.weight": (16, 20),
    }
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (23, 16), "model.norm.weight": (16,), "lm_head.weight": (23, 16)}
    assert shapes == {**expected, **ends}


def test_kernels_are_the_transposed_published_weights_in_the_order_of_the_layers(folder):
    tensors = load_file(folder / "model.safetensors")
    ours = read_weights(folder)
    np.testing.assert_array_equal(ours["embed_tokens"]["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(ours["lm_head"]["kernel"], tensors["lm_head.weight"].T)
    for i in range(2):
        kernel = ours["layers"]["mlp"]["down_proj"]["kernel"][i]
        np.testing.assert_array_equal(kernel, tensors[f"model.layers.{i}.mlp.down_proj.weight"].T)


def test_all_shards_of_a_folder_with_an_index_are_read(folder, weights):
    shard(folder)
    assert_same_bits(read_weights(folder), weights)


def test_rotary_buffers_of_older_exports_are_ignored(folder, weights):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda tensors: tensors.update({name: np.ones(3, np.float32)}))
    assert_same_bits(read_weights(folder), weights)


def spoil(change):
    return lambda folder: change_tensors(folder, change)


def cut(name, share):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def configure(**fields):
    return lambda folder: (folder / "config.json").write_text(json.dumps({**config_json(MISTRAL), **fields}))


def lack(*fields):
    kept = {name: value for name, value in config_json(MISTRAL).items() if name not in fields}
    return lambda folder: (folder / "config.json").write_text(json.dumps(kept))


def sharded_without_second(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def sharded_with_index(content):
    def change(folder):
        shard(folder)
        (folder / INDEX).write_bytes(content)

    return change


LM_HEAD = "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
UNKNOWN = "model.layers.0.self_attn.q_proj.bias"
PROBLEMS = {
    "no file of weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "missing shard": (sharded_without_second, "model-00002-of-00002.safetensors is missing"),
    "truncated in the data": (cut("model.safetensors", 0.9), "model.safetensors is damaged"),
    "truncated in the header": (cut("model.safetensors", 0.01), "model.safetensors is damaged"),
    "empty file": (write("model.safetensors", b""), "model.safetensors is damaged"),
    "git-lfs pointer": (
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "model.safetensors is damaged",
    ),
    "unknown key": (spoil(lambda t: t.update({UNKNOWN: np.ones(3, np.float32)})), UNKNOWN),
    "one missing key": (spoil(lambda t: t.pop(DOWN)), f"lacks {DOWN}: "),
    "two missing keys": (spoil(lambda t: (t.pop(DOWN), t.pop(LM_HEAD))), f"lacks {LM_HEAD} and 1 more weights"),
    "another shape": (spoil(lambda t: t.update({DOWN: t[DOWN].T.copy()})), DOWN),
    "fewer layers in config.json": (configure(num_hidden_layers=1), "model.layers.1."),
    "more layers in config.json": (configure(num_hidden_layers=3), "model.layers.2."),
    "another vocabulary in config.json": (configure(vocab_size=24), "config.json contradicts"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config.json is not JSON": (write("config.json", b"{"), "config.json is not JSON"),
    "config.json is not text": (write("config.json", b"\xff\xfe\x00{"), "config.json is not JSON"),
    "config.json is a list": (write("config.json", b"[1]"), "config.json is not a JSON object"),
    "config.json is of another model": (configure(model_type="llama"), "config.json: model_type is 'llama'"),
    "config.json lacks a field": (lack("hidden_size"), "config.json lacks 'hidden_size'"),
    "config.json has a word for a number": (configure(hidden_size="wide"), "hidden_size is 'wide'"),
    "config.json has no number": (configure(hidden_size=None, head_dim=None), "config.json has a field of the wrong"),
    "config.json has a size of zero": (configure(intermediate_size=0), "intermediate_size is 0"),
    "heads that do not divide the width": (configure(num_attention_heads=3, head_dim=None), "num_attention_heads is 3"),
    "no heads": (configure(num_attention_heads=0, head_dim=None), "num_attention_heads is 0"),
    "groups that do not divide the heads": (configure(num_key_value_heads=3), "num_key_value_heads is 3"),
    "odd heads": (configure(head_dim=3), "head_dim is 3"),
    "a word for the norm's epsilon": (configure(rms_norm_eps="x"), "rms_norm_eps is 'x'"),
    "a word for the rotation": (configure(rope_theta="abc"), "rope_theta is 'abc'"),
    "another activation": (configure(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "a negative window": (configure(sliding_window=-1), "sliding_window is -1"),
    "index is not JSON": (sharded_with_index(b"{"), f"{INDEX} is not JSON"),
    "index without a map": (sharded_with_index(b"{}"), f"{INDEX} does not map weights to files"),
    "index with a list for a map": (sharded_with_index(b'{"weight_map": ["a"]}'), f"{INDEX} does not map"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_each_problem_of_a_folder_is_one_line(folder, problem):
    break_it, named = PROBLEMS[problem]
    break_it(folder)
    with pytest.raises(UserError) as caught:
        read_weights(folder)
    assert named in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        read_config(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder_is_named(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="weights.bin"):
        read_config(tmp_path / "weights.bin")


def test_read_config_gives_the_sizes_of_the_folder(folder):
    assert read_config(folder) == MISTRAL


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_the_fingerprint_changes_with_any_weight_and_with_nothing_else(folder, sharded):
    change_tensors(folder, lambda tensors: None)  # so that the file rewritten below differs only in the weight
    if sharded:
        shard(folder)
    before = fingerprint(folder)
    (folder / "notes.txt").write_text("read me")
    assert fingerprint(folder) == before
    file = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    tensors[sorted(tensors)[-1]].flat[0] += 1
    save_file(tensors, file)
    assert fingerprint(folder) != before


def test_the_fingerprint_changes_with_the_config(folder):
    before = fingerprint(folder)
    changed = dataclasses.replace(MISTRAL, rope_theta=MISTRAL.rope_theta + 1)
    (folder / "config.json").write_text(json.dumps(config_json(changed)))
    assert fingerprint(folder) != before


def test_the_fingerprint_of_a_folder_with_a_missing_shard_names_it(folder):
    sharded_without_second(folder)
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing"):
        fingerprint(folder)
