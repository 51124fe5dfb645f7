"""The audit log: complete, free of contents, bounded, and never an obstacle to requests."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests

from serving import access
from tests.live import LOG, encode, picture, python, serve

PNG = encode(picture())
LARGE = encode(picture(1, 400, 600), "BMP")
BROKEN = b"no image but a secret"
FIELDS = {"time", "request_id", "key", "client", "path", "status", "code", "model", "images"}


class Audited(NamedTuple):
    lines: dict[str, dict[str, Any]]
    """Keyed by request id."""
    replies: dict[str, requests.Response]
    files: list[Path]
    log: str
    key: str


@pytest.fixture(scope="module", params=["with keys", "without"])
def audited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """Everything that a server left behind after some requests."""
    home, replies = tmp_path_factory.mktemp("audited"), {}
    key = access.add(home / "keys.toml", "alice", images_per_day=1000, paths=[*access.GUARDED[:4]])
    asking = {"API_KEYS": home / "keys.toml"} if request.param == "with keys" else {}
    headers = {"X-API-Key": key, "X-Forwarded-For": "203.0.113.7"}
    with serve("embedded", home, AUDIT_DIRECTORY=home / "audit", **asking) as url:

        def call(name: str, method: str, path: str, **options: Any) -> None:
            sent = {**options.pop("headers", headers), "X-Request-ID": name}
            replies[name] = requests.request(method, url + path, headers=sent, timeout=60, **options)

        call("one", "POST", "/classify", files={"image": PNG})
        call("base64", "POST", "/classify", json={"image": base64.b64encode(PNG).decode()})
        call("batch", "POST", "/classify/batch", files=[("images", image) for image in (PNG, BROKEN, LARGE)])
        call("half", "POST", "/classify/batch", json={"images": [base64.b64encode(PNG).decode(), "!"]})
        call("explained", "POST", "/explain", files={"image": LARGE})
        call("broken", "POST", "/classify", files={"image": ("secret.png", BROKEN)})
        call("nonsense", "POST", "/classify?secret=1", files={"image": PNG})
        call("method", "DELETE", "/classify")
        call("card", "GET", "/model")
        call("unknown", "GET", "/model", headers={"X-API-Key": "a-secret"})
        call("no-address", "GET", "/model", headers={**headers, "X-Forwarded-For": 'no address", "key": "bob' * 99})
        call("forbidden", "GET", "/docs.json")
        call("ready", "GET", "/readyz")
        call("elsewhere", "GET", "/elsewhere")
        for number in range(50):  # shows that no line is lost when the server stops
            call(f"last-{number}", "POST", "/classify", files={"image": PNG})
    files = sorted((home / "audit").glob("*.jsonl*"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return Audited({line["request_id"]: line for line in lines}, replies, files, (home / LOG).read_text(), key)


def test_every_api_request_has_a_line_and_no_other_request_has(audited: Audited) -> None:
    assert set(audited.lines) == set(audited.replies) - {"ready", "elsewhere"}
    assert {file.name for file in audited.files} == {"audit-api-1.jsonl", "audit-api-2.jsonl"}
    assert sum(file.read_text().count("\n") for file in audited.files) == len(audited.lines)


def test_a_line_says_who_called_when_and_with_what_outcome(audited: Audited) -> None:
    asks_for_keys = audited.replies["unknown"].status_code == 401
    for name, line in audited.lines.items():
        reply = audited.replies[name]
        assert set(line) == FIELDS
        assert line["status"] == reply.status_code
        assert line["code"] == (None if reply.ok else reply.json()["error"]["code"])
        assert line["client"] == {"unknown": "127.0.0.1", "no-address": None}.get(name, "203.0.113.7")
        assert line["key"] == ("alice" if asks_for_keys and name != "unknown" else None)
        assert line["time"].endswith("+00:00")
        assert ":" in line["model"]
    assert audited.lines["batch"]["path"] == "/classify/batch"


def test_a_line_identifies_each_image_by_hash_and_verdict(audited: Audited) -> None:
    def entry(data: bytes, reply: dict[str, Any]) -> dict[str, Any]:
        verdict = (
            {"code": reply["error"]["code"]}
            if "error" in reply
            else {"class": reply["class_name"], "confidence": reply["confidence"]}
        )
        return {"sha256": hashlib.sha256(data).hexdigest(), **verdict}

    for name in ("one", "base64"):
        assert audited.lines[name]["images"] == [entry(PNG, audited.replies[name].json())]
    results = audited.replies["batch"].json()["results"]
    assert audited.lines["batch"]["images"] == [
        entry(data, result) for data, result in zip((PNG, BROKEN, LARGE), results, strict=True)
    ]
    half = audited.replies["half"].json()["results"][0]
    assert audited.lines["half"]["images"] == [entry(PNG, half), {"code": "invalid_request"}]  # no image, so no hash
    (explained,) = audited.lines["explained"]["images"]
    assert explained == {**audited.lines["batch"]["images"][2], "confidence": pytest.approx(explained["confidence"])}
    assert audited.lines["broken"]["images"] == [{"sha256": hashlib.sha256(BROKEN).hexdigest()}]
    for name in ("nonsense", "method", "card", "unknown", "forbidden"):
        assert audited.lines[name]["images"] == []


def test_neither_contents_nor_keys_are_logged(audited: Audited) -> None:
    written = audited.log + "".join(file.read_text() for file in audited.files)
    for secret in ("secret", audited.key, base64.b64encode(PNG).decode()[20:60], "\\x89PNG"):
        assert secret not in written


def test_the_files_rotate_and_their_number_is_bounded(tmp_path: Path) -> None:
    for start, count in (("first", 10), ("second", 1000)):  # a restart appends
        program = f"""
from pathlib import Path
from serving import audit
audit.ROTATE_BYTES, audit.ROTATE_FILES = 4000, 2
log = audit.Audit(Path({str(tmp_path)!r}), "api-1")
for number in range({count}):
    log.write(start={start!r}, number=number)
"""
        python(tmp_path, "-c", program)
        files = sorted(tmp_path.glob("audit-*"), reverse=True)
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        if start == "first":
            assert lines == [{"start": "first", "number": number} for number in range(10)]
    names = ["audit-api-1.jsonl.2", "audit-api-1.jsonl.1", "audit-api-1.jsonl"]
    assert [file.name for file in files] == names
    assert all(0 < file.stat().st_size <= 4000 for file in files)
    assert lines == [{"start": "second", "number": number} for number in range(1000 - len(lines), 1000)]


def test_replicas_that_share_a_folder_write_separate_files(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from serving.audit import Audit
for replica in [Audit(Path({str(tmp_path)!r}), "api-1") for _ in range(2)]:
    replica.write(replica=replica._lock.name)
"""
    for _ in range(2):  # a restart continues the same files
        python(tmp_path, "-c", program)
    lines = {file.name: file.read_text().splitlines() for file in tmp_path.glob("audit-*")}
    assert lines.keys() == {"audit-api-1.jsonl", "audit-api-1-2.jsonl"}
    assert [(len(written), len(set(written))) for written in lines.values()] == [(2, 1)] * 2


def test_a_full_disk_stops_nothing_and_is_logged_once(tmp_path: Path) -> None:
    (tmp_path / "audit-api-1.jsonl").symlink_to("/dev/full")
    program = f"""
from pathlib import Path
from serving.audit import Audit
log = Audit(Path({str(tmp_path)!r}), "api-1")
for number in range(1000):
    log.write(number=number)
"""
    said = python(tmp_path, "-c", program).stderr
    assert said.count("audit lines are lost") == 1
    assert "Traceback" not in said
