"""The workflows only call make, with minimal permissions. `make check-workflows` validates the rest."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.toy import ROOT

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
TARGETS = set(re.findall(r"^([a-z0-9-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
ON = True
"""YAML 1.1 reads the key `on` as a boolean."""
ONLY_WHEN_PUSHED = "github.event_name == 'push'"
"""Condition of a job that pull requests do not run."""
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
def test_permissions_are_granted_per_job(name: str) -> None:
    assert WORKFLOWS[name]["permissions"] == {}
    for job in WORKFLOWS[name]["jobs"].values():
        assert job["permissions"]
        assert job["timeout-minutes"]


@every_workflow
def test_actions_are_pinned_and_keep_no_credentials(name: str) -> None:
    text = (ROOT / f".github/workflows/{name}.yml").read_text()
    for line in re.findall(r"uses: (.*)", text):
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    for step in steps(name):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_a_retrained_model_uses_the_shipped_models_recipe_and_measurements() -> None:
    """The default recipe uses no corrupted images: the gate would stop such a model every month."""
    commands = {words[1]: words for step in steps("retrain") if (words := shlex.split(step.get("run", "")))}
    assert list(commands).index("robustness") < list(commands).index("gate")
    assert commands["train"] == ["make", "train", "TRAIN_FLAGS=--start model/pretrained --like model/pretrained"]


def test_a_change_to_any_shipped_model_is_gated() -> None:
    runs = [step.get("run", "") for step in steps("model")]
    assert [run.split(" SUMMARY")[0] for run in runs if "gate" in run] == ["make gate-shipped BASE=origin/main"]


@every_workflow
def test_jobs_that_query_a_registry_log_in_first(name: str) -> None:
    """A private package shows neither signature nor image to others."""
    for job in WORKFLOWS[name]["jobs"].values():
        asks = [i for i, step in enumerate(job["steps"]) if re.match(r"make (verify|push|scan)\b", step.get("run", ""))]
        logins = [i for i, step in enumerate(job["steps"]) if step.get("uses", "").startswith("docker/login-action@")]
        if asks:
            assert logins[0] < asks[0]
            assert job["permissions"]["packages"] in ("read", "write")


def make(target: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a target with programs that only record their arguments in ``folder``, word by word, and print ANSWER.

    All of them succeed except the command FAILS.
    """
    for program in ("cosign", "docker", "gh"):
        (folder / program).write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" >>{folder}/called\nprintf %s "$ANSWER"\n[ "$1" != "$FAILS" ]\n'
        )
        (folder / program).chmod(0o755)
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "OUTPUT": str(folder / "output")}
    command = ("make", "--no-print-directory", target)
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **paths, **environment}, capture_output=True, text=True, timeout=60
    )


IMAGE = "registry.example.com:5000/team/classifier@sha256:" + "0123456789abcdef" * 4


def test_an_image_is_verified_by_digest_and_signer(tmp_path: Path) -> None:
    done = make("verify", tmp_path, IMAGE=IMAGE, SIGNER="https://github.com/someone/classifier")
    assert done.returncode == 0, done.stderr
    verify, image, option, signer, *_ = (tmp_path / "called").read_text().splitlines()
    assert (verify, image, option) == ("verify", IMAGE, "--certificate-identity-regexp")
    assert signer == r"^https://github.com/someone/classifier/\.github/workflows/release\.yml@refs/tags/v"


@pytest.mark.parametrize("target", ["verify", "k8s-pin"])
@pytest.mark.parametrize("image", ["", "classifier:latest", f"-{IMAGE}", f"{IMAGE}\n--key=mine", f"{IMAGE};id"])
def test_anything_but_a_digest_is_refused(target: str, image: str, tmp_path: Path) -> None:
    done = make(target, tmp_path, IMAGE=image, SIGNER="https://github.com/someone/classifier")
    assert done.returncode
    assert "error: IMAGE=" in done.stderr
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(("target", "name"), [("push", "IMAGE"), ("sign", "IMAGE"), ("notes", "TAG")])
def test_inputs_of_a_workflow_are_never_executed(target: str, name: str, tmp_path: Path) -> None:
    touch = f"touch {tmp_path}/ran"
    text = f"x; {touch}; `{touch}` $({touch}) $(shell {touch}) '"
    make(target, tmp_path, **{name: text})
    assert text in (tmp_path / "called").read_text().splitlines()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("open_issue", "told"), [("", ["create", "--title"]), ("12", ["comment", "12"])], ids=["none", "one"]
)
def test_an_alarm_opens_an_issue_and_later_ones_comment_on_it(open_issue: str, told: list[str], tmp_path: Path) -> None:
    run = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "a/b", "GITHUB_RUN_ID": "7"}
    done = make("alarm", tmp_path, ANSWER=open_issue, **run)
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert called[:4] == ["issue", "list", "--app", "github-actions"]  # anybody could open an issue with that title
    second = called.index("issue", 1)
    assert called[second + 1 : second + 3] == told
    assert called[-1].endswith(" unsafe: https://github.com/a/b/actions/runs/7")


def test_before_the_first_release_nothing_is_scanned_and_no_alarm_raised(tmp_path: Path) -> None:
    image = [step for step in steps("rescan") if "registry" in step.get("with", {}) or step.get("run") == "make scan"]
    assert [step.get("if") for step in image] == ["${{ steps.release.outputs.tag }}"] * 2
    done = make("newest", tmp_path, ANSWER="")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output").read_text() == ""
    assert (tmp_path / "called").read_text().splitlines()[:2] == ["release", "list"]  # `view` fails if there is none


def test_a_digest_is_reported_only_for_a_pushed_image(tmp_path: Path) -> None:
    done = make("push", tmp_path, IMAGE="classifier:1", ANSWER=IMAGE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output").read_text() == f"digest={IMAGE.partition('@')[2]}\n"
    failing = tmp_path / "failing"
    failing.mkdir()
    done = make("push", failing, IMAGE="classifier:1", FAILS="inspect")
    assert done.returncode
    assert not (failing / "output").exists()


def test_a_failing_scan_opens_an_issue() -> None:
    """GitHub itself only mails whoever last changed the schedule."""
    *scans, alarm = WORKFLOWS["rescan"]["jobs"]
    job = WORKFLOWS["rescan"]["jobs"][alarm]
    assert job["needs"] == scans
    assert job["if"] == "${{ !success() }}"
    assert job["permissions"] == {"contents": "read", "issues": "write"}
    assert job["steps"][-1]["run"] == "make alarm"
    assert job["steps"][-1]["env"] == {"GH_TOKEN": "${{ github.token }}"}


@every_workflow
def test_jobs_without_their_own_python_use_the_runners(name: str) -> None:
    for job in WORKFLOWS[name]["jobs"].values():
        if not any(step.get("uses", "").startswith("actions/setup-python@") for step in job["steps"]):
            for command in (shlex.split(step["run"]) for step in job["steps"] if "run" in step):
                dry = subprocess.run((*command, "--dry-run"), cwd=ROOT, capture_output=True, text=True, check=True)
                assert not re.search(r"python3\.11|\.venv", dry.stdout), command


def test_every_use_of_an_action_has_the_same_version() -> None:
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
