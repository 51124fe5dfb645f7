"""The examples of the documentation, run as a reader would: in a copy of the checkout, in order, page by page.

Every fenced block of ``console``, ``python``, ``javascript`` or ``go`` is run. In a console, lines after ``$ `` are
commands, and the lines that follow are their output; a program's output is the ``text`` block after it. ``…`` matches
anything. ``<!-- not run: WHY -->`` before a block leaves it to ``named_in``; ``<!-- file: NAME -->`` only saves it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import pytest
import requests

from tests.live import REPOSITORY, environment, free_port, running

DOCS = REPOSITORY / "docs"
GENERATED = ("benchmarks.md", "without-vnni/benchmarks.md", "capacity.md", "model-card.md")
"""Written by commands; the commands they quote belong to another machine."""
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).as_posix() not in GENERATED)
PYTHON = ("console", "python")
"""Languages that need only the virtual environment."""
OTHERS = ("javascript", "go")
PROGRAMS = {
    "python": ("example.py", [sys.executable]),
    "javascript": ("example.mjs", ["node"]),
    "go": ("example.go", ["go", "run"]),
}
PUBLISHED = "http://localhost:3000"
"""The address of the service on the pages."""
SECONDS = 600
EXAMPLE = "cifar10_cnn"
"""The model whose pictures and verdicts the pages describe. If another is shipped, those pages remain the bundle's
manual, but cannot be followed to the letter."""
SHIPPED = json.loads((REPOSITORY / "model/pretrained/config.json").read_text())["name"]
of_the_example = pytest.mark.skipif(SHIPPED != EXAMPLE, reason=f"its bound is that of {EXAMPLE}")
"""For tests of speed, of evidence maps that a network of a few epochs misses, and of what few images allow."""
_FENCE = re.compile(
    r"(?:^<!-- (not run|file): (.+?) -->\n)?^```(\w+)\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.M | re.S
)
_COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n?((?:(?!\$ ).*\n?)*)", re.M)
_SERVE = re.compile(r"^((?:\w+=\S+ )*)make serve$")


class Snippet(NamedTuple):
    """One block of a page; ``output`` is what a program prints."""

    page: Path
    line: int
    language: str
    text: str
    output: str
    directive: str
    argument: str

    @property
    def is_run(self) -> bool:
        return self.directive != "not run" and self.language in PYTHON + OTHERS

    def commands(self) -> list[tuple[str, str]]:
        """Each command with its expected output."""
        return _COMMAND.findall(self.text) if self.language == "console" else []


def read(page: Path) -> Iterator[Snippet]:
    content = page.read_text()
    for match in _FENCE.finditer(content):
        directive, argument, language, text, output = (group or "" for group in match.groups())
        line = content.count("\n", 0, match.start(3)) + 1
        yield Snippet(page, line, language, text, output, directive, argument)


def to_follow(page: Path) -> list[Snippet]:
    """The blocks that a reader with a shell and Python runs."""
    return [snippet for snippet in read(page) if snippet.is_run and snippet.language in PYTHON]


def needs_curl(page: Path) -> bool:
    """Whether to follow the page takes curl, which ``make test`` does not expect on a machine: make check-docs."""
    return any(re.search(r"\bcurl ", command) for snippet in to_follow(page) for command, _ in snippet.commands())


def tells_of_the_example(page: Path) -> bool:
    return re.search(f"tests/images/|{EXAMPLE}", page.read_text()) is not None


def can_be_followed(page: Path) -> bool:
    return SHIPPED == EXAMPLE or not tells_of_the_example(page)


def matches(expected: str, found: str) -> bool:
    """Whether ``found`` equals ``expected``, where ``…`` matches anything and trailing white space is ignored."""
    pattern = ".*?".join(
        re.escape(part) for part in "\n".join(map(str.rstrip, expected.strip().splitlines())).split("…")
    )
    return re.fullmatch(pattern, "\n".join(map(str.rstrip, found.strip().splitlines())), re.DOTALL) is not None


def named_in(snippet: Snippet) -> Iterator[tuple[str, str]]:
    """The make targets and Python modules that the commands of a block name."""
    for line, _ in snippet.commands():
        command = re.sub(r"\s+#.*", "", line)
        if make := re.search(r"(?:^|&& |[A-Z_]+=\S+ )make ([^&|]*)", command):
            yield from (
                ("target", word) for word in re.findall(r"(?<!\S)([a-z0-9-]+)(?!\S)", re.sub(r'"[^"]*"', "", make[1]))
            )
        yield from (("module", module) for module in re.findall(r"-m ([a-z_.]+)", command))


def follow(snippets: Iterable[Snippet], folder: Path) -> None:
    """Run blocks of a page in order, in a copy of the checkout in ``folder``."""
    with Reader(folder) as reader:
        for snippet in snippets:
            reader.follow(snippet)


class Reader:
    """Does what a page says. The server is the one that the page started last."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._servers, self._url = folder / "checkout", ExitStack(), ""
        made_here = (".git", ".venv*", ".bentoml", ".*_cache", "__pycache__", "data", "runs", "secrets", "site")
        shutil.copytree(REPOSITORY, self._folder, ignore=shutil.ignore_patterns(*made_here))
        (self._folder / ".venv").symlink_to(sys.prefix)
        for requirements in self._folder.glob("requirements*.txt"):
            os.utime(requirements, (0, 0))  # the environment exists: make has nothing to install
        self._environment = environment(self._folder / ".bentoml", WORKERS=1, OMP_NUM_THREADS=1)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._servers.close()

    def serve(self, settings: str = "") -> None:
        """Start a server as ``make serve`` does, replacing the previous one."""
        self._servers.close()
        port = free_port()
        self._url = f"http://localhost:{port}"
        command = f"cd '{self._folder}' && exec env {settings} make serve PORT={port}"
        log = self._folder.parent / "server.log"
        self._servers.enter_context(running(["bash", "-c", command], self._environment, log, self._is_ready))

    def _is_ready(self) -> bool:
        return requests.get(f"{self._url}/readyz", timeout=20).status_code == HTTPStatus.OK

    def _here(self, text: str) -> str:
        """``text`` with the address of the server; starts one if the page takes it for granted."""
        if PUBLISHED in text and not self._url:
            self.serve()
        return text.replace(PUBLISHED, self._url)

    def follow(self, snippet: Snippet) -> None:
        """Run a block and compare its output with the page."""
        where = f"{snippet.page.relative_to(DOCS)}:{snippet.line}"
        if snippet.directive == "file":
            (self._folder / snippet.argument).write_text(snippet.text)
        elif snippet.language == "console":
            for command, expected in snippet.commands():
                if serve := _SERVE.match(command):
                    self.serve(serve[1])
                else:
                    self._run(["bash", "-c", self._here(command)], expected, where)
        else:
            name, program = PROGRAMS[snippet.language]
            (self._folder / name).write_text(self._here(snippet.text))
            self._run([*program, name], snippet.output, where)

    def _run(self, argv: list[str], expected: str, where: str) -> None:
        done = subprocess.run(
            argv,
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{where}: {argv[-1]!r} ended with {done.returncode}:\n{done.stdout}"
        if expected.strip():
            assert matches(expected, done.stdout), f"{where}: {argv[-1]!r} printed\n{done.stdout}\nand not\n{expected}"
