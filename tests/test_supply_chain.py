"""What is installed is what was locked, known vulnerabilities are reported, and nothing unpickles."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import requests

from deploy import audit, sbom
from tests.live import Server, family, processes
from tests.toy import ROOT

TODAY = date(2026, 11, 20)
FOUND = {"id": "PYSEC-1", "aliases": ["CVE-1", "GHSA-1"], "fix_versions": ["2"]}
LOCKED = ("requirements.txt", "requirements-serve.txt", "requirements-gpu.txt")


def report(*vulnerabilities: dict[str, Any]) -> dict[str, Any]:
    return {"dependencies": [{"name": "six", "version": "1", "vulns": list(vulnerabilities)}]}


@pytest.mark.parametrize("name", LOCKED)
def test_every_requirement_is_pinned_with_hashes_and_names_no_host(name: str) -> None:
    text = (ROOT / name).read_text()
    entries = re.findall(r"^(?!#)\S.*(?:\n .*)*", text, re.MULTILINE)
    assert len(entries) > 50
    for entry in entries:
        assert re.match(r"[\w.-]+(\[[\w,-]+\])?==[\w.+!]+ \\\n {4}--hash=sha256:[0-9a-f]{64}", entry), entry
    assert "://" not in text
    assert "--index" not in text


def test_images_contain_nothing_that_the_audit_does_not_see() -> None:
    pins = [set(re.findall(r"^[\w.-]+==\S+", (ROOT / name).read_text(), re.MULTILINE)) for name in LOCKED]
    assert pins[1] <= pins[2] <= pins[0]


def test_an_altered_package_is_not_installed(tmp_path: Path) -> None:
    """By pip and by uv, which builds the image. The file is refused only because of its hash."""
    with zipfile.ZipFile(tmp_path / "probe-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
        wheel.writestr("probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("probe-1.0.dist-info/RECORD", "")
    file = tmp_path / "requirements.txt"
    file.write_text(f"probe==1.0 --hash=sha256:{'0' * 64}\nprobe==1.0\n")  # BentoML repeats itself without a hash
    offline = ("--no-index", "--find-links", tmp_path, "--target", tmp_path / "out", "--requirement", file)
    for installer in (("-m", "uv", "pip"), ("-m", "pip")):
        done = subprocess.run((sys.executable, *installer, "install", *offline), capture_output=True, text=True)
        assert done.returncode
        assert "hash" in done.stderr.lower(), done.stderr


def test_a_vulnerability_fails_the_audit_until_it_is_excused() -> None:
    (line,) = audit.objections(report(FOUND), {}, TODAY)
    assert line == "six 1: CVE-1/GHSA-1/PYSEC-1, fixed in 2"
    assert list(audit.objections(report(), {}, TODAY)) == []
    assert list(audit.objections(report(FOUND), {"GHSA-1": date(2026, 11, 21)}, TODAY)) == []
    assert list(audit.objections(report(FOUND), {"GHSA-2": date(2026, 11, 21)}, TODAY)) == [line]


def test_an_excuse_expires_and_needs_a_reason(tmp_path: Path) -> None:
    assert list(audit.objections(report(FOUND), {"CVE-1": TODAY}, TODAY))
    file = tmp_path / "audit.toml"
    file.write_text('[[excused]]\nid = "CVE-1"\nreason = "unused"\nexpires = 2027-01-31\n')
    assert audit.excuses(file) == {"CVE-1": date(2027, 1, 31)}
    file.write_text('[[excused]]\nid = "CVE-1"\nexpires = 2027-01-31\n')
    with pytest.raises(KeyError):
        audit.excuses(file)
    audit.excuses(audit.EXCUSES)


def test_the_image_scan_uses_the_same_excuses(tmp_path: Path) -> None:
    assert audit.options({"CVE-1": date(2026, 11, 21), "CVE-2": TODAY}, TODAY) == ["--ignore-vuln", "CVE-1"]
    for name, script in {
        "docker": "exit 0",
        "debsecan": "exit 0",
        "python": 'test "$*" = "-m deploy.audit --options" && echo --ignore-vuln CVE-1',
        "pip-audit": f'printf "%s\\n" "$@" >{tmp_path}/asked',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(("sh", ROOT / "deploy/scan.sh", "classifier:cpu", tmp_path), env=environment, check=True)
    assert (tmp_path / "asked").read_text().split()[-2:] == ["--ignore-vuln", "CVE-1"]


def test_a_failed_audit_does_not_pass(tmp_path: Path) -> None:
    unknown = {"dependencies": [{"name": "six", "skip_reason": "six was not found"}]}
    with pytest.raises(audit.NoVerdictError, match="1 of 1 packages: six was not found"):
        list(audit.objections(unknown, {}, TODAY))
    with pytest.raises(audit.NoVerdictError, match="hash"):
        audit.ask(_written(tmp_path / "requirements.txt", "six==1.17.0\n"))


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_the_parts_list_contains_packages_and_models() -> None:
    done = subprocess.run([sys.executable, "-c", sbom.INVENTORY], capture_output=True, text=True, check=True)
    inventory = json.loads(done.stdout)
    inventory["models"] = {"toy 1234": {"config.json": "0" * 64}}
    parts = json.loads(sbom.document("classifier:cpu", inventory))["components"]
    urls = {part.get("purl") for part in parts}
    version = next(version for name, version in inventory["python"] if name == "bentoml")
    assert f"pkg:pypi/bentoml@{version}" in urls
    (model,) = [part for part in parts if part["type"] == "machine-learning-model"]
    assert (model["name"], model["components"][0]["hashes"][0]["content"]) == ("toy", "0" * 64)


# --- no pickle ---

UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def test_no_serving_module_of_ours_imports_pickle() -> None:
    files = [
        ROOT / "service.py",
        ROOT / "settings.py",
        *(ROOT / "serving").glob("*.py"),
        *(ROOT / "model").glob("*.py"),
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & UNSAFE, file
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is (node.arg == "weights_only"), file


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


@pytest.mark.parametrize("path", ["/classify", "/classify/batch", "/explain", "/infer"])
def test_a_pickle_from_outside_is_refused_without_unpickling(server: Server, path: str, tmp_path: Path) -> None:
    import pickle

    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    for content_type in ("application/vnd.bentoml+pickle", "application/json", "image/jpeg"):
        headers = {"Content-Type": content_type, "Payload-Meta": "{}"}
        reply = requests.post(f"{server.url}{path}", trap, headers=headers, timeout=60)
        assert 400 <= reply.status_code < 500, reply.text
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists(), "the trap itself works"


def test_the_runner_listens_where_no_other_user_can_connect(runner: Server) -> None:
    """It trusts what its workers send: they run as the same user, who owns the folder of their socket."""
    inodes = {
        link.readlink().name.removeprefix("socket:[").rstrip("]")
        for pid in processes(runner.home)
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if _is_socket(link)
    }
    listening = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    paths = {Path(entry[7]) for entry in listening if len(entry) > 7 and entry[6] in inodes and entry[7][0] == "/"}
    assert any(path.name.endswith(".sock") for path in paths)
    for path in paths:
        assert path.parent.stat().st_mode & 0o077 == 0, path


def test_no_process_listens_on_any_other_port(server: Server) -> None:
    """BentoML's supervisor would listen on two more, through which any local user could control it."""
    inodes = {str(link.readlink()) for pid in family(processes(server.home)[0]) for link in _descriptors(pid)}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ports = {int(row[1].partition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}
    assert ports == {int(server.url.rpartition(":")[2])}


def _descriptors(pid: int) -> list[Path]:
    return [link for link in Path(f"/proc/{pid}/fd").iterdir() if _is_socket(link)]


def _is_socket(link: Path) -> bool:
    try:
        return str(link.readlink()).startswith("socket:")
    except FileNotFoundError:
        return False
