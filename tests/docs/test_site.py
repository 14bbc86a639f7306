"""The documentation site builds without a warning, its links lead somewhere, and it reads without the network."""

import html
import importlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT

MISSING = "the site's packages are not installed: pip install -e '.[docs]'"
for module in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(module, reason=MISSING)


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what a browser loads to show it."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sorts a tag's attributes."""
        given = dict(attrs)
        if given.get("id"):
            self.anchors.add(given["id"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") != "canonical":
            self.loaded.append(given.get("href") or "")
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    """Every page of the site by its file."""
    found = {path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(found) > 20
    return found


def test_every_internal_link_and_anchor_leads_somewhere(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target = target / "index.html"
            if not target.exists():
                broken.append(f"{path.name}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.name}: {link} (no such anchor)")
    assert not broken


def test_a_page_loads_nothing_from_the_network(site, pages):
    loaded = [(path.name, source) for path, page in pages.items() for source in page.loaded]
    assert loaded
    assert [(name, source) for name, source in loaded if urlsplit(source).netloc] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style.name


def test_every_config_field_is_in_the_reference(site):
    page = html.unescape((site / "reference/config.html").read_text())
    documented = set(re.findall(r"<td><code>([\w.]+)</code></td>", page))
    existing = set()
    for stage in ("stage1", "stage2", "stage3", "coldstart", "grpo"):
        for preset in ("tiny", "base", "paper"):
            existing |= fields(importlib.import_module(f"configs.{stage}").get_config(f"preset={preset}"))
    for file in (ROOT / "configs/eval").glob("*.py"):
        if file.stem not in ("__init__", "common"):
            existing |= fields(importlib.import_module(f"configs.eval.{file.stem}").get_config())
    assert {"model.umt.width", "rl.pool.tau_keep", "judge.model"} <= existing
    assert existing - documented == set()


def test_the_public_functions_are_in_the_reference(site):
    import favchat_jax

    page = Page((site / "reference/api.html").read_text())
    assert {f"favchat_jax.{name}" for name in favchat_jax.__all__ if not name.startswith("__")} <= page.anchors


def fields(config, prefix: str = "") -> set[str]:
    """Dotted names of a config's leaves."""
    found: set[str] = set()
    for name, value in config.items():
        found |= fields(value, f"{prefix}{name}.") if hasattr(value, "items") else {f"{prefix}{name}"}
    return found
