"""The workflows call make and nothing else, with the least rights. `make check-workflows` validates the rest."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import yaml

from tests.toy import ROOT

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
TARGETS = set(re.findall(r"^([a-z0-9-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
ON = True
"""YAML 1.1 reads the key `on` as a boolean."""
ONLY_WHEN_PUSHED = "github.event_name == 'push'"
"""Condition of a job that no pull request starts."""
every_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


@every_workflow
def test_steps_run_make_targets_that_exist(name: str) -> None:
    for command in (step["run"] for step in steps(name) if "run" in step):
        make, *words = shlex.split(command)
        targets = {word for word in words if "=" not in word}
        assert make == "make", command
        assert targets, command
        assert targets <= TARGETS, command
        assert "${{" not in command, "an expression is text that others may write; pass it in `env`"


@every_workflow
def test_rights_are_given_job_by_job(name: str) -> None:
    assert WORKFLOWS[name]["permissions"] == {}
    for job in WORKFLOWS[name]["jobs"].values():
        assert job["permissions"]
        assert job["timeout-minutes"]


@every_workflow
def test_actions_are_pinned_and_leave_no_credentials(name: str) -> None:
    text = (ROOT / f".github/workflows/{name}.yml").read_text()
    for line in re.findall(r"uses: (.*)", text):
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    for step in steps(name):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_one_action_has_one_version() -> None:
    used = {step["uses"] for name in WORKFLOWS for step in steps(name) if "uses" in step}
    assert len(used) == len({reference.partition("@")[0] for reference in used})


@every_workflow
def test_pull_requests_see_no_secrets_and_write_nothing(name: str) -> None:
    if "pull_request" in WORKFLOWS[name][ON]:
        assert "secrets." not in (ROOT / f".github/workflows/{name}.yml").read_text()
        jobs = [job for job in WORKFLOWS[name]["jobs"].values() if job.get("if") != ONLY_WHEN_PUSHED]
        assert jobs
        assert all(set(job["permissions"].values()) == {"read"} for job in jobs)
    assert "pull_request_target" not in WORKFLOWS[name][ON]
