"""The outermost ASGI layer: request ids, known paths only, one form for every error, one log line per request.

It wraps BentoML's own middleware, so that an unknown path creates no metric series there, and replies that the
middleware makes by itself are rewritten like all others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, MutableMapping
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import draining, metrics
from serving.accounting import Accounting
from serving.bodies import Bodies
from serving.context import REQUEST_ID_HEADER, choose_request_id, header, request_id, watch
from serving.errors import ERROR_HEADER, OVERLOADED, REFUSAL_SECONDS, ApiError, from_exception, from_status, not_ready

logger = logging.getLogger("classifier.access")

UNLOGGED = frozenset({"/livez", "/healthz", "/readyz", "/metrics"})


class Gateway:
    """Sends ``paths`` to ``app``, and all others to ``page``, which answers or refuses.

    ``accounting`` decides who may call, and keeps records.
    """

    def __init__(
        self,
        app: ASGIApp,
        paths: Collection[str],
        page: ASGIApp,
        log_requests: bool,
        bodies: Bodies,
        accounting: Accounting | None = None,
    ) -> None:
        self._app, self._paths, self._page = app, frozenset(paths), page
        self._log_requests, self._bodies, self._accounting = log_requests, bodies, accounting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._handle(scope, receive, send)
        else:  # startup and shutdown of the application
            await self._app(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        chosen = choose_request_id(header(scope["headers"], REQUEST_ID_HEADER))
        token = request_id.set(chosen)
        watch(receive)
        reply = _Reply(scope, receive, send, chosen)
        record = self._accounting.begin(scope) if self._accounting else None
        try:
            if record:
                record.authorize(Headers(scope=scope))
            answer = self._app if scope["path"] in self._paths else self._page
            with self._bodies.meter(receive) as metered:
                await answer(scope, metered, reply)
        except ApiError as error:
            await reply.fail(from_exception(error))
        except asyncio.CancelledError:  # shutdown: the server has waited for this request long enough
            await reply.fail(not_ready("the service is shutting down"))
        except Exception as error:
            logger.exception("unhandled error")
            await reply.fail(from_exception(error))
        finally:
            if reply.code:
                metrics.REJECTED.labels(scope.get("state", {}).get("reason", reply.code)).inc()
            if self._log_requests and scope["path"] not in UNLOGGED:
                self._log(scope, reply, time.perf_counter() - started)
            if record:
                record.end(reply.status, reply.code)
            request_id.reset(token)

    def _log(self, scope: Scope, reply: _Reply, seconds: float) -> None:
        fields: MutableMapping[str, Any] = {
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": reply.status,
            "ms": round(1000 * seconds, 2),
        }
        if reply.code:
            fields["code"] = reply.code
        logger.info("request", extra=fields)


class _Reply:
    """Passes a reply on with the request id added; an error reply of another layer is replaced by one of ours."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, chosen_id: str) -> None:
        self._scope, self._receive, self._send, self._id = scope, receive, send, chosen_id
        self._foreign: ApiError | None = None
        self.status = 0
        self.code = ""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._foreign is None:
            await self._send(message)
        elif not message.get("more_body", False):
            await self.fail(self._foreign)

    async def _begin(self, message: Message) -> None:
        status = message["status"]
        if status >= HTTPStatus.BAD_REQUEST:
            headers = Headers(scope=message)
            if ERROR_HEADER not in headers:
                self._foreign = from_status(status)
                if "allow" in headers:
                    self._foreign.headers["allow"] = headers["allow"]
                    self._foreign.message += f"; expected {headers['allow']}"
                return
            self.code = headers[ERROR_HEADER]
            if self.code == OVERLOADED:
                await asyncio.sleep(REFUSAL_SECONDS)
        self.status = status
        added = [(REQUEST_ID_HEADER, self._id.encode())]
        if draining.started.is_set():
            added.append((b"connection", b"close"))
        await self._send({**message, "headers": [*message["headers"], *added]})

    async def fail(self, error: ApiError) -> None:
        """Answer with ``error``, unless a reply has already begun and can only be cut short."""
        if self.status:
            return
        self._foreign = None
        await error.response()(self._scope, self._receive, self)
