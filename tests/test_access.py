"""API keys, their limits and their file, on the real server with two workers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from PIL import Image
from starlette.datastructures import Headers

from serving import access
from serving.access import Key
from serving.errors import ApiError
from serving.keys import Keys, authorize
from tests import toy
from tests.live import LOG, assert_error, encode, failed_start, picture, samples, serve, total

IMAGE = encode(picture())
OPEN = ("/livez", "/healthz", "/readyz", "/metrics")
LIMITS: dict[str, dict[str, Any]] = {
    "free": {},
    "other": {},
    "expired": {"expires": "2020-01-01"},
    "card": {"paths": ["/model", "/docs.json"]},
    "slow": {"images_per_second": 0.05},
    "frugal": {"images_per_day": 20},
}


class Guarded(NamedTuple):
    """A server that requires keys, the file they are in, and each key by its name."""

    url: str
    home: Path
    file: Path
    keys: dict[str, str]


def write_keys(file: Path) -> dict[str, str]:
    return {name: access.add(file, name, **limits) for name, limits in LIMITS.items()}


@pytest.fixture(scope="module", params=["embedded", "runner"])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    home = tmp_path_factory.mktemp("guarded")
    keys = write_keys(home / "keys.toml")
    with serve(request.param, home, API_KEYS=home / "keys.toml", AUDIT_DIRECTORY=home / "audit") as url:
        yield Guarded(url, home, home / "keys.toml", keys)


def call(url: str, path: str = "/classify", key: str | None = None, images: int = 1) -> requests.Response:
    """One request in the form its endpoint expects, on a new connection, which either worker may accept."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if path not in ("/classify", "/classify/batch", "/explain"):
        return requests.get(url + path, headers=headers, timeout=60)
    field = "images" if path == "/classify/batch" else "image"
    return requests.post(url + path, files=[(field, IMAGE)] * images, headers=headers, timeout=60)


@pytest.mark.parametrize("path", access.GUARDED)
def test_the_api_requires_a_key(guarded: Guarded, path: str) -> None:
    for wrong in (None, "unknown", guarded.keys["free"][:-1], "free", access.sha256(guarded.keys["free"])):
        response = call(guarded.url, path, wrong)
        assert_error(response, 401, "unauthorized")
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert call(guarded.url, path, guarded.keys["free"]).status_code == 200
    assert call(guarded.url, path, guarded.keys["other"]).status_code == 200


def test_a_key_may_come_in_either_header(guarded: Guarded) -> None:
    key = guarded.keys["free"]
    for headers in ({"Authorization": f"Bearer {key}"}, {"authorization": f"bearer {key}"}, {"X-API-Key": key}):
        assert requests.get(f"{guarded.url}/model", headers=headers, timeout=60).status_code == 200
    for headers in ({"Authorization": key}, {"Authorization": f"Basic {key}"}, {"X-API-Key": f"Bearer {key}"}):
        assert_error(requests.get(f"{guarded.url}/model", headers=headers, timeout=60), 401, "unauthorized")
    assert call(f"{guarded.url}/model?key={key}").status_code == 401


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_metrics_need_no_key(guarded: Guarded, path: str) -> None:
    assert call(guarded.url, path).status_code == 200


def test_an_unknown_path_is_404_without_a_key(guarded: Guarded) -> None:
    assert_error(requests.get(f"{guarded.url}/nowhere", timeout=60), 404, "not_found")


def test_an_expired_key_or_a_path_not_granted_is_forbidden(guarded: Guarded) -> None:
    response = call(guarded.url, key=guarded.keys["expired"])
    assert_error(response, 403, "forbidden")
    assert "2020-01-01" in response.json()["error"]["message"]
    assert call(guarded.url, "/model", guarded.keys["card"]).status_code == 200
    assert_error(call(guarded.url, key=guarded.keys["card"]), 403, "forbidden")


def lines(guarded: Guarded, name: str) -> list[int]:
    """Lines about the key called ``name`` in each worker's audit log."""
    return [path.read_text().count(f'"{name}"') for path in sorted((guarded.home / "audit").glob("*.jsonl"))]


def connections_to_both_workers(guarded: Guarded, each: int) -> list[requests.Session]:
    """``each`` connections to each worker. The first worker awake accepts: on a busy machine, often the same one."""
    found: dict[int, list[requests.Session]] = {0: [], 1: []}
    opened: dict[requests.Session, float] = {}
    deadline = time.monotonic() + 60
    while min(map(len, found.values())) < each:
        assert time.monotonic() < deadline, "one worker accepts every connection"
        before = lines(guarded, "card")
        session = requests.Session()
        session.headers["X-API-Key"] = guarded.keys["card"]
        assert session.get(f"{guarded.url}/model", timeout=60).status_code == 200
        while (after := lines(guarded, "card")) == before:
            time.sleep(0.01)
        opened[session] = time.monotonic()
        found[0 if after[0] > before[0] else 1].append(session)
        for sessions in found.values():  # the server closes those that are idle for 5 s
            sessions[:] = [session for session in sessions if time.monotonic() - opened[session] < 3]
    return [session for sessions in found.values() for session in sessions[:each]]


def test_a_quota_holds_across_both_workers(guarded: Guarded) -> None:
    def ask(session: requests.Session) -> list[requests.Response]:
        headers, url = {"X-API-Key": guarded.keys["frugal"]}, f"{guarded.url}/classify"
        return [session.post(url, files={"image": IMAGE}, headers=headers, timeout=60) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        replies = [reply for some in pool.map(ask, connections_to_both_workers(guarded, 4)) for reply in some]
    assert Counter(reply.status_code for reply in replies) == {200: 20, 429: 20}
    for reply in replies:
        if reply.status_code == 429:
            assert_error(reply, 429, "quota_exceeded")
            assert 1 <= int(reply.headers["Retry-After"]) <= 86_400
    time.sleep(1)
    assert lines(guarded, "frugal") == [20, 20]
    values = samples(guarded.url)
    assert total(values, "classifier_key_images_total", key="frugal") == 20
    assert total(values, "classifier_rejected_total", reason="quota_exceeded") == 20


def test_a_rate_holds_across_both_workers_and_counts_each_image_of_a_batch(guarded: Guarded) -> None:
    assert call(guarded.url, "/classify/batch", guarded.keys["slow"], images=3).status_code == 200
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: call(guarded.url, key=guarded.keys["slow"]), range(16)))
    for reply in replies:
        assert_error(reply, 429, "rate_limited")
        # Two images are owed and one is requested, at one per twenty seconds.
        assert 20 < int(reply.headers["Retry-After"]) <= 60
    values = samples(guarded.url)
    assert total(values, "classifier_key_images_total", key="slow") == 3
    assert total(values, "classifier_rejected_total", reason="rate_limited") == 16


def test_refusals_are_counted_by_code(guarded: Guarded) -> None:
    before = samples(guarded.url)
    call(guarded.url)
    call(guarded.url, key=guarded.keys["expired"])
    call(guarded.url, key=guarded.keys["expired"])
    after = samples(guarded.url)
    for reason, more in (("unauthorized", 1), ("forbidden", 2)):
        counted = [total(values, "classifier_rejected_total", reason=reason) for values in (before, after)]
        assert counted[1] - counted[0] == more
    assert not [series for series in after if "classifier_key_images" in series and 'key="expired"' in series]


def test_the_api_description_includes_keys(guarded: Guarded) -> None:
    document = call(guarded.url, "/docs.json", guarded.keys["free"]).json()
    schemes = document["components"]["securitySchemes"]
    assert {(scheme["type"], scheme.get("scheme") or scheme["name"]) for scheme in schemes.values()} == {
        ("http", "bearer"),
        ("apiKey", "X-API-Key"),
    }
    for path, method in (("/classify", "post"), ("/classify/batch", "post"), ("/explain", "post"), ("/model", "get")):
        operation = document["paths"][path][method]
        assert operation["security"] == [{name: []} for name in schemes]
        assert {"401", "403"} <= set(operation["responses"])
        assert "WWW-Authenticate" in operation["responses"]["401"]["headers"]
    limited = document["paths"]["/classify"]["post"]["responses"]["429"]
    assert "quota_exceeded" in limited["description"]
    assert "Retry-After" in limited["headers"]


def until(url: str, key: str, status: int, seconds: float = 10.0) -> None:
    """Wait until ten requests in a row, to whichever worker, return ``status``."""
    deadline = time.monotonic() + seconds
    while [call(url, "/model", key).status_code for _ in range(10)] != [status] * 10:
        assert time.monotonic() < deadline


def replace(file: Path, text: str | None) -> None:
    """Replace the file atomically; None removes it."""
    other = file.with_name("other")
    other.write_text(text or "")
    other.replace(file)
    if text is None:
        file.unlink()


def test_keys_are_added_and_revoked_without_a_restart(guarded: Guarded) -> None:
    new = access.add(guarded.file, "new")
    until(guarded.url, new, 200)
    access.remove(guarded.file, "new")
    until(guarded.url, new, 401)
    assert call(guarded.url, "/model", guarded.keys["free"]).status_code == 200


def test_a_broken_key_file_changes_nothing_and_is_logged(guarded: Guarded) -> None:
    good = guarded.file.read_text()
    for broken in (good + "[free]\n", good + f'[leak]\nsha256 = "{guarded.keys["other"]}"\n', None):
        replace(guarded.file, broken)
        time.sleep(1.5)
        assert [call(guarded.url, "/model", guarded.keys["free"]).status_code for _ in range(10)] == [200] * 10
        assert call(guarded.url, "/model", "unknown").status_code == 401
    log = (guarded.home / LOG).read_text()
    errors = [json.loads(line) for line in log.splitlines() if "the API keys stay as they were" in line]
    assert 3 <= len(errors) <= 6  # once per change and worker, not per request
    assert {error["level"] for error in errors} == {"ERROR"}
    assert guarded.keys["other"] not in log
    replace(guarded.file, good)
    until(guarded.url, guarded.keys["other"], 200)


def test_images_refused_before_decoding_are_not_charged(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key = access.add(file, "alice", images_per_day=1000)
    large = encode(Image.new("RGB", (4000, 3000)), "JPEG", progressive=True)  # faster to send than to decode
    with serve("embedded", tmp_path, API_KEYS=file, WORKERS=1, MAX_WAIT=0.01) as url, ThreadPoolExecutor(16) as pool:

        def ask(_: int) -> int:
            headers = {"X-API-Key": key, "Content-Type": "image/jpeg"}
            return requests.post(f"{url}/classify", large, headers=headers, timeout=60).status_code

        statuses = Counter([ask(0), *pool.map(ask, range(15))])
        assert statuses.keys() == {200, 429}
        assert total(samples(url), "classifier_key_images_total") == statuses[200]


# --- the key file ---


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[a\n", "Expected ']'"),
        ('[a]\nsha256 = "secret"\n', "a.sha256: String should match pattern"),
        ("[a]\nimages_per_day = 1\n", "a.sha256: Field required"),
        ('["a b"]\nsha256 = "0"\n', "a b"),
        (f'[a]\nsha256 = "{"0" * 64}"\nimages_per_second = 0\n', "a.images_per_second: Input should be greater than 0"),
        (f'[a]\nsha256 = "{"0" * 64}"\nimages_per_hour = 1\n', "a.images_per_hour: Extra inputs"),
        (f'[a]\nsha256 = "{"0" * 64}"\nexpires = "soon"\n', "a.expires: Input should be a valid date"),
        (f'[a]\nsha256 = "{"0" * 64}"\npaths = ["/metrics"]\n', "a.paths.0: Input should be '/classify'"),
        (f'[a]\nsha256 = "{"0" * 64}"\n[b]\nsha256 = "{"0" * 64}"\n', "two names have the same sha256"),
    ],
)
def test_an_invalid_key_file_is_refused_without_revealing_its_values(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(access.AccessError) as caught:
        Keys(file)
    assert reason in str(caught.value)
    assert str(file) in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"API_KEYS": "nowhere.toml"}, "API_KEYS: .*nowhere.toml: No such file or directory"),
        ({"API_KEYS": "broken.toml"}, "broken.toml: a.sha256: Field required"),
        ({"API_KEYS": "good.toml", "USAGE_FILE": "broken.toml"}, "file is not a database"),
        ({"AUDIT_DIRECTORY": "good.toml"}, "AUDIT_DIRECTORY=.*good.toml'; expected a directory that can be written"),
    ],
)
def test_unusable_files_stop_the_start_with_one_line(tmp_path: Path, settings: dict[str, str], expected: str) -> None:
    (tmp_path / "broken.toml").write_text("[a]\n" + "# far from a database\n" * 100)
    access.add(tmp_path / "good.toml", "a")
    chosen = {name: tmp_path / value for name, value in settings.items()}
    (line,) = failed_start(tmp_path, **chosen)
    assert line.startswith("error: ")
    assert re.search(expected, line), line


@pytest.mark.parametrize(
    ("name", "file", "reason"),
    [
        ("bob smith", "keys.toml", "'bob smith'; expected a name of 1 to 64 letters"),
        ("bob", "nowhere/keys.toml", "nowhere/keys.toml: the folder is not there"),
    ],
)
def test_adding_a_key_fails_with_the_reason(tmp_path: Path, name: str, file: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        access.add(tmp_path / file, name)
    assert not list(tmp_path.iterdir())


def test_the_command_adds_lists_and_removes(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    options = ("--images-per-second", "2.5", "--images-per-day", 100, "--expires", "2099-12-31")
    options += ("--path", "/classify", "--path", "/model")
    alice = toy.run("serving.access", "add", "alice", *options, file).strip()
    file.write_text(f"# ours\n{file.read_text()}")
    bob = toy.run("serving.access", "add", "bob", file).strip()
    text = file.read_text()
    assert len(alice) >= 43
    assert alice not in text
    assert bob not in text
    assert hashlib.sha256(alice.encode()).hexdigest() in text
    listed = toy.run("serving.access", "list", file).splitlines()
    assert listed[0].startswith("alice images_per_second=2.5 images_per_day=100 expires=2099-12-31 paths=['/classify'")
    assert listed[1] == "bob"
    assert "already" in toy.run("serving.access", "add", "bob", file, code=1)
    assert "no key 'carol'" in toy.run("serving.access", "remove", "carol", file, code=1)
    assert file.read_text() == text
    toy.run("serving.access", "remove", "alice", file)
    assert list(access.read(file)) == ["bob"]
    assert file.read_text().startswith("# ours\n[bob]")
    toy.run("serving.access", "remove", "bob", file)
    assert access.read(file) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["keys.toml"]


def test_the_key_file_keeps_its_owner_and_mode(tmp_path: Path) -> None:
    """Only root can give files away; other users only have their own."""
    owner, group = (1034, 1034) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    file = tmp_path / "keys.toml"
    access.add(file, "alice")
    os.chown(file, owner, group)
    file.chmod(0o600)
    access.add(file, "bob")
    status = file.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (owner, group, 0o600)


def test_a_restarted_worker_survives_a_broken_key_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.toml"
    key = access.add(file, "alice")
    good = file.read_text()
    file.write_text("[bob")
    keys = Keys(file, is_running=True)
    (message,) = caplog.messages  # shown without the fields of a record: logging is configured later
    assert str(file) in message
    with pytest.raises(ApiError, match="no known API key"):
        keys.identify(Headers({"x-api-key": key}))
    replace(file, good)
    keys._next_look = 0.0
    assert keys.identify(Headers({"x-api-key": key}))[0] == "alice"


def test_a_broken_key_file_is_reported_once_however_often_it_is_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.toml"
    key = access.add(file, "alice")
    keys = Keys(file)
    replace(file, "[bob")
    for _ in range(3):
        keys._next_look = 0.0
        assert keys.identify(Headers({"x-api-key": key}))[0] == "alice"
    assert caplog.messages == ["the API keys stay as they were"]


def test_a_key_is_no_longer_valid_on_the_day_it_expires() -> None:
    today = datetime.now(UTC).date()
    with pytest.raises(ApiError, match=f"the API key 'alice' expired on {today}"):
        authorize("alice", Key(sha256="0" * 64, expires=today), "/classify")


def test_a_key_with_an_empty_list_of_paths_may_call_none() -> None:
    with pytest.raises(ApiError, match="the API key 'alice' may not call /classify"):
        authorize("alice", Key(sha256="0" * 64, paths=[]), "/classify")


def test_a_bad_limit_or_name_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    access.add(file, "alice")
    text = file.read_text()
    for name, limits in (("bob", {"images_per_second": -1}), ("b]\nob", {}), ("bob smith", {})):
        with pytest.raises(ValueError):
            access.add(file, name, **limits)
    assert file.read_text() == text
