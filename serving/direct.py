"""Requests to the endpoints of the API, past those layers of BentoML that such a request has no use for.

Routing, tracing, the request context and the conversion of what an endpoint takes and gives cost more than all else
that is done for a small image, and change nothing for a method from request to response. BentoML's measuring of
requests stays, and whatever is no POST to an endpoint goes through its whole application.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from _bentoml_sdk.service import get_current_service
from bentoml import server_context
from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

Endpoint = Callable[[Any, Request], Awaitable[Response]]
"""A method of the service, and the service as its first argument."""


class Direct:
    """Wraps ``app``; ``endpoints`` are the methods of the service by their paths."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint]) -> None:
        self._app, self._endpoints = app, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._endpoints:
            await self._app(scope, receive, send)
            return
        response = await self._endpoints[scope["path"]](get_current_service(), Request(scope, receive, send))
        await response(scope, receive, send)


class Measuring(RunnerTrafficMetricsMiddleware):
    """BentoML's measuring of requests, which keeps at hand what it counts on, instead of looking it up by labels."""

    def _setup(self, *injected: Any, **by_name: Any) -> None:
        super()._setup(*injected, **by_name)
        for name in (
            "metrics_request_duration",
            "metrics_request_total",
            "metrics_request_in_progress",
            "metrics_last_request_timestamp",
        ):
            setattr(self, name, _Remembered(getattr(self, name)))
        # As 200 and 500 in BentoML: a rate counts from a value that was there before.
        for endpoint in server_context.service_routes:
            self._replies(endpoint, HTTPStatus.SERVICE_UNAVAILABLE)

    def count(self, path: str, status: int, seconds: list[float]) -> None:
        """Count requests that were answered with ``status`` outside the application, each after so many seconds."""
        if not self._is_setup:
            self._setup()
        total, duration = self._replies(path, status)
        total.inc(len(seconds))
        for each in seconds:
            duration.observe(each)

    def _replies(self, path: str, status: int) -> tuple[Any, Any]:
        """The number and the duration of replies with ``status``."""
        about = {
            "endpoint": path,
            "service_name": server_context.bento_name,
            "service_version": server_context.bento_version,
            "http_response_code": int(status),
            "runner_name": server_context.service_name,
        }
        return self.metrics_request_total.labels(**about), self.metrics_request_duration.labels(**about)


class _Remembered:
    """Stands for a metric, of which it keeps the children; the paths and statuses that label them are few."""

    def __init__(self, metric: Any) -> None:
        self._metric, self._children = metric, dict[tuple[object, ...], Any]()

    def labels(self, **values: object) -> Any:
        key = tuple(values.values())
        if key not in self._children:
            self._children[key] = self._metric.labels(**values)
        return self._children[key]


def bypass(app: Starlette, endpoints: Mapping[str, Endpoint]) -> ASGIApp:
    """BentoML's ``app`` with its measuring outermost and the direct way to ``endpoints`` right behind it."""
    direct = Direct(app, endpoints)
    options = remove_middleware(app, RunnerTrafficMetricsMiddleware)
    # None where BentoML is configured to measure nothing.
    return direct if options is None else Measuring(direct, **options)


def remove_middleware(app: Starlette, layer: Any) -> dict[str, Any] | None:
    """Remove a middleware from ``app``; the options that it would have been made with, or None where it has none."""
    for entry in app.user_middleware:
        if entry.cls is layer:
            app.user_middleware.remove(entry)
            return dict(entry.kwargs)
    return None
