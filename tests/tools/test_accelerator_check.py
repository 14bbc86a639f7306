"""The accelerator check: drawn weights, parts in their own processes, and a rehearsal on a CPU."""

import json
import math
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.errors import UserError
from favchat_jax.models.kernels.platform import compiling_for
from favchat_jax.planning import plan, targets
from tests.conftest import ROOT
from tests.tools.sides_for_tests import measuring
from tools import accelerator_check
from tools.beside_pytorch.contest import Side
from tools.on_accelerator import correct, drawn
from tools.on_accelerator.parts import PARTS, contest


def test_drawn_matrices_have_unit_gain_scales_are_1_and_biases_0():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        "a/kernel": jax.ShapeDtypeStruct((3, 64, 200), jnp.bfloat16, sharding=here),
        "b/kernel": jax.ShapeDtypeStruct((64, 200), jnp.float32, sharding=here),
        "c/kernel": jax.ShapeDtypeStruct((64, 200), jnp.int8, sharding=here),
        "norm/scale": jax.ShapeDtypeStruct((2, 64), jnp.float32, sharding=here),
        "norm/bias": jax.ShapeDtypeStruct((2, 64), jnp.float32, sharding=here),
    }
    weights = drawn.draw(shapes)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in weights.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in shapes.items()
    }
    a, b = (np.asarray(weights[f"{name}/kernel"], np.float32) for name in "ab")
    assert a.std() * 8 == pytest.approx(1, abs=0.02) and abs(a.mean()) < 2e-3
    assert b.std() * 8 == pytest.approx(1, abs=0.02)
    # Neither layers nor places repeat one another.
    assert abs(np.corrcoef(a[0].ravel(), a[1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(b[:, 0], b[:, 1])[0, 1]) < 0.4 and np.unique(b).size > 0.95 * b.size
    assert np.asarray(weights["c/kernel"]).std() > 50
    assert (weights["norm/scale"] == 1).all() and (weights["norm/bias"] == 0).all()


def test_operations_are_counted_with_plain_attention_on_every_platform(tmp_path):
    config = drawn.settings("tiny", "stage2", tmp_path).updated({"model.dtype": "bfloat16"})
    counted = plan.flops_of_one_clip(config)
    plan.flops_of_one_clip.cache_clear()
    with compiling_for("tpu"):  # whose kernel for these frames hides its products
        assert plan.flops_of_one_clip(config) == counted > 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A800-SXM4-80GB", "a800-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("TPU v5 lite", "v5e-8"),
        ("TPU v5", "v5p-8"),
        ("TPU v6 lite", "v6e-4"),
    ],
)
def test_a_device_is_known_by_the_name_that_it_gives_itself(kind, name):
    assert targets.of_device(kind) is targets.TARGETS[name]
    assert targets.of_device("cpu") is None


def test_pairs_run_in_turns_and_a_side_without_memory_keeps_its_row():
    sides, kept = [Side("ours", measuring, 1.0), Side("pytorch", measuring, 3.0)], []
    try:
        contest(sides, [("first", "first"), ("first", "second")], math.inf, kept.append, lambda: {"flops": 7.0})
    finally:
        for side in sides:
            side.close()
    rows = {(row["side"], row["setting"]): row for row in kept[-1]}
    assert rows["ours", "first"]["rounds"] == 10 and rows["pytorch", "first"]["rounds"] == 5
    assert rows["pytorch", "first"]["seconds"] == 3 and rows["pytorch", "first"]["tokens"] == 30
    assert rows["pytorch", "second"]["failed"] == "out of memory"
    assert all(row["flops"] == 7 for row in kept[-1])
    assert len(kept) == 10 and len(kept[0]) == 2, "what the first pair gave is kept before the second begins"


def test_when_the_time_is_over_no_pair_begins():
    side, kept = Side("ours", measuring, 1.0), []
    try:
        contest([side], [("first", "first")], time.monotonic(), kept.append)
    finally:
        side.close()
    assert kept == []


def test_a_wrong_kernel_is_found_out(monkeypatch):
    sizes = (1, 64, 64, 4, 4, 64)
    assert correct._way("a form", sizes, {}, shrink=False)["right"]
    monkeypatch.setattr(correct, "attention", lambda *x, **how: 1.03 * correct.plain(*x, **how))
    assert not correct._way("a form", sizes, {}, shrink=False)["right"]
    monkeypatch.setattr(correct, "attention", lambda *x, **how: jnp.nan * correct.plain(*x, **how))
    row = correct._way("a form", sizes, {}, shrink=False)
    assert not row["right"] and row["error"] == math.inf


def check(*words):
    command = [sys.executable, "-m", "tools.accelerator_check", "--preset=tiny", "--platform=cpu", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_file_is_written_after_each_part_and_parts_of_an_earlier_run_stay(tmp_path):
    file = tmp_path / "check.json"
    earlier = {"rows": [{"side": "ours"}], "wall_seconds": 1.0}
    file.write_text(json.dumps({"preset": "tiny", "parts": {"stage3": earlier, "about": {"rows": [], "failed": "x"}}}))
    run = check("--only=about", f"--json={file}", "--minutes=4")
    assert run.returncode == 0, run.stderr
    report = json.loads(file.read_text())
    (row,) = report["parts"]["about"]["rows"]
    assert row["platform"] == "cpu" and row["flops_a_second"] > 1e8 and row["bytes_a_second"] > 1e8
    assert report["parts"]["stage3"] == earlier and report["preset"] == "tiny" and report["date"]
    assert "GB/s" in run.stdout


def test_a_part_that_takes_too_long_is_stopped_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator_check, "FEWEST", 0.0)
    report = accelerator_check.check("tiny", "cpu", 2 / 60, ["kernels", "losses"], tmp_path / "check.json")
    assert all("stopped after" in report["parts"][part]["failed"] for part in ("kernels", "losses"))
    assert json.loads((tmp_path / "check.json").read_text())["parts"].keys() == {"kernels", "losses"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only=speed"], "--only=speed is no part: choose from about, kernels"),
        (["--json=nowhere/check.json"], "--json=nowhere/check.json cannot be written"),
        (["--json=pyproject.toml"], "--json=pyproject.toml holds no accelerator check"),
        (["--platform=gpuu", "--only=about", "--minutes=2"], "these parts failed: about"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, said):
    run = check(*words)
    assert run.returncode in (1, 2) and said in run.stderr and len(run.stderr.splitlines()) == 1


def test_a_file_of_another_preset_stays_as_it_is(tmp_path):
    file = tmp_path / "check.json"
    file.write_text('{"preset": "paper", "parts": {}}')
    with pytest.raises(UserError, match="holds a check with --preset=paper"):
        accelerator_check.check("tiny", "cpu", 1, ["about"], file)
    assert file.read_text() == '{"preset": "paper", "parts": {}}'


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cores", [1, 1000], ids=["compiled ahead", "compiled by the parts"])
def test_a_rehearsal_on_a_cpu_measures_every_part_and_finds_nothing_wrong(cores, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator_check, "CORES", cores)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.chdir(ROOT)
    report = accelerator_check.check("tiny", "cpu", 25, list(PARTS), tmp_path / "check.json")
    assert report == json.loads((tmp_path / "check.json").read_text())
    assert list(report["parts"]) == list(PARTS) == list(accelerator_check.WEIGHTS)
    assert not [outcome for outcome in report["parts"].values() if "failed" in outcome]
    kernels, losses = report["parts"]["kernels"]["rows"], report["parts"]["losses"]["rows"]
    assert len(kernels) == len(correct.WAYS) + 1 and all(row["right"] for row in kernels + losses)
    for part in ("stage2", "stage3"):
        rows = {(row["side"], row["setting"]): row for row in report["parts"][part]["rows"]}
        assert set(rows) == {("ours", "remat=none"), ("pytorch", "checkpointed"), ("pytorch", "eager")}
        assert all(row["seconds"] > 0 and math.isfinite(row["loss"]) and row["flops"] > 1e9 for row in rows.values())
    answers = report["parts"]["answers"]["rows"]
    assert {row["setting"] for row in answers if row["side"] == "ours"} == {"batch 1", "batch 8", "rollout 8 x 256"}
    forms = report["parts"]["forms"]["rows"]
    assert [row["setting"] for row in forms] == ["batch 1, int8", "batch 8, int8", "rollout 8 x 256, training weights"]
    assert all(row["seconds_a_token"] > 0 for row in answers + forms)
    assert forms[0]["weight_bytes"] < 0.5 * answers[0]["weight_bytes"] < forms[2]["weight_bytes"]
