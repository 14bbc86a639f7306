"""What README and docs tell a person to type exists: commands, options, config fields, files, links, Python names."""

import ast
import functools
import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
NOTEBOOK = ROOT / "examples/ask_a_video.ipynb"
REFERENCE = ROOT / "docs/reference/commands.md"
STEPS = ("scan", "clip", "annotate", "review", "pack")  # of tools.build_dataset
FOREIGN = {"--noconftest", "--name", "--help"}  # pytest's, an example's, absl's


def code_blocks(text: str, language: str = "") -> Iterator[str]:
    """Fenced blocks of a language; for no language also what is indented by four spaces, in lists by more."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if found[1] == language:
            yield found[2]
    if not language:
        outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        yield from re.findall(r"(?:^ {4,}.*\n)+", outside, re.M)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command line in a page's blocks, without the path of an environment."""
    for block in code_blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"\s*(\.venv(-aot)?/bin/)?(python -m|make|pip) ?", line):
                words = shlex.split(line, comments=True)
                yield [re.sub(r"^\.venv(-aot)?/bin/", "", words[0]), *words[1:]]


@functools.cache
def options(module: str) -> frozenset[str]:
    """Options that `python -m module` takes: those it defines, and those that its imports define when imported."""
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, f"there is no module {module}"
    return frozenset(_defined(Path(spec.origin), started=True, seen=set()))


@functools.cache
def step_options(step: str) -> frozenset[str]:
    """Options that a step of the corpus adds to those of `tools.build_dataset`: its `define_flags` says."""
    functions = {
        name: next(
            node
            for node in ast.parse((ROOT / f"favchat_jax/corpus/{name}.py").read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name == "define_flags"
        )
        for name in (step, "pipelines")
    }
    found = set(_definitions(functions[step]))
    if "pipelines.define_flags()" in ast.unparse(functions[step]):
        found |= set(_definitions(functions["pipelines"]))
    return frozenset(found)


def _defined(path: Path, started: bool, seen: set[Path]) -> set[str]:
    """Options that a file defines when it is started, or imported."""
    if path in seen:
        return set()
    seen.add(path)
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        at_start = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        if started if at_start else not isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= set(_definitions(node))
        for imported in _imported(node):
            found |= _defined(imported, started=False, seen=seen)
    return found


def _definitions(node: ast.AST) -> Iterator[str]:
    for call in (child for child in ast.walk(node) if isinstance(child, ast.Call)):
        name = ast.unparse(call.func)
        if (".DEFINE_" in name or name.endswith("add_argument")) and isinstance(call.args[0], ast.Constant):
            yield str(call.args[0].value).lstrip("-")


def _imported(node: ast.AST) -> Iterator[Path]:
    """Files of this project that a statement imports."""
    names: list[str] = []
    if isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    for name in names:
        path = ROOT / (name.replace(".", "/") + ".py")
        if name.split(".")[0] in ("favchat_jax", "tools") and path.exists():
            yield path


@functools.cache
def config_fields(file: str, argument: str | None) -> frozenset[str]:
    """Dotted names of all nodes of the config that a file makes."""
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    config = module.get_config(*([argument] if argument is not None else []))

    def nodes(section, prefix=""):
        for name, value in section.items():
            yield prefix + name
            if hasattr(value, "items"):
                yield from nodes(value, f"{prefix}{name}.")

    return frozenset(nodes(config))


def check_module(words: list[str]) -> None:
    """The command `python -m ...` could be started."""
    module, given = words[2], words[3:]
    if module == "pytest":
        assert all((ROOT / word).exists() for word in given if word.startswith("tests")), words
        return
    known, config = options(module), None
    if module == "tools.build_dataset":
        known |= step_options(given[0])
    for word in given:
        name, _, value = word.partition("=")
        if name == "--config" and not value.startswith("configs/eval/NAME"):
            file, colon, argument = value.partition(":")
            assert (ROOT / file).is_file(), word
            config = config_fields(file, argument if colon else None)
    for word in given:
        name = word.partition("=")[0]
        if name.startswith("--config."):
            assert config and name.removeprefix("--config.") in config, word
        elif name.startswith("-"):
            assert name.removeprefix("--") in known | {"help"}, f"{module} takes no {name}"


def check_make(words: list[str]) -> None:
    """The targets of a `make` command exist."""
    text = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(\w+) [:?]= (.+)$", text, re.M))
    expanded = re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], ""), text)
    targets = set(re.findall(r"^([\w./-]+):", expanded, re.M))
    assert {word for word in words[1:] if "=" not in word} <= targets, words


def check_pip(words: list[str]) -> None:
    """Requirement files and extras of a `pip install` exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("optional-dependencies", {})
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "-r":
            assert (ROOT / following).is_file(), following
        if found := re.fullmatch(r"\.\[([\w,-]+)\]", word):
            assert set(found[1].split(",")) <= extras.keys(), word


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_exists(page):
    for words in commands(PAGES[page].read_text()):
        check = {"python": check_module, "make": check_make, "pip": check_pip}[words[0]]
        check(words)


def test_the_pages_hold_many_commands():
    assert sum(1 for path in PAGES.values() for _ in commands(path.read_text())) > 100


@pytest.mark.parametrize("page", PAGES)
def test_every_option_named_in_a_sentence_exists(page):
    known = FOREIGN | {f"--{name}" for module in documented_modules() for name in options(module)}
    known |= {f"--{name}" for step in STEPS for name in step_options(step)}
    fields = {"FIELD"}.union(*(config_fields(*config) for config in all_configs()))
    for span in re.findall(r"`(--[^`]*)`", PAGES[page].read_text()):
        for name in re.findall(r"(?:^|\s)(--[\w.]+)", span):
            field = name.removeprefix("--config.")
            assert name in known or (name.startswith("--config.") and field in fields), f"{name} in `{span}`"


def all_configs() -> Iterator[tuple[str, str | None]]:
    """Every config file with an argument for it."""
    for path in sorted((ROOT / "configs").rglob("*.py")):
        if "def get_config" in path.read_text() and path.name not in ("__init__.py", "common.py"):
            yield str(path.relative_to(ROOT)), None


def documented_modules() -> list[str]:
    """Modules with a section of their own in the reference."""
    return re.findall(r"^## ((?:favchat_jax|tools)\.[\w.]+)$", REFERENCE.read_text(), re.M)


def test_every_command_has_a_section_in_the_reference():
    started = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("favchat_jax", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if '__name__ == "__main__"' in path.read_text() and path.name != "__main__.py"
    }
    assert started == set(documented_modules())


@pytest.mark.parametrize("module", documented_modules())
def test_the_reference_lists_exactly_the_options_of_a_command(module):
    section = REFERENCE.read_text().split(f"## {module}\n")[1].split("\n## ")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    listed = set(re.findall(r"`--(\w+)`", rows))
    known = options(module)
    if module == "tools.build_dataset":
        known = known.union(*map(step_options, STEPS))
    assert listed == known


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_project_that_a_page_names_exists(page):
    packages = "|".join(path.name for path in (ROOT / "favchat_jax").iterdir() if path.is_dir())
    for span in re.findall(r"`([^`\s]+)`", re.sub(r"^```.*?^```", "", PAGES[page].read_text(), flags=re.M | re.S)):
        if "NAME" in span or "*" in span or span.startswith(("http", "--")):
            continue
        if re.match(r"(favchat_jax|configs|tools|tests|docs|examples)/", span):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(rf"({packages})/([\w/]+\.py|)", span):
            assert (ROOT / "favchat_jax" / span).exists(), span


def test_every_link_of_the_readme_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).exists()] == []


def python_examples() -> Iterator[tuple[str, str]]:
    """Every Python block of the pages, and the notebook's code."""
    for name, path in PAGES.items():
        for number, block in enumerate(code_blocks(path.read_text(), "python")):
            yield f"{name} {number}", block
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    yield NOTEBOOK.name, "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize(
    ("name", "code"), list(python_examples()), ids=lambda value: value if "\n" not in value else ""
)
def test_every_name_that_a_python_example_uses_exists(name, code):
    import favchat_jax

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("favchat_jax"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "favchat_jax":
                assert hasattr(favchat_jax, node.attr), ast.unparse(node)
            if node.value.id == "model" and "favchat_jax.load" in code:
                assert hasattr(favchat_jax.Model, node.attr), ast.unparse(node)


def test_every_page_that_the_code_names_exists():
    named = {
        (path.name, page)
        for folder in ("favchat_jax", "configs", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"\bdocs/[\w/.-]+\.(?:md|json)\b", path.read_text())
    }
    assert named
    assert {(name, page) for name, page in named if not (ROOT / page).exists()} == set()
