"""MkDocs hooks that add generated and included content to the pages of this folder: see mkdocs.yml.

In a page, ``<!-- generate: NAME -->`` is replaced by the output of that function in ``GENERATORS``, and
``<!-- include: FILE -->`` by a file of the repository, so that nothing has to be written or kept twice.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import relpath
from typing import Any

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RUNBOOKS = ROOT / "monitoring/runbooks"
UNMEASURED = {
    "benchmarks.md": """# Benchmarks

Nothing has been measured in this checkout yet. `make bench` measures the service and its peers on your machine in about
25 minutes and writes this page. [Capacity](operations/capacity.md) explains how to use the figures.
""",
    "capacity.md": """# Replicas and cost

Nothing has been measured in this checkout yet. After `make bench`, `make capacity` writes this page: the replicas
needed for a rate of images, and their cost. [Capacity](operations/capacity.md) describes the bottlenecks.
""",
}
"""Placeholders for pages that a measurement writes."""
ELSEWHERE = {
    "CHANGELOG.md": "upgrade.md",
    "SECURITY.md": "security.md",
    "deploy/k8s/README.md": "operations/kubernetes.md",
}
"""Files outside ``docs`` to the pages of the site that include them."""
GENERATORS = {
    "api": reference.api,
    "settings": reference.settings,
    "alerts": reference.alerts,
    "objectives": reference.objectives,
}
DIRECTIVE = re.compile(r"^<!-- (generate|include): (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    config.nav = _expand(config.nav)


def _expand(nav: Any) -> Any:
    """``nav`` with every ``folder/*`` replaced by the pages of that folder."""
    if isinstance(nav, dict):
        return {title: _expand(entry) for title, entry in nav.items()}
    if isinstance(nav, list):
        return [page for entry in nav for page in (_pages(entry) if str(entry).endswith("/*") else [_expand(entry)])]
    return nav


def _pages(pattern: str) -> list[str]:
    folder = pattern.removesuffix("/*")
    source = RUNBOOKS if folder == "runbooks" else ROOT / "docs" / folder
    return [f"{folder}/{path.name}" for path in sorted(source.glob("*.md")) if path.stem != "index"]


def on_files(files: Files, config: MkDocsConfig) -> None:
    for path in RUNBOOKS.glob("*.md"):
        files.append(File.generated(config, f"runbooks/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "reference/openapi.json", content=reference.openapi()))
    for name, page in UNMEASURED.items():
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=page))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def replace(directive: re.Match[str]) -> str:
        kind, name = directive.groups()
        return GENERATORS[name]() if kind == "generate" else _include(name, page.file.src_uri)

    return DIRECTIVE.sub(replace, markdown)


def _include(name: str, page: str) -> str:
    """A file of the repository without its title and with its links relative to ``page``; empty if it is missing."""
    if not (ROOT / name).exists():
        return ""
    text = re.sub(r"\A# .*\n+", "", (ROOT / name).read_text())
    return LINK.sub(lambda link: _relink(link, name, page), text)


def _relink(link: re.Match[str], name: str, page: str) -> str:
    """Point a link to a file that is a page of the site at that page; reduce any other link to its text."""
    text, target, anchor = link.groups()
    path = relpath(f"/{Path(name).parent}/{target}", "/")
    inside = ELSEWHERE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    if path.startswith("monitoring/runbooks"):
        inside = path.removeprefix("monitoring/") if path.endswith(".md") else "operations/runbooks.md"
    return f"[{text}]({relpath(inside, str(Path(page).parent))}{anchor or ''})" if inside else text
