"""Imports run from the front doors down to the ground floor, without circles, and the core imports no guest.

A registry names a guest as text (`"favchat_jax.embedded.dataset:RenderedFaces"`), which is not an import.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = "favchat_jax"
GUESTS = {"evaluation", "corpus", "convert", "planning", "embedded"}
OUTSIDE = {"configs", "tools", "tests"}
# A room may import its own floor and the floors above it in this list, which is the one below it in the house.
FLOORS = [
    {"errors", "files", "signals", "section", "config", "sharding", "stages", "processes", "programs"},
    {"models", "data"},
    {"checkpoints"},
    {"training"},
    {"generation"},
    {"rl"},
]
CORE = set().union(*FLOORS)


def modules(folder: str) -> dict[str, Path]:
    """Dotted name -> file of every module below a folder of the repository."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, name: str, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The modules that a file imports, wherever in it, each with its line."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # a module of a package, or something that the module defines
                inner = f"{module}.{alias.name}"
                yield inner if inner in known else module, node.lineno


def room(name: str) -> str:
    """`models` of favchat_jax.models.umt, `errors` of favchat_jax.errors."""
    return name.split(".")[1] if "." in name else ""


@pytest.fixture(scope="module")
def package() -> dict[str, Path]:
    return modules(PACKAGE)


@pytest.fixture(scope="module")
def arrows(package) -> list[tuple[str, str, str]]:
    """(importer, imported, "file:line: imports X") of every import within the repository."""
    found = []
    for name, path in package.items():
        for imported, line in imports(path, name, package):
            if imported.split(".")[0] in {PACKAGE, *OUTSIDE}:
                found.append((name, imported, f"{path.relative_to(ROOT)}:{line} imports {imported}"))
    return found


def test_every_room_of_the_core_has_its_floor(package):
    assert {room(name) for name in package} >= CORE
    assert {room(name) for name in package} >= GUESTS and not GUESTS & CORE


def test_arrows_run_down_from_floor_to_floor(arrows):
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    up = [
        told
        for name, imported, told in arrows
        if room(name) in floor and room(imported) in floor and floor[room(imported)] > floor[room(name)]
    ]
    assert not up, "a lower floor imports a higher one:\n" + "\n".join(up)


def test_models_and_data_stand_side_by_side(arrows):
    known = [told for name, imported, told in arrows if {room(name), room(imported)} == {"models", "data"}]
    assert not known, "\n".join(known)


def test_the_core_imports_no_guest_no_door_and_nothing_outside_the_package(arrows):
    wrong = [
        told
        for name, imported, told in arrows
        if room(name) in CORE and (imported.split(".")[0] in OUTSIDE or room(imported) not in CORE)
    ]
    assert not wrong, "the core imports what is not of the core:\n" + "\n".join(wrong)


def test_nothing_in_the_package_imports_configs_tools_or_tests(arrows):
    wrong = [told for _, imported, told in arrows if imported.split(".")[0] in OUTSIDE]
    assert not wrong, "\n".join(wrong)


def test_guests_meet_by_name_only_in_a_registry(arrows):
    """embedded may be asked for by a door, and by no other guest; evaluation knows its benchmarks by name."""
    wrong = [
        told
        for name, imported, told in arrows
        if room(imported) == "embedded" and room(name) in (CORE | GUESTS) - {"embedded"}
    ]
    assert not wrong, "\n".join(wrong)


def test_configs_import_nothing_of_the_package():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for name, path in modules("configs").items()
        for imported, line in imports(path, name, {})
        if imported.split(".")[0] == PACKAGE
    ]
    assert not wrong, "a config is read before the package:\n" + "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle(package, arrows):
    known: dict[str, set[str]] = {name: set() for name in package}
    for name, imported, _ in arrows:
        if imported in package and imported != name:
            known[name].add(imported)
    circle = find_circle(known)
    assert not circle, "a circle: " + " -> ".join(circle)


def find_circle(arrows: dict[str, set[str]]) -> list[str]:
    """The names of a circle, its first name again at the end; [] if there is no circle."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(arrows[name]):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import a.b", ["a.b"]),
        ("from a import b", ["a.b"]),
        ("from a import c", ["a"]),
        ("from . import b", ["a.b"]),
        ("from .b import d", ["a.b"]),
        ("def f():\n    from a.b import d", ["a.b"]),
        ("if x:\n    import a.b as c", ["a.b"]),
        ("name = 'a.b'", []),
    ],
)
def test_an_import_is_found_wherever_it_stands(line, expected, tmp_path):
    path = tmp_path / "file.py"
    path.write_text(line)
    assert [name for name, _ in imports(path, "a.file", {"a": path, "a.b": path, "a.file": path})] == expected


def test_a_circle_is_found_and_named():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
