import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.checkpoints import mistral_folder
from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.initial import initial_weights
from favchat_jax.checkpoints.weights_folder import load_weights
from favchat_jax.checkpoints.workdir import load_config
from favchat_jax.data.conversation import Conversation, load_tokenizer
from favchat_jax.data.sources import open_dataset
from favchat_jax.embedded import encoders, language_model
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.embedded import parts as pretraining
from favchat_jax.errors import UserError
from favchat_jax.models.facexformer import FaceXFormerEncoder
from tests.conftest import DATA

PARTS = {"llm.path": "mistral", "init.umt": "umt", "init.facexformer": "facexformer"}


@pytest.fixture(scope="module")
def place(small_world, tmp_path_factory):
    """A folder with the three parts in their default subfolder, and the config that made them."""
    folder = tmp_path_factory.mktemp("parts")
    usual = {path.replace(".", "__"): str(pretraining.PARTS / name) for path, name in PARTS.items()}
    config = small_world.config("stage1", **usual)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(pretraining, "DATA", DATA)
        pretraining.make_missing_parts(config)
    return folder, config


@pytest.fixture
def inside(place, monkeypatch):
    """Makes the folder of `place` the working directory; returns its config."""
    monkeypatch.chdir(place[0])
    monkeypatch.setattr(pretraining, "DATA", DATA)
    return place[1]


@pytest.fixture
def made(monkeypatch):
    """A list of the names of parts that would be made; nothing is made."""
    names = []
    for maker in ("make_language_model", "make_facial_encoder", "make_general_encoder"):
        monkeypatch.setattr(pretraining, maker, lambda config, records, frames, folder: names.append(folder.name))
    return names


def test_parts_are_folders_of_the_same_kinds_as_published_parts(inside):
    assert sorted(os.listdir(pretraining.PARTS)) == sorted(PARTS.values())
    sizes = mistral_folder.read_config(inside.llm.path)
    assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.num_key_value_heads) == (32, 2, 1)
    assert len(load_tokenizer(inside.llm.path)) == sizes.vocab_size
    assert {path.split("/")[0] for path in load_weights(inside.init.umt)} == {"umt", "vision_layernorm"}
    assert {path.split("/")[0] for path in load_weights(inside.init.facexformer)} == {"facexformer"}
    assert load_config(inside.init.facexformer) == {"kind": "facexformer"}


def test_a_stage_can_start_from_the_parts(inside):
    shapes = assembly.assemble(inside).shapes
    for folder in (inside.init.umt, inside.init.facexformer):
        assert all(shapes[path].shape == leaf.shape for path, leaf in load_weights(folder).items())


@pytest.mark.parametrize("value", [0, "many"])
def test_an_invalid_value_is_refused(value, inside):
    with pytest.raises(UserError, match="^pretrain.llm_steps="):
        pretraining.make_missing_parts(inside.updated({"pretrain.llm_steps": value}))


def test_existing_parts_are_not_made_again(inside, made):
    pretraining.make_missing_parts(inside)
    assert made == []


def test_parts_made_with_other_settings_are_refused_and_stay_unchanged(inside, made):
    before = sorted((path, path.stat().st_mtime_ns) for path in pretraining.PARTS.rglob("*"))
    other = inside.updated({"pretrain.learning_rate": 0.5})
    rate = inside.pretrain["learning_rate"]
    differs = f"tiny-parts/mistral was made with other settings.*: learning_rate .{rate} there, 0.5"
    with pytest.raises(UserError, match=f"{differs}.*--config.llm.path=runs/tiny-parts/NAME"):
        pretraining.make_missing_parts(other)
    assert made == []
    assert sorted((path, path.stat().st_mtime_ns) for path in pretraining.PARTS.rglob("*")) == before


def test_parts_with_other_settings_are_made_under_other_names(place, inside, made, monkeypatch, tmp_path):
    monkeypatch.chdir(shutil.copytree(place[0], tmp_path / "copy"))
    elsewhere = {path: f"{pretraining.PARTS}/{name}-2" for path, name in PARTS.items()}
    other = inside.updated({"pretrain.learning_rate": 0.5, **elsewhere})
    pretraining.make_missing_parts(other)
    assert sorted(made) == sorted(f".{name}-2.draft-favchat" for name in PARTS.values()), "drafts first"
    recipes = [pretraining.PARTS / f"{name}-2" / "recipe.json" for name in PARTS.values()]
    assert [json.loads(path.read_text())["learning_rate"] for path in recipes] == [0.5] * 3


def test_a_folder_that_no_run_made_is_refused_as_a_part(place, inside, made, monkeypatch, tmp_path):
    monkeypatch.chdir(shutil.copytree(place[0], tmp_path / "copy"))
    (pretraining.PARTS / "umt" / "recipe.json").unlink()
    with pytest.raises(UserError, match="runs/tiny-parts/umt has no recipe.json"):
        pretraining.make_missing_parts(inside)
    assert made == []


def test_a_part_in_another_folder_is_neither_made_nor_replaced(inside, made, small_world, tmp_path):
    own = Path(small_world.llm)
    before = sorted((path, path.stat().st_mtime_ns) for path in own.iterdir())
    config = inside.updated({"llm.path": str(own), "init.umt": str(tmp_path / "none"), "init.facexformer": ""})
    pretraining.make_missing_parts(config)
    assert made == [] and not (tmp_path / "none").exists()
    assert sorted((path, path.stat().st_mtime_ns) for path in own.iterdir()) == before
    with pytest.raises(UserError, match="none is not a weights folder"):
        initial_weights(assembly.assemble(config))


def described_in_words(records, tokenizer, visual_tokens=16):
    """Yields the texts about some clips, with the words of the fact at each visual token."""
    rng = np.random.default_rng(0)
    conversation = Conversation(tokenizer, visual_tokens)
    for record in records:
        for tokens, learned, facts in language_model.texts_about(record, conversation, tokenizer, rng):
            yield (
                record,
                tokenizer.decode(tokens[learned]),
                tokens,
                [tokenizer.decode([*name, *value]) for name, value in facts],
            )


def test_visual_tokens_hold_exactly_the_facts_of_the_clip(small_world):
    tokenizer, source = load_tokenizer(small_world.llm), open_dataset(DATA, small_world.packed, "train")
    for record, _, tokens, facts in described_in_words([source[i] for i in range(12)], tokenizer):
        expected = {
            f" {label.replace('_', ' ')} {rendered_faces.answer(label, rendered_faces.LABELS[label][value])}"
            for label, value in record.labels.items()
            if value >= 0
        }
        assert set(facts) == expected and len(facts) == np.sum(tokens < 0) == 16


def test_texts_about_a_clip_ask_for_its_facts_or_for_its_summary(small_world):
    tokenizer, source = load_tokenizer(small_world.llm), open_dataset(DATA, small_world.packed, "train")
    described = 0
    for record, learned, _, _ in described_in_words([source[i] for i in range(36)], tokenizer):
        if "." in learned:
            described += 1
            assert learned == f" {record.summary}</s>"
        else:
            true = {rendered_faces.answer(n, rendered_faces.LABELS[n][v]) for n, v in record.labels.items() if v >= 0}
            assert {answer.strip() for answer in learned.split("</s>") if answer} <= true
    assert 0.1 < described / (36 * 6) < 0.3


def test_mirroring_a_picture_swaps_left_and_right_in_its_classes():
    pixels = np.arange(40 * 2 * 3 * 3, dtype=np.uint8).reshape(40, 2, 3, 3)[:, None]
    sides = rendered_faces.SIDES
    classes = {"mole": np.arange(40) % 3, "direction": np.full(40, -1), "hat": np.arange(40) % 2}
    mirrored, swapped = encoders.mirror_half(pixels, classes, np.random.default_rng(0))
    turned = np.array([not np.array_equal(a, b) for a, b in zip(pixels, mirrored, strict=True)])
    assert 8 < turned.sum() < 32
    assert np.array_equal(mirrored[turned], pixels[turned][..., ::-1, :])
    other = {"left": "right", "right": "left", "none": "none"}
    for i in range(40):
        before, after = sides[classes["mole"][i]], sides[swapped["mole"][i]]
        assert after == (other[before] if turned[i] else before)
    assert np.array_equal(swapped["hat"], classes["hat"]) and np.all(swapped["direction"] == -1)


def test_heads_keep_their_initial_weights_while_the_encoder_learns():
    model = encoders.FrameClassifier(
        FaceXFormerEncoder(width=8, depths=(1, 1), heads=(1, 1), window=2), {"hat": 2, "mole": 3}
    )
    rng = np.random.default_rng(0)
    batch = (
        rng.integers(256, size=(4, 16, 16, 3), dtype=np.uint8),
        {"hat": np.array([0, 1, 1, -1]), "mole": np.arange(4) % 3},
    )
    before = model.init(jax.random.key(0), batch[0][:1].astype(np.float32))["params"]
    after = encoders.fit_classifier(model, iter([batch] * 4), 3, rate=0.01, seed=0, name="test", importance={})
    for label in ("hat", "mole"):
        assert not after[label]["bias"].any()
        np.testing.assert_allclose(after[label]["kernel"], before[label]["kernel"], rtol=1e-6)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after["encoder"], before["encoder"])
    assert sum(jax.tree.leaves(moved)) > 10


def test_the_tokenizer_has_the_templates_tokens_and_encodes_any_text_without_loss(small_world):
    tokenizer = load_tokenizer(small_world.llm)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    for word in ("[INST]", "[/INST]", "<Video>", "</Video>"):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
    text = "What colour is the hair? Ein Gesicht – 顔 🙂"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
