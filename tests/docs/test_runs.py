"""What the docs say of a finished run holds: the notebook runs, and the reference names its files and metrics."""

import json
import os
import re

import pytest

from favchat_jax.data.sources import open_dataset
from tests.conftest import DATA, ROOT

pytestmark = pytest.mark.slow  # three stages are trained first
MISSING = "the notebook's packages are not installed: pip install -e '.[dev]'"


def first_column(page: str) -> set[str]:
    """What stands in code style in the first column of a reference page's tables."""
    rows = [line.split("|")[1] for line in (ROOT / "docs/reference" / page).read_text().splitlines() if line[:1] == "|"]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_notebook_shows_frames_answers_and_weights(trained, small_world, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason=MISSING)
    nbclient = pytest.importorskip("nbclient", reason=MISSING)
    pytest.importorskip("ipykernel", reason=MISSING)
    demo = tmp_path / "runs/tiny-v1"
    demo.mkdir(parents=True)
    (demo / "stage3").symlink_to(trained.folder / "stage3")
    (demo / "example.mp4").write_bytes(open_dataset(DATA, small_world.packed, "heldout")[0].clip)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "examples/ask_a_video.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # a cell that fails raises

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert len(pictures) == 2
    assert "What color is the hair?" in printed


def test_every_metric_of_a_stage_is_in_the_reference(trained):
    line = json.loads((trained.folder / "stage3/metrics.jsonl").read_text().splitlines()[-1])
    assert "loss" in line
    assert line.keys() <= first_column("metrics.md")


def test_every_file_of_a_workdir_is_in_the_reference(trained):
    documented = {path.split("/")[0] for path in first_column("workdir.md")}
    for stage in ("stage1", "stage3"):
        found = {path.name for path in (trained.folder / stage).iterdir()}
        assert {"config.json", "checkpoints"} <= found
        assert found <= documented
