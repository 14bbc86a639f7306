"""The wheel as it is installed: the package alone, with its data and the command `favchat`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import favchat_jax
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of an installation from a wheel, made of a copy of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    unneeded = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "tests")
    source = shutil.copytree(ROOT, folder / "source", ignore=unneeded)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", f"--target={folder / 'site'}", wheel], check=True)
    return folder / "site"


def favchat(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs the installed command, far from the clone."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [installed / "bin" / "favchat", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_wheel_installs_the_package_alone_and_all_of_it(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"favchat_jax", "bin"}

    def files(folder: Path) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {str(path.relative_to(folder)) for path in found}

    assert files(installed / "favchat_jax") == files(ROOT / "favchat_jax")


def test_the_installed_command_lists_its_commands_and_refuses_others(installed, tmp_path):
    help = favchat(installed, tmp_path, "--help")
    assert help.returncode == 0 and all(name in help.stdout for name in ("train", "chat", "evaluate"))
    assert favchat(installed, tmp_path, "--version").stdout == f"{favchat_jax.__version__}\n"
    assert (installed / f"favchat_jax-{favchat_jax.__version__}.dist-info").is_dir()
    assert favchat(installed, tmp_path).returncode == 2
    unknown = favchat(installed, tmp_path, "teach")
    assert unknown.returncode == 2
    assert unknown.stderr == "favchat: unknown command 'teach': choose one of train, chat, evaluate\n"


def test_the_installed_command_takes_the_config_of_a_clone_by_its_path(installed, tmp_path):
    refused = favchat(installed, tmp_path, "train", f"--config={ROOT}/configs/stage1.py", "--config.batch=0")
    assert refused.returncode == 2
    assert refused.stderr.startswith("train: batch") and refused.stderr.count("\n") == 1
