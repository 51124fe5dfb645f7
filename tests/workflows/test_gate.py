"""Make targets of the workflows that need git: make check-workflows."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.toy import ROOT


@pytest.mark.parametrize("worse", ["", "model/pretrained", "model/pretrained_accurate"])
def test_every_model_that_both_commits_have_is_gated(worse: str, tmp_path: Path) -> None:
    """Whichever is worse. The python here fails for that one, and otherwise only records its arguments."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$3 $4" >>{tmp_path}/called\ntest "$3" != "{worse}"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / ".dev").touch()
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.com")
    for name in ("pretrained", "pretrained_accurate"):
        (tmp_path / "model" / name).mkdir(parents=True)
        (tmp_path / "model" / name / "card.json").write_text("{}")
    for command in (("init", "--quiet"), ("add", "model"), ("commit", "--quiet", "--message", "Models")):
        subprocess.run((*git, *command), cwd=tmp_path, check=True)
    (tmp_path / "model" / "pretrained_new").mkdir()
    command = ("make", "gate-shipped", "BASE=HEAD", f"VENV={tmp_path}", f"BIN={tmp_path}", "-o", f"{tmp_path}/.dev")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == (not worse), done.stderr
    assert (tmp_path / "called").read_text().splitlines() == [
        f"model/{name} runs/base/model/{name}" for name in ("pretrained", "pretrained_accurate")
    ]
