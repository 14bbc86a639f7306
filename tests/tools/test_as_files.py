"""A tool that is started as a file instead of a module says in one line how to start it."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if 'if __name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_every_tool_imports_what_answers_for_it_when_it_is_a_file(tool):
    imported = [
        (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.parse(tool.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    ours = [name for name in imported if name in ("favchat_jax", "configs", "tools")]
    assert ours[0] in ("favchat_jax", "configs")


@pytest.mark.parametrize("name", ["report", "ablate"])  # the second imports configs first
def test_a_tool_started_as_a_file_says_how_to_start_it(name, tmp_path):
    ended = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True
    )
    line = f"{name}: start it as a module, in the project's folder: python -m tools.{name}\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)
