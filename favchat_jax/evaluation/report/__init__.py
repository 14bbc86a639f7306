"""Builds one report page from any number of results that `favchat_jax.evaluate`, `tools.ablate` and others wrote.

The page is a single HTML file that loads nothing and runs no script; Markdown and JSON files hold the same tables and
examples. Results of several models on one benchmark share a section, side by side as in Table 2.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from favchat_jax.errors import UserError, one_line
from favchat_jax.evaluation.report import sections
from favchat_jax.evaluation.report.clips import Clips
from favchat_jax.evaluation.report.examples import Frames

TITLE = "FaVChat evaluation"
TABLES = {
    "ablations": sections.of_ablations,
    "frame_length": sections.of_frame_lengths,
    "adapter_weights": sections.of_adapter_weights,
}


def read(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Reads results from JSON files.

    Raises:
        UserError: a file is missing, not JSON, or not a result of this package's commands.
    """
    return [_read(Path(path)) for path in paths]


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name JSON files that favchat_jax.evaluate wrote") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({one_line(error)}): create it again") from None
    known = isinstance(result, dict) and (result.get("table") in TABLES or "benchmark" in result)
    if not known:
        raise UserError(f"{path} is not a result: name a file written by favchat_jax.evaluate or a tool's --json")
    lacking = sections.NEEDED[result.get("table", "benchmark")] - result.keys()
    if lacking:
        raise UserError(f"{path} lacks {', '.join(sorted(lacking))}: create it again with this version")
    return result


def build(results: Sequence[Mapping[str, Any]], frames: Frames | None = None, examples: int = 9) -> dict[str, Any]:
    """Builds the page as plain data: title and sections.

    Args:
        results: results from `read`.
        frames: returns frames of a sample's clip, or None; by default frames are read from the data sets.
        examples: most samples in each list.
    """
    frames = frames or Clips()
    benchmarks: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if "benchmark" in result:
            benchmarks.setdefault(result["benchmark"], []).append(result)
    made = [_section(sections.of_benchmark, name, name, group, frames, examples) for name, group in benchmarks.items()]
    made += [_section(TABLES[result["table"]], result["table"], result) for result in results if "table" in result]
    for number, section in enumerate(made):
        section["anchor"] = f"part-{number + 1}"
    return {"title": TITLE, "sections": made}


def _section(make: Callable[..., dict[str, Any]], name: str, *arguments: Any) -> dict[str, Any]:
    """Makes a section; raises UserError for a malformed result, since files may come from anywhere."""
    try:
        return make(*arguments)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"a result of {name} is damaged ({reason}): create it again with this version") from error


def to_html(page: Mapping[str, Any]) -> str:
    """Formats the page as HTML; every text is escaped."""
    loader = jinja2.PackageLoader("favchat_jax.evaluation", "report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html").render(page)


def to_markdown(page: Mapping[str, Any]) -> str:
    """Formats the page's tables, confusion matrices and examples as Markdown."""
    lines = [f"# {_plain(page['title'])}", ""]
    for section in page["sections"]:
        lines += [f"## {_plain(section['title'])}", ""]
        lines += [line for text in (section["lead"], *section["warnings"]) if text for line in (_plain(text), "")]
        for table in section["tables"]:
            lines += [f"### {_plain(table['title'])}", ""] if table["title"] else []
            rows = [
                [f"{row['name']} ({row['tag']})" if row["tag"] else row["name"], *row["cells"]] for row in table["rows"]
            ]
            lines += [*_table(table["head"], rows), ""]
        for confusion in section["confusions"]:
            rows = [[row["label"], *(str(cell["count"]) for cell in row["cells"])] for row in confusion["rows"]]
            lines += [f"### Confusion matrix, {_plain(confusion['model'])}", ""]
            lines += [*_table(["expected", *confusion["columns"]], rows), ""]
        for shown in section["examples"]:
            models = [answer["model"] for answer in shown["cards"][0]["answers"]]
            rows = [
                [card["id"], card["question"], card["expected"], *(_said(answer) for answer in card["answers"])]
                for card in shown["cards"]
            ]
            lines += [
                f"### {_plain(shown['title'])}",
                "",
                *_table(["sample", "question", "expected", *models], rows, "---"),
                "",
            ]
        lines += [*(f"- {_plain(note)}" for note in section["notes"]), ""] if section["notes"] else []
    return "\n".join(lines).rstrip() + "\n"


def to_json(page: Mapping[str, Any]) -> str:
    """Formats the page's content as JSON, without its pictures."""

    def without_pictures(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {k: without_pictures(v) for k, v in part.items() if k not in ("frames", "charts", "bars", "anchor")}
        return [without_pictures(item) for item in part] if isinstance(part, list | tuple) else part

    return json.dumps(without_pictures(page), indent=1, ensure_ascii=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], right: str = "---:") -> list[str]:
    body = [[_cell(cell) for cell in row] for row in (head, *rows)]
    ruled = [body[0], ["---"] + [right] * (len(head) - 1), *body[1:]]
    return [f"| {' | '.join(row)} |" for row in ruled]


def _cell(cell: Any) -> str:
    if isinstance(cell, Mapping):
        return " ".join(filter(None, (cell["value"], cell["interval"])))
    return "" if cell is None else _plain(cell).replace("|", "\\|")


def _said(answer: Mapping[str, Any]) -> str:
    sign = {"right": "✓ ", "wrong": "✗ "}.get(answer["verdict"], "")
    return sign + answer["answer"]


def _plain(text: str) -> str:
    """Escapes a text to one line that Markdown and HTML show unchanged."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{character}" if character in "\\`*_[]#" else character for character in text)
