"""The tutorial's script makes a folder of one's own clips that training can read."""

from pathlib import Path

from favchat_jax.data.sources import open_dataset, prepare
from tests.conftest import DATA, ROOT
from tests.docs.test_commands import code_blocks


def test_the_folder_of_own_clips_is_packed(small_world, tmp_path, monkeypatch):
    script = next(code for code in code_blocks((ROOT / "docs/tutorial.md").read_text(), "python") if "my-clips" in code)
    monkeypatch.chdir(tmp_path)
    example = Path("runs/tiny-v1/example.mp4")
    example.parent.mkdir(parents=True)
    example.write_bytes(open_dataset(DATA, small_world.packed, "heldout")[0].clip)
    exec(compile(script, "docs/tutorial.md", "exec"), {})

    prepare("celebvhq", "my-clips", "runs/my-data")
    source = open_dataset("celebvhq", "runs/my-data", "train")
    assert len(source) == 1
    assert source[0].clip == example.read_bytes()
    assert (source[0].questions[0].question, source[0].questions[0].answer) == (
        "Where does this person look?",
        "Over the shoulder.",
    )
