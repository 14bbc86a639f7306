"""Generates the parts of the site that would otherwise drift from the code: a hook that mkdocs.yml names.

- A line `<!-- fields: stages model. -->` in a page becomes a table of the config fields whose names start with
  `model.`. Names and defaults come from `configs/`, meanings and units from `docs/reference/fields.toml`.
- Each package of the core gets a page under `reference/modules/` with the docstrings of its modules.

The build fails when a field has no meaning or a meaning has no field.
"""

import functools
import importlib
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("tiny", "base", "paper")
STAGES = ("stage1", "stage2", "stage3", "coldstart", "grpo")
VARIANTS = ("v1", "v2")
BENCHMARKS = ("rendered", "dfew", "mafw", "dfec", "emer", "youtube_faces", "held_out_qa")
PACKAGES = {
    "models": "Models",
    "data": "Data",
    "checkpoints": "Checkpoints",
    "training": "Training",
    "generation": "Generation",
    "rl": "Reinforcement",
}
CHOSEN = ("preset", "variant", "ablation", "stage", "benchmark")  # by the file and its arguments, so without a default
MARKER = re.compile(r"<!-- fields: (?P<kind>\w+) ?(?P<prefix>[\w.|]*) -->")

Defaults = dict[str, dict[tuple[str, ...], Any]]  # field -> place (stage and so on) -> default


def on_files(files, config):
    """Adds a page for each package of the core."""
    for package, title in PACKAGES.items():
        content = modules_page(package, title)
        files.append(File.generated(config, f"reference/modules/{package}.md", content=content))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Fills in the tables of config fields."""
    return MARKER.sub(lambda found: fields_table(found["kind"], found["prefix"]), markdown)


def modules_page(package: str, title: str) -> str:
    """The docstrings of a package's modules, one below the other."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "favchat_jax" / package).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    return "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)]) + "\n"


def stage_defaults(preset: str) -> Defaults:
    """Every field of the configs that `favchat_jax.train` takes, for one preset; places are (stage, variant)."""
    found: Defaults = {}
    for stage in STAGES:
        for variant in VARIANTS:
            config = _module(f"configs.{stage}").get_config(f"preset={preset},variant={variant}")
            for field, value in flat(config).items():
                if isinstance(value, str):  # default workdirs differ between variants in their name only
                    value = value.replace(f"-{variant}/", "-VARIANT/")
                found.setdefault(field, {})[stage, variant] = value
    return found


def benchmark_defaults() -> Defaults:
    """Every field of the configs that `favchat_jax.evaluate` takes; places are (benchmark,)."""
    found: Defaults = {}
    for name in BENCHMARKS:
        for field, value in flat(_module(f"configs.eval.{name}").get_config()).items():
            found.setdefault(field, {})[(name,)] = value
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a config by their dotted names."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        fields |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {f"{prefix}{name}": value}
    return fields


@functools.cache
def meanings(kind: str) -> dict[str, tuple[str, str]]:
    """Field -> (meaning, unit) of the `stages` or `benchmarks` table of fields.toml, checked against the configs."""
    written = tomllib.loads((ROOT / "docs/reference/fields.toml").read_text())[kind]
    tables = map(stage_defaults, PRESETS) if kind == "stages" else [benchmark_defaults()]
    existing = {field for table in tables for field in table}
    for problem, fields in (("no meaning", existing - written.keys()), ("no such field", written.keys() - existing)):
        if fields:
            raise PluginError(f"docs/reference/fields.toml, [{kind}]: {problem}: {', '.join(sorted(fields))}")
    return {field: (entry[0], entry[1]) for field, entry in written.items()}


def fields_table(kind: str, prefix: str) -> str:
    """A Markdown table of the fields whose names start with one of the `prefix`es, which a bar separates.

    An empty prefix selects the fields at the top level.
    """
    chosen = {
        field: entry
        for field, entry in meanings(kind).items()
        if (any(field.startswith(start) for start in prefix.split("|")) if prefix else "." not in field)
    }
    if not chosen:
        raise PluginError(f"no config field starts with {prefix!r}")
    columns = {p: stage_defaults(p) for p in PRESETS} if kind == "stages" else {"default": benchmark_defaults()}
    rows = [("field", "meaning", "unit", *columns)]
    for field, (meaning, unit) in chosen.items():
        defaults = (_cell({} if field in CHOSEN else table.get(field, {})) for table in columns.values())
        rows.append((f"`{field}`", meaning, unit, *defaults))
    lines = [" | ".join(row) for row in rows]
    return "\n".join([f"| {lines[0]} |", "|" + "---|" * len(rows[0]), *(f"| {line} |" for line in lines[1:])])


def _cell(defaults: Mapping[tuple[str, ...], Any]) -> str:
    """One default, or each default with the stages or benchmarks that have it."""
    places: dict[str, list[tuple[str, ...]]] = {}
    for place, value in defaults.items():
        places.setdefault(_written(value), []).append(place)
    if len(places) <= 1:
        return next(iter(places), "")
    common = max(places, key=lambda value: len(places[value])) if len(places) < len(defaults) else None
    special = [f"{_names(where)}: {value}" for value, where in places.items() if value != common]
    return "<br>".join(([f"{common}"] if common else []) + special)


def _names(places: Iterable[tuple[str, ...]]) -> str:
    """Stages or benchmarks; the variant too where only one of the two has the value."""
    by_name: dict[str, list[str]] = {}
    for name, *variant in places:
        by_name.setdefault(name, []).extend(variant)
    if set(by_name) == set(STAGES) and len({tuple(found) for found in by_name.values()}) == 1:
        return by_name[STAGES[0]][0]
    return ", ".join(f"{name} {found[0]}" if len(found) == 1 else name for name, found in by_name.items())


def _written(value: Any) -> str:
    if value == "":
        return "empty"
    if isinstance(value, str) and " " in value:
        return f"“{value}”"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _module(name: str):
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)
