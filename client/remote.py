"""The service over HTTP, with patience: while it is overloaded, restarting or out of reach, requests are retried."""

from __future__ import annotations

import os
import random
import ssl
import sys
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from client.errors import ClientError
from client.rows import Reply

API_KEY = "CLASSIFIER_API_KEY"
"""Environment variable of the API key: an argument would show in the process list and the shell history."""
SECONDS = httpx.Timeout(60, connect=10)
NOT_REACHED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol)
"""A wrong address or certificate, unless it has worked before: waiting will not help."""
SMALLER = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.GATEWAY_TIMEOUT)
"""Replies after which a batch is split: fewer large images may well be decoded within the deadline of one request."""
LONE_TIMEOUTS = 3
"""Times that a single image may exceed the deadline before the error is its result."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second attempt, doubled each time up to a limit, unless the service says how long."""


class Remote:
    """The service at ``url``; a batch is retried for at most ``patience`` seconds."""

    def __init__(
        self, url: str, patience: float, prediction_set: float | None = None, cacert: Path | None = None
    ) -> None:
        self._url, self._patience = url, patience
        self._query = {} if prediction_set is None else {"prediction_set": prediction_set}
        key = os.environ.get(API_KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ClientError(f"{API_KEY}: has characters that no key has; expected one line of ASCII")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        try:
            verify = ssl.create_default_context(cafile=cacert) if cacert else True
            self._client = httpx.Client(base_url=url, headers=headers, verify=verify, timeout=SECONDS, limits=limits)
        except OSError as error:
            raise ClientError(f"{cacert or 'SSL_CERT_FILE'}: {error}") from None
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ClientError(f"{url}: {error}") from None
        except (ImportError, ValueError) as error:  # of the environment: a SOCKS proxy, or what is no proxy's URL
            raise ClientError(f"{error}; expected an HTTP proxy in ALL_PROXY and the like, or NO_PROXY=*") from None
        self._told = ""
        self._was_reached = False

    def card(self) -> dict[str, Any]:
        """The service's model card, from ``GET /model``."""
        return _expect_ok(self._send(self._client.build_request("GET", "/model"), is_one=True), self._url)

    def __call__(self, images: list[bytes]) -> list[Reply]:
        parts = [("images", (str(number), image)) for number, image in enumerate(images)]
        request = self._client.build_request("POST", "/classify/batch", params=self._query, files=parts)
        request.read()  # as one piece of bytes it can be sent again, and in one write
        response = self._send(request, is_one=len(images) == 1)
        if response.status_code in SMALLER:
            half = len(images) // 2
            return self(images[:half]) + self(images[half:]) if half else [{"error": _problem(response)}]
        results = _expect_ok(response, self._url).get("results")
        if not (
            isinstance(results, list) and len(results) == len(images) and all(isinstance(r, dict) for r in results)
        ):
            raise ClientError(f"{self._url}: expected {len(images)} results in the reply: is this the classifier?")
        return results

    def _send(self, request: httpx.Request, is_one: bool) -> httpx.Response:
        """The first reply that is neither 429 nor a server error, or that fewer images may remedy."""
        until = time.monotonic() + self._patience
        attempt = 0
        while True:
            attempt += 1
            pause = None
            try:
                response = self._client.send(request)
                self._was_reached = True
                if _is_final(response, is_one, attempt):
                    return response
                trouble, pause = _problem(response)["message"], _retry_after(response)
            except UnicodeError as error:  # from the host name
                raise ClientError(f"{self._url}: {error}") from None
            except httpx.RequestError as error:
                trouble = str(error) or type(error).__name__
                if isinstance(error, NOT_REACHED) and not self._was_reached:
                    raise ClientError(f"{self._url}: {trouble}") from None
            # Those refused at the same moment must not all return at the same moment.
            jitter = random.uniform(0, FIRST_PAUSE)
            self._wait((pause or min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))) + jitter, until, trouble)

    def _wait(self, pause: float, until: float, trouble: str) -> None:
        if time.monotonic() + pause > until:
            raise ClientError(f"{self._url}: {trouble}; given up: more than --patience {self._patience:g} s")
        if trouble != self._told:
            self._told = trouble
            tqdm.write(f"{self._url}: {trouble}; trying again", file=sys.stderr)
        time.sleep(pause)


def _is_final(response: httpx.Response, is_one: bool, attempt: int) -> bool:
    """Whether no other attempt is made after this reply: fewer images may remedy it, or it is no lack of capacity."""
    if response.status_code in SMALLER and (not is_one or attempt >= LONE_TIMEOUTS):
        return True
    return response.status_code != HTTPStatus.TOO_MANY_REQUESTS and not response.is_server_error


def _expect_ok(response: httpx.Response, url: str) -> dict[str, Any]:
    """The document of a 200 reply; raises ``ClientError`` with what the service says otherwise."""
    if response.status_code != HTTPStatus.OK:
        problem = _problem(response)
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            problem["message"] += f" (the variable {API_KEY})"
        raise ClientError(f"{url}: {response.status_code} {problem['code']}: {problem['message']}")
    try:
        document = response.json()
    except ValueError:
        raise ClientError(f"{url}: the reply is not JSON: is this the classifier?") from None
    if not isinstance(document, dict):
        raise ClientError(f"{url}: the reply is not an object: is this the classifier?")
    return document


def _problem(response: httpx.Response) -> dict[str, str]:
    """``{"code", "message"}``, even from a proxy in front of the service, whose errors have another form."""
    try:
        problem: dict[str, str] = response.json()["error"]
        return {"code": str(problem["code"]), "message": str(problem["message"])}
    except (ValueError, LookupError, TypeError):
        return _by_status(response.status_code)


def _by_status(number: int) -> dict[str, str]:
    try:
        status = HTTPStatus(number)
    except ValueError:  # not in any standard, such as Cloudflare's 520 to 526
        return {"code": f"http_{number}", "message": f"HTTP status {number}"}
    return {"code": status.name.lower(), "message": f"{status} {status.phrase}"}


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds to wait, which the header gives as a number or as a date (RFC 9110, 10.2.3), or None."""
    value = response.headers.get("retry-after", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
