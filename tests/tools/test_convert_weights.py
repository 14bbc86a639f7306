"""tools.convert_weights from the command line: every kind converts, and bad input gives one line and exit code 2."""

import json
import os
import pickle
import re
import runpy
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from absl import flags
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from favchat_jax import command_line
from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.checkpoints.table import write
from favchat_jax.checkpoints.tensors import INDEX, open_tensors
from favchat_jax.checkpoints.weights_folder import load_weights
from favchat_jax.convert import facexformer, qformer, umt, videochat2
from favchat_jax.errors import UserError
from tests.conftest import damage, fill, start_module
from tests.convert.test_tables import CASES, weights_for
from tests.data.tokenizers_for_tests import words
from tests.models.tiny_parts import MISTRAL, config_json

# Weights that only the Q-Former's pretraining has; VideoChat2's stage 1 saves them beside the two parts.
PRETRAINING = ("temp", "vision_temp_embed", "vision_proj.weight", "text_proj.bias", "itm_head.weight", "itm_head.bias")
PICKLED = {"umt": umt, "qformer": qformer, "facexformer": facexformer, "videochat2": videochat2}


@dataclass
class Ended:
    """The outcome of a command."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def convert(capsys, monkeypatch):
    """Runs the command in this process, with the sizes of the tiny models instead of the published ones."""
    monkeypatch.setattr(command_line, "_set_up_logging", lambda: None)
    monkeypatch.setattr(command_line, "keep_freed_memory", lambda: None)
    for kind, source in PICKLED.items():
        monkeypatch.setattr(source, "weight_shapes", lambda kind=kind: CASES[kind][1])

    def run(*arguments: object) -> Ended:
        before = set(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", ["tools/convert_weights", *map(str, arguments)])
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_module("tools.convert_weights", run_name="__main__", alter_sys=True)
        finally:
            for flag in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, flag)
        return Ended(ended.value.code, *capsys.readouterr())

    return run


def published(kind):
    """Returns a tiny model's weights and their state dict in the published form, including extra keys."""
    table, shapes = CASES[kind]
    weights = weights_for(shapes)
    state = {name: torch.from_numpy(tensor) for name, tensor in write(table, weights)}
    extra = {
        "umt": ["vision_encoder.encoder.blocks.23.norm1.weight", "qformer.cls.predictions.bias", *PRETRAINING],
        "qformer": ["qformer.bert.embeddings.position_ids", "vision_layernorm.weight", *PRETRAINING],
        "facexformer": ["backbone.0.1.0.attn.relative_position_index", "backbone.1.bias", "face_decoder.x.weight"],
        "videochat2": ["mistral_model.base_model.model.lm_head.base_layer.weight", "temp"],
    }
    return weights, {**state, **{name: torch.zeros(1) for name in extra[kind]}}


@pytest.fixture
def folder(tmp_path):
    """A tiny language model's Hugging Face folder in two shards, and its weights."""
    weights = weights_for(CASES["mistral"][1])
    source = tmp_path / "mistral"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config_json(MISTRAL)))
    words("hair", "mood").save_pretrained(source)
    tensors = dict(write(mistral.TABLE, weights))
    shards = {"model-1.safetensors": sorted(tensors)[:9], "model-2.safetensors": sorted(tensors)[9:]}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, source / shard)
    where = {name: shard for shard, names in shards.items() for name in names}
    (source / INDEX).write_text(json.dumps({"weight_map": where}))
    return source, weights


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("kind", PICKLED)
@pytest.mark.parametrize("key", ["model", "state_dict_backbone", None])
def test_a_pickled_checkpoint_becomes_a_weights_folder_and_check_accounts_for_every_key(kind, key, convert, tmp_path):
    weights, state = published(kind)
    torch.save({key: state, "epoch": 1} if key else state, tmp_path / "checkpoint.pth")
    ended = convert(f"--kind={kind}", f"--src={tmp_path}/checkpoint.pth", f"--out={tmp_path}/out", "--check")
    assert ended.code == 0, ended.stderr
    assert same(load_weights(tmp_path / "out"), weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"kind": kind, "source": "checkpoint.pth"}
    lines = ended.stdout.splitlines()
    assert sum(int(line.split()[0]) for line in lines[:-1]) == len(state)
    extra = len(state) - len(list(write(CASES[kind][0], weights)))
    assert lines[-1].startswith(f"{len(state)} keys: {len(state) - extra} used, {extra} ignored, 0 unknown, 0 of")


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPED = {
    "DistributedDataParallel": ("a.pth", lambda state: {"model": prefixed(state, "module.")}),
    "DeepSpeed": ("model_states.pt", lambda state: {"module": state, "global_steps": 3, "lr_scheduler": None}),
    "DeepSpeed around DistributedDataParallel": ("a.pt", lambda state: {"module": prefixed(state, "module.")}),
    "Lightning": ("last.ckpt", lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3, "callbacks": {}}),
    "a compiled model": ("a.bin", lambda state: prefixed(state, "_orig_mod.")),
    "a compiled part": ("a.pth", lambda state: {name.replace("s.", "s._orig_mod."): t for name, t in state.items()}),
    "a compiled model in DistributedDataParallel": ("a.pth", lambda state: prefixed(state, "module._orig_mod.")),
    "a checkpoint in another": ("a.ckpt", lambda state: {"state_dict": {"model": state}, "optimizer": {"state": {}}}),
}


@pytest.mark.parametrize("library", WRAPPED)
def test_what_a_training_library_puts_around_the_weights_is_taken_off(library, tmp_path):
    state = published("umt")[1]
    name, wrap = WRAPPED[library]
    torch.save(wrap(state), tmp_path / name)
    read = {name: np.asarray(tensor) for name, tensor in open_tensors(tmp_path / name).items()}
    assert same(read, {name: tensor.numpy() for name, tensor in state.items()})


def test_wrapped_names_in_safetensors_are_read_and_names_that_two_weights_share_are_refused(tmp_path):
    one, other = np.ones(2, np.float32), np.zeros(2, np.float32)
    save_file({"module.a.b": one, "module.model.c": other}, tmp_path / "a.safetensors")
    assert open_tensors(tmp_path / "a.safetensors").keys() == {"a.b", "model.c"}
    save_file({}, tmp_path / "a.safetensors")
    assert open_tensors(tmp_path / "a.safetensors") == {}
    save_file({"a._orig_mod.b": one, "a.b": other}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="a.safetensors holds weights of a compiled model under two names"):
        open_tensors(tmp_path / "a.safetensors")


STAGES = {  # stage of VideoChat2 -> the kinds that read its file, and the hint for the others
    "stage 1": (("qformer", "umt"), "--kind=qformer and --kind=umt"),
    "stage 3": (("videochat2",), "--kind=videochat2"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", PICKLED)
def test_a_file_of_another_kind_is_refused_with_the_kinds_that_read_it(kind, stage, convert, tmp_path):
    parts, kinds = STAGES[stage]
    state = {name: tensor for part in parts for name, tensor in published(part)[1].items()}
    torch.save(state, tmp_path / "file.pth")
    ended = convert(f"--kind={kind}", f"--src={tmp_path}/file.pth", f"--out={tmp_path}/out")
    if kind in parts:
        assert ended.code == 0 and same(load_weights(tmp_path / "out"), published(kind)[0])
    else:
        assert ended.code == 2 and ended.stderr.endswith(f" ({kinds} can read this file)\n"), ended.stderr


def test_safetensors_convert_as_well_and_half_precision_becomes_float32(convert, tmp_path):
    weights, state = published("umt")
    save_file({name: tensor.half().numpy() for name, tensor in state.items()}, tmp_path / "umt.safetensors")
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "umt.pt")
    for name, precision in (("umt.safetensors", 1e-3), ("umt.pt", 1e-2)):
        assert convert("--kind=umt", f"--src={tmp_path / name}", f"--out={tmp_path / name}.out").code == 0
        loaded = load_weights(tmp_path / f"{name}.out")
        assert all(leaf.dtype == np.float32 for leaf in loaded.values())
        assert all(np.allclose(loaded[path], leaf, rtol=precision) for path, leaf in weights.items())


@pytest.mark.parametrize(
    ("lacking", "line"),
    [
        (
            "qformer.bert.*(word_emb|position_emb|[0-9].(intermediate|output)[.])",
            "text branch, which VideoChat2's stage",
        ),
        (".*lora_", "absent: stage 2 trains no LoRA"),
        ("extra_query_tokens", "absent: added by instruction tuning"),
    ],
)
def test_weights_that_an_earlier_stage_lacks_are_named_and_skipped(lacking, line, convert, tmp_path):
    weights, state = published("videochat2")
    kept = {name: tensor for name, tensor in state.items() if not re.match(lacking, name)}
    torch.save(kept, tmp_path / "stage2.pth")
    ended = convert("--kind=videochat2", f"--src={tmp_path}/stage2.pth", f"--out={tmp_path}/out", "--check")
    assert ended.code == 0, ended.stderr
    assert line in ended.stdout and f"{len(state) - len(kept)} weights are absent" in ended.stdout
    loaded = load_weights(tmp_path / "out")
    assert 0 < len(loaded) < len(weights) and all(np.array_equal(leaf, weights[path]) for path, leaf in loaded.items())


def test_check_without_out_writes_nothing(convert, tmp_path):
    torch.save(published("umt")[1], tmp_path / "umt.pth")
    assert convert("--kind=umt", f"--src={tmp_path}/umt.pth", "--check").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["umt.pth"]


def test_the_copy_of_a_language_model_can_replace_it(convert, folder, tmp_path):
    source, weights = folder
    ended = convert("--kind=mistral", f"--src={source}", f"--out={tmp_path}/copy", "--check")
    assert ended.code == 0 and "21 keys: 21 used" in ended.stdout, ended.stderr
    assert same(flatten_dict(mistral.read_weights(tmp_path / "copy"), sep="/"), weights)
    assert mistral.read_config(tmp_path / "copy") == MISTRAL
    assert mistral.fingerprint(tmp_path / "copy") == mistral.fingerprint(source)
    parts = sorted(path.name for path in (tmp_path / "copy" / "parts").iterdir())
    assert parts == ["embed_tokens", "layer_000", "layer_001", "lm_head", "norm"]
    assert (tmp_path / "copy" / "tokenizer.json").exists() and not (tmp_path / "copy" / INDEX).exists()


@pytest.mark.parametrize("harm", ["flipped bits", "missing part", "another config"])
def test_a_damaged_copy_is_refused(harm, convert, folder, tmp_path):
    copy = tmp_path / "copy"
    assert convert("--kind=mistral", f"--src={folder[0]}", f"--out={copy}").code == 0
    if harm == "flipped bits":
        damage(copy / "parts" / "layer_001" / "weights")
        says = "layer_001 is damaged"
    elif harm == "missing part":
        (copy / "parts" / "norm").rename(tmp_path / "norm")
        says = "lacks model.norm.weight"
    else:
        (copy / "config.json").write_text(json.dumps({**config_json(MISTRAL), "vocab_size": 24}))
        says = "config.json contradicts the weights"
    with pytest.raises(ValueError, match=says):
        mistral.read_weights(copy)


def test_a_copy_of_a_copy_is_refused(convert, folder, tmp_path):
    assert convert("--kind=mistral", f"--src={folder[0]}", f"--out={tmp_path}/copy").code == 0
    ended = convert("--kind=mistral", f"--src={tmp_path}/copy", f"--out={tmp_path}/again")
    assert ended.code == 2 and "is a copy already" in ended.stderr


class Code:
    """Code that a pickle must not contain."""

    def __reduce__(self):
        return print, ("code of a pickle ran",)


class Blocked:
    """Code that torch blocks by its module's name."""

    def __reduce__(self):
        return os.system, ("echo code of a pickle ran",)


def saved(content):
    return lambda path: torch.save(content, path)


def changed(kind, **change):
    """Returns a writer of the kind's state dict with tensors replaced; None removes one, `__` stands for a dot."""

    def write_to(path):
        state = published(kind)[1] | {name.replace("__", "."): tensor for name, tensor in change.items()}
        torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)

    return write_to


def cut(path):
    changed("umt")(path)
    path.write_bytes(path.read_bytes()[:-200])


def pickled(content, protocol=2):
    return lambda path: path.write_bytes(pickle.dumps(content, protocol=protocol))


BIAS, KERNEL = "vision_encoder__encoder__blocks__1__attn__q_bias", "vision_encoder__encoder__patch_embed__proj__weight"
FILES = {
    "wrong kind": (changed("facexformer"), r"holds no weight of UMT \(its first is backbone\..*\): check the kind"),
    "unknown key": (changed("umt", stray=torch.ones(2)), r": stray is not a weight of UMT: check that it is"),
    "missing key": (changed("umt", **{BIAS: None}), r" lacks vision_encoder\.encoder\.blocks\.1\.attn\.q_bias: fetch"),
    "other shape": (
        changed("umt", **{KERNEL: torch.ones(2, 3)}),
        r"proj\.weight has shape \(2, 3\), expected \(8, 3, 1",
    ),
    "NaN": (changed("umt", **{BIAS: torch.full((8,), torch.nan)}), r"blocks\.1\.attn\.q_bias holds NaN or infinity"),
    "no tensors": (saved({"model": {"x": 3}}), r"x is a int, not a tensor"),
    "no state dict": (saved(torch.ones(3)), r"holds no state dict"),
    "pickle with code": (saved({"model": {}, "config": Code()}), r"would run code when read, which is refused"),
    "old pickle with code": (pickled({"config": Code()}), r"would run code when read, which is refused"),
    "zip with a blocked function": (saved({"config": Blocked()}), r"would run code when read, which is refused"),
    "plain pickle of protocol 4": (pickled({"a": 1}, protocol=4), r"is a plain pickle, which can run code"),
    "plain pickle of protocol 2": (pickled({"a": 1}), r"is a plain pickle, which can run code"),
    "letters": (lambda path: path.write_bytes(b"e" * 300), r"is damaged or not a PyTorch file.*: fetch it again$"),
    "cut short": (cut, r"is damaged or not a PyTorch file: fetch it again$"),
    "not PyTorch's": (lambda path: path.write_bytes(b"<html>Not found</html>"), r"is damaged"),
    "empty": (lambda path: path.write_bytes(b""), r"is damaged"),
    "no file": (lambda path: None, r"is missing: name a file or a folder"),
}


@pytest.mark.parametrize("problem", FILES)
def test_an_invalid_pickled_file_gives_one_line_and_nothing_is_written(problem, convert, tmp_path):
    write_to, says = FILES[problem]
    write_to(tmp_path / "umt.pth")
    ended = convert("--kind=umt", f"--src={tmp_path}/umt.pth", f"--out={tmp_path}/out")
    line = ended.stderr.splitlines()[-1]
    assert "UserWarning" not in ended.stderr
    assert ended.code == 2 and re.search(says, line), ended.stderr
    assert "umt.pth" in line and "Traceback" not in ended.stderr and "code of a pickle ran" not in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] in ([], ["umt.pth"])


def without_shard(source):
    (source / "model-2.safetensors").unlink()


def cut_shard(source):
    shard = source / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def configured(**fields):
    return lambda source: (source / "config.json").write_text(json.dumps({**config_json(MISTRAL), **fields}))


def with_tensors(**change):
    def apply(source):
        shard = source / "model-1.safetensors"
        save_file({**load_file(shard), **{name.replace("__", "."): t for name, t in change.items()}}, shard)

    return apply


def with_bin(source):
    for shard in source.glob("*.safetensors"):
        shard.rename(shard.with_suffix(".bin"))


def with_tokens(source):
    words(*map(str, range(30))).save_pretrained(source)


FOLDERS = {
    "more tokens than the embedding": (
        with_tokens,
        r"mistral has 33 tokens but vocab_size in its config\.json is 23: ",
    ),
    "pickled shards": (with_bin, r"mistral holds its weights as \.bin files: fetch its \.safetensors files"),
    "no tokenizer": (lambda source: (source / "tokenizer.json").unlink(), r"mistral holds no tokenizer\.json"),
    "missing shard": (without_shard, r"model-2\.safetensors is missing"),
    "truncated shard": (cut_shard, r"model-2\.safetensors is damaged"),
    "contradicting config": (
        configured(hidden_size=20),
        r"has shape .* expected .* config\.json contradicts the weights",
    ),
    "more layers in config": (configured(num_hidden_layers=4), r"lacks model\.layers\.2\."),
    "tied embeddings": (configured(tie_word_embeddings=True), r"tie_word_embeddings is set"),
    "another model": (configured(model_type="llama"), r"model_type is 'llama'"),
    "unknown key": (with_tensors(stray=np.ones(2, np.float32)), r"stray is not a weight of Mistral"),
    "infinity": (
        with_tensors(lm_head__weight=np.full((23, 16), np.inf, np.float32)),
        r"lm_head\.weight holds NaN or inf",
    ),
}


@pytest.mark.parametrize("problem", FOLDERS)
def test_an_invalid_folder_gives_one_line_and_nothing_is_written(problem, convert, folder, tmp_path):
    harm, says = FOLDERS[problem]
    harm(folder[0])
    ended = convert("--kind=mistral", f"--src={folder[0]}", f"--out={tmp_path}/copy")
    assert ended.code == 2 and re.search(says, ended.stderr.splitlines()[-1]), ended.stderr
    assert "Traceback" not in ended.stderr and [path.name for path in tmp_path.iterdir()] == ["mistral"]


@pytest.mark.parametrize("kind", ["umt", "mistral"])
def test_a_full_disk_leaves_no_incomplete_folder(kind, convert, folder, tmp_path, small_disk):
    torch.save(published("umt")[1], tmp_path / "umt.pth")
    fill(small_disk)
    source = folder[0] if kind == "mistral" else tmp_path / "umt.pth"
    ended = convert(f"--kind={kind}", f"--src={source}", f"--out={small_disk}/out")
    assert ended.code == 2 and re.search(r"could not write .*: free disk space|No space left", ended.stderr)
    assert "Traceback" not in ended.stderr and [path.name for path in small_disk.iterdir()] == ["ballast"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], r"needed: --kind=umt\|qformer\|facexformer\|videochat2\|mistral --src="),
        (["--kind=umt", "--src=x.pth"], r"needed: .* and --out=DIR or --check"),
        (["--kind=bert", "--src=x.pth", "--out=y"], r"--kind=bert"),
        (["--kind=umt", "--src=x.ckpt", "--out=y"], r"x\.ckpt is missing"),
        (["--kind=umt", "--src=Makefile", "--out=y"], r"Makefile is not a file of weights"),
        (["--kind=umt", "--src=x.pth", "--out=docs"], r"--out=docs exists already"),
        (["--kind=mistral", "--src=nowhere", "--out=y"], r"nowhere/config\.json is missing"),
    ],
)
def test_a_mistake_on_the_command_line_gives_one_line(arguments, says, convert):
    ended = convert(*arguments)
    assert ended.code == 2 and re.search(says, ended.stderr) and ended.stderr.count("\n") == 1, ended.stderr


def test_a_refusal_prints_nothing_else_on_stderr(tmp_path):
    changed("umt")(tmp_path / "umt.pth")
    process = start_module("tools.convert_weights", "--kind=facexformer", f"--src={tmp_path}/umt.pth", "--check")
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 2 and stderr.count("\n") == 1, stderr
    assert "holds no weight of FaceXFormer" in stderr and "0 used" in stdout
