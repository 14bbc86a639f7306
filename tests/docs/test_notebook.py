"""The notebook of `examples/` runs from its first cell to its last and shows frames, answers and weights."""

import os

import pytest

from favchat_jax.data.sources import open_dataset
from tests.conftest import DATA, ROOT

MISSING = "the notebook's packages are not installed: pip install -e '.[dev]'"
nbformat = pytest.importorskip("nbformat", reason=MISSING)
nbclient = pytest.importorskip("nbclient", reason=MISSING)
pytest.importorskip("ipykernel", reason=MISSING)


@pytest.mark.slow
def test_the_notebook_shows_frames_answers_and_weights(trained, small_world, tmp_path, monkeypatch):
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
