"""Logging as a worker configures it. Each test runs in its own process, because handlers are global."""

from __future__ import annotations

import base64
import email.policy
import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.live import LOG, encode, picture, python, serve

PROGRAM = """
import logging
from serving import logs
from serving.context import request_id
from settings import load

logs.configure(load(), "api-1")
logger = logging.getLogger("classifier.test")
logger.debug("a detail")
logger.info("no request")
request_id.set("abc-123")
logger.info("an answer of %s", "42", extra={"status": 200, "path": "/classify"})
logger.warning('a line\\nbreak, a "quote", \\u00e9 and \\u2603')
logging.getLogger("bentoml").info("of the server")
logging.getLogger("uvicorn.error").warning("of uvicorn")
logging.getLogger("uvicorn.access").info("a second line of every request")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("broken")
logger.critical("the model is wrong")
"""


def log(tmp_path: Path, program: str = PROGRAM, **settings: Any) -> list[dict[str, Any]]:
    """The records that ``program`` wrote to its console."""
    result = python(tmp_path, "-c", program, **settings)
    assert result.stdout == ""
    return [json.loads(line) for line in result.stderr.splitlines()]


def messages(records: list[dict[str, Any]]) -> list[str]:
    return [record["message"] for record in records]


def test_every_line_is_a_json_object_with_its_source_and_time(tmp_path: Path) -> None:
    records = log(tmp_path)
    assert len(records) == 7
    for record in records:
        assert record["process"] == "api-1"
        assert record["pid"] > 0
        assert record["time"].startswith("20")
        assert record["level"] in {"INFO", "WARNING", "ERROR", "CRITICAL"}
        assert record["logger"]
    answer = records[1]
    assert (answer["message"], answer["status"], answer["path"]) == ("an answer of 42", 200, "/classify")
    assert records[2]["message"] == 'a line\nbreak, a "quote", é and ☃'
    (broken,) = [record for record in records if record["level"] == "ERROR"]
    assert "ZeroDivisionError" in broken["exc_info"]


def test_background_failures_are_logged_although_bentoml_disables_other_loggers(tmp_path: Path) -> None:
    program = """
import asyncio, concurrent.futures, logging.config
logging.config.dictConfig({"version": 1})  # as BentoML does
from serving import logs
from settings import load

logs.configure(load(), "api-1")

async def serve():
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await asyncio.sleep(0.01)
    future = concurrent.futures.Future()
    future.add_done_callback(lambda _: 1 / 0)
    future.set_result(None)

asyncio.run(serve())
"""
    failures = log(tmp_path, program)
    assert [record["logger"] for record in failures] == ["asyncio", "concurrent.futures"]
    assert all("ZeroDivisionError" in record["exc_info"] for record in failures)


def test_the_request_id_is_on_every_line_of_its_request(tmp_path: Path) -> None:
    assert [record["request_id"] for record in log(tmp_path)] == ["", *["abc-123"] * 6]


@pytest.mark.parametrize(("level", "count"), [("DEBUG", 8), ("INFO", 7), ("WARNING", 4), ("CRITICAL", 1)])
def test_the_console_starts_at_the_configured_level(tmp_path: Path, level: str, count: int) -> None:
    assert len(log(tmp_path, LOG_LEVEL=level)) == count


def test_only_warnings_and_above_go_to_the_process_log_file(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    console = log(tmp_path, LOG_DIRECTORY=directory)
    assert [file.name for file in directory.iterdir()] == ["api-1.log"]
    written = [json.loads(line) for line in (directory / "api-1.log").read_text(encoding="utf-8").splitlines()]
    assert written == [record for record in console if record["level"] in {"WARNING", "ERROR", "CRITICAL"}]
    assert len(written) == 4


def test_a_quieter_console_does_not_affect_the_file(tmp_path: Path) -> None:
    assert len(log(tmp_path, LOG_LEVEL="CRITICAL", LOG_DIRECTORY=tmp_path / "logs")) == 1
    assert len((tmp_path / "logs" / "api-1.log").read_text().splitlines()) == 4


def test_files_rotate_and_their_number_is_bounded(tmp_path: Path) -> None:
    program = """
from serving import logs
logs.ROTATE_BYTES, logs.ROTATE_FILES = 2000, 2
import logging
from settings import load
logs.configure(load(), "api-1")
for number in range(100):
    logging.getLogger("classifier").warning("line %d", number)
"""
    log(tmp_path, program, LOG_DIRECTORY=tmp_path / "logs")
    files = sorted(file.name for file in (tmp_path / "logs").iterdir())
    assert files == ["api-1.log", "api-1.log.1", "api-1.log.2"]
    assert all(file.stat().st_size <= 2000 for file in (tmp_path / "logs").iterdir())
    last = (tmp_path / "logs" / "api-1.log").read_text().splitlines()[-1]
    assert json.loads(last)["message"] == "line 99"


class Mailbox(socketserver.StreamRequestHandler):
    """As much of SMTP (RFC 5321) as a client needs to deliver a message."""

    def handle(self) -> None:
        self.reply(220)
        envelope: list[str] = []
        while line := self.rfile.readline().decode().strip():
            verb = line[:4].upper()
            if verb == "DATA":
                self.reply(354)
                body = b"".join(iter(self.rfile.readline, b".\r\n"))
                self.server.received.append(("\n".join(envelope), body.decode()))  # type: ignore[attr-defined]
            elif verb in {"MAIL", "RCPT"}:
                envelope.append(line)
            self.reply(221 if verb == "QUIT" else 250)
            if verb == "QUIT":
                return

    def reply(self, code: int) -> None:
        self.wfile.write(f"{code} ok\r\n".encode())


class MailServer(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Mailbox)
        self.received: list[tuple[str, str]] = []


@contextmanager
def mail_server() -> Iterator[MailServer]:
    with MailServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_only_critical_lines_are_mailed(tmp_path: Path) -> None:
    with mail_server() as server:
        port = server.server_address[1]
        console = log(tmp_path, SMTP_HOST="127.0.0.1", SMTP_PORT=port, SMTP_TO="ops@example.com,boss@example.com")
        ((envelope, message),) = server.received
    assert len(console) == 7
    assert "classifier@localhost" in envelope
    assert "ops@example.com" in envelope
    assert "boss@example.com" in envelope
    mail = email.message_from_string(message, policy=email.policy.default)
    assert mail["Subject"] == "CRITICAL: classifier"
    assert json.loads(mail.get_content()) == console[-1]
    assert console[-1]["message"] == "the model is wrong"


def test_an_unreachable_mail_server_loses_no_line_and_stops_nothing(tmp_path: Path) -> None:
    with mail_server() as server:
        port = server.server_address[1]
    program = PROGRAM + "\nlogger.info('still here')\n"
    said = python(tmp_path, "-c", program, SMTP_HOST="127.0.0.1", SMTP_PORT=port, SMTP_TO="ops@example.com").stderr
    assert '"still here"' in said


def test_no_log_contains_an_image_or_a_body(tmp_path: Path) -> None:
    image = encode(picture(5), "JPEG")
    text = base64.b64encode(image).decode()
    marker = "c2VjcmV0LW1hcmtlci1vZi1hLXBhdGllbnQ"
    with serve("embedded", tmp_path, LOG_LEVEL="DEBUG", LOG_DIRECTORY=tmp_path / "logs") as url:
        for body in ({"image": text}, {"image": text[:-8]}, {"image": marker + "="}, {"image": "secret!" + marker}):
            requests.post(f"{url}/classify", json=body, timeout=60)
        requests.post(
            f"{url}/classify", files={"image": ("secret-name.jpg", b"no image " + marker.encode())}, timeout=60
        )
    written = (tmp_path / LOG).read_text()
    written += "".join(file.read_text() for file in (tmp_path / "logs").glob("*"))
    assert '"/classify"' in written
    for secret in (text[40:80], marker, "secret-name", "\\xff\\xd8"):
        assert secret not in written
