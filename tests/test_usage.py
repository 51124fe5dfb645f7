"""Rates and quotas on a clock that the test controls, and the file that holds the counts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from serving.access import AccessError, Key
from serving.errors import ApiError
from serving.usage import DAY_SECONDS, PATIENCE_SECONDS, Account, Usage
from tests.loops import in_a_loop

NOON = 20_000 * DAY_SECONDS + DAY_SECONDS / 2


def key(**limits: Any) -> Key:
    return Key(sha256="0" * 64, **limits)


def refusal(account: Account, limits: Key, images: int, now: float) -> tuple[str, int]:
    with pytest.raises(ApiError) as caught:
        account.charge(limits, images, now)
    assert caught.value.status == 429
    return caught.value.code, int(caught.value.headers["retry-after"])


def test_one_seconds_worth_may_come_at_once_and_then_the_rate_holds() -> None:
    limits, account = key(images_per_second=10), Account()
    for _ in range(10):
        account = account.charge(limits, 1, NOON)
    assert refusal(account, limits, 1, NOON) == ("rate_limited", 1)
    assert refusal(account, limits, 1, NOON + 0.09) == ("rate_limited", 1)
    account = account.charge(limits, 1, NOON + 0.11)
    assert refusal(account, limits, 1, NOON + 0.11) == ("rate_limited", 1)
    taken, now = 0, NOON + 10
    while now < NOON + 20:
        now += 0.01
        with contextlib.suppress(ApiError):
            account, taken = account.charge(limits, 1, now), taken + 1
    assert 100 <= taken <= 111  # ten seconds' worth, plus the ten saved up before


def test_a_batch_larger_than_the_bucket_waits_until_it_is_full_and_owes_the_rest() -> None:
    limits = key(images_per_second=2)
    account = Account().charge(limits, 20, NOON)
    assert refusal(account, limits, 1, NOON) == ("rate_limited", 10)  # 18 owed, one requested, two per second
    assert refusal(account, limits, 20, NOON) == ("rate_limited", 10)
    assert refusal(account, limits, 1, NOON + 9.4) == ("rate_limited", 1)
    assert account.charge(limits, 1, NOON + 9.6)


def test_rates_below_one_image_per_second_work() -> None:
    limits = key(images_per_second=0.1)
    account = Account().charge(limits, 1, NOON)
    assert refusal(account, limits, 1, NOON + 1) == ("rate_limited", 9)
    assert account.charge(limits, 1, NOON + 10.1)


def test_setting_the_clock_back_grants_nothing_and_blocks_nobody() -> None:
    limits = key(images_per_second=1)
    account = Account().charge(limits, 1, NOON)
    refusal(account, limits, 1, NOON - 3600)
    account = Account(1.0, NOON, 20_000, 1).charge(limits, 1, NOON - 3600)
    assert account.charge(limits, 1, NOON - 3598)


@in_a_loop
async def test_a_refusal_after_the_clock_was_set_back_lasts_one_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, limits, now = Usage(tmp_path / "usage.sqlite"), key(images_per_second=1), NOON
    monkeypatch.setattr("time.time", lambda: now)
    await usage.charge("a", limits, 1)
    now -= 3600
    with pytest.raises(ApiError, match="a second"):
        await usage.charge("a", limits, 1)
    now += 1.1
    await usage.charge("a", limits, 1)


def test_a_quota_covers_one_utc_day() -> None:
    limits = key(images_per_day=100)
    account = Account().charge(limits, 60, NOON).charge(limits, 40, NOON + 1)
    assert refusal(account, limits, 1, NOON + 2) == ("quota_exceeded", DAY_SECONDS // 2 - 2)
    with pytest.raises(ApiError, match=r"^the request has 101 images; expected at most 100, those of a day$") as caught:
        Account().charge(limits, 101, NOON)  # no use in asking again, on any day
    assert (caught.value.status, caught.value.code) == (413, "too_large")
    tomorrow = account.charge(limits, 100, NOON + DAY_SECONDS / 2)
    assert tomorrow.images == 100


async def charge_at_once(usage: Usage, limits: Key, *batches: int, name: str = "a") -> list[bool]:
    """Which of these batches, sent together, are admitted."""
    results = await asyncio.gather(*(usage.charge(name, limits, n) for n in batches), return_exceptions=True)
    return [result is None for result in results]


@in_a_loop
async def test_refused_images_are_not_charged(tmp_path: Path) -> None:
    usage, limits = Usage(tmp_path / "usage"), key(images_per_day=10)
    assert await charge_at_once(usage, limits, 8, 3, 2, 1) == [True, False, True, False]


@in_a_loop
async def test_two_processes_share_the_file_and_restarts_keep_it(tmp_path: Path) -> None:
    limits = key(images_per_day=5)
    first, second = Usage(tmp_path / "usage"), Usage(tmp_path / "usage")
    assert [sum(await charge_at_once(one, limits, 1, 1, 1)) for one in (first, second, first)] == [3, 2, 0]
    assert sum(await charge_at_once(second, limits, 1, 1, 1, name="b")) == 3
    assert sum(await charge_at_once(Usage(tmp_path / "usage"), limits, 1, 1, 1)) == 0


@in_a_loop
async def test_images_that_another_process_is_just_counting_are_waited_for(tmp_path: Path) -> None:
    usage, limits = Usage(tmp_path / "usage"), key(images_per_day=5)
    with contextlib.closing(sqlite3.connect(tmp_path / "usage", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        charged = asyncio.create_task(usage.charge("a", limits, 3))
        await asyncio.sleep(PATIENCE_SECONDS / 10)
        other.execute("INSERT INTO usage VALUES ('a', 1, 0, ?, 4)", (time.time() // DAY_SECONDS,))
        other.execute("COMMIT")
        with pytest.raises(ApiError, match=r"^4 of 5 images a day were sent, and now 3"):
            await charged


@in_a_loop
async def test_nothing_is_counted_without_limits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    usage = Usage(tmp_path / "usage")
    (tmp_path / "usage").write_bytes(b"gone")
    await usage.charge("a", key(), 1_000_000)
    assert not caplog.records


@in_a_loop
async def test_a_failing_file_limits_nobody_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usage = Usage(tmp_path / "usage")
    await usage.charge("a", key(images_per_day=1), 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "usage", isolation_level=None)) as other:
        other.execute("DROP TABLE usage")
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            await usage.charge("a", key(images_per_day=1), 1)
    assert [record.message for record in caplog.records] == ["API keys are not limited"]


@in_a_loop
async def test_a_file_locked_by_another_process_delays_only_one_request(tmp_path: Path) -> None:
    usage, limits = Usage(tmp_path / "usage"), key(images_per_day=1)
    with contextlib.closing(sqlite3.connect(tmp_path / "usage", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        assert all(await charge_at_once(usage, limits, *[1] * 20))
        assert time.monotonic() - started < 3 * PATIENCE_SECONDS


def test_a_refusal_needs_no_lock_so_a_flood_of_them_keeps_no_other_process_from_the_file(tmp_path: Path) -> None:
    file, limits = tmp_path / "usage.sqlite", key(images_per_second=1)
    usage = Usage(file)
    asyncio.run(usage.charge("alice", limits, 50))
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ApiError, match="more than 1 images"):
            asyncio.run(usage.charge("alice", limits, 1))
        other.execute("ROLLBACK")


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "usage").write_bytes(b"not a database" * 100)
    with pytest.raises(AccessError, match=r"^USAGE_FILE='.*usage': file is not a database$"):
        Usage(tmp_path / "usage")


@in_a_loop
async def test_a_restarted_worker_survives_a_failing_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "usage").write_bytes(b"not a database" * 100)
    with caplog.at_level(logging.ERROR):
        await Usage(tmp_path / "usage", is_running=True).charge("a", key(images_per_day=1), 1)
    assert [record.message for record in caplog.records] == ["API keys are not limited"]


def test_the_default_is_a_temporary_file() -> None:
    usage = Usage(None)
    assert usage.file.exists()
    directory = usage.file.parent
    usage._temporary.cleanup()
    assert not directory.exists()
