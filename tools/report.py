"""Writes one HTML page about any number of results, and the same as Markdown and JSON.

python -m tools.report --results=rendered.json,ablations.json,frames.json,weights.json --out=report.html

Results come from `favchat_jax.evaluate`, `tools.ablate`, `tools.frame_length` and `tools.adapter_weights`. Results of
several models on one benchmark appear side by side. The page shows frames if the evaluated clips still exist.
"""

from pathlib import Path

from absl import flags

from favchat_jax import command_line
from favchat_jax.errors import UserError
from favchat_jax.evaluation import report
from favchat_jax.files import replace_file


def main() -> None:
    """Writes the page, and its Markdown and JSON."""
    if not _RESULTS.value or not _OUT.value:
        raise UserError("needed: --results=FILE.json,FILE.json --out=FILE.html")
    out = Path(_OUT.value)
    if out.suffix != ".html":
        raise UserError(f"--out={out}: name a file that ends in .html; .md and .json are written beside it")
    beside = {suffix: out.with_suffix(suffix) for suffix in (".html", ".md", ".json")}
    for path in beside.values():
        command_line.check_output("--out", str(path))
        if path.absolute() in [Path(result).absolute() for result in _RESULTS.value]:
            raise UserError(f"--out={out} would replace the result {path}: choose another name")
    page = report.build(report.read(_RESULTS.value), examples=_EXAMPLES.value)
    for suffix, to_text in ((".html", report.to_html), (".md", report.to_markdown), (".json", report.to_json)):
        replace_file(beside[suffix], to_text(page))
    print(*beside.values(), sep="\n")


if __name__ == "__main__":
    _RESULTS = flags.DEFINE_list("results", None, "JSON files of evaluations and tables")
    _OUT = flags.DEFINE_string("out", None, "HTML file to write")
    _EXAMPLES = flags.DEFINE_integer("examples", 9, "Number of samples in each list", lower_bound=0)
    command_line.start(main)
