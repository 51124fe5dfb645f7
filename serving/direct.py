"""A direct path for API requests, around the BentoML layers that they have no use for.

Routing, tracing, the request context and the conversion of an endpoint's input and output cost more than all other work
on a small image, and do nothing for a method that takes a request and returns a response. BentoML's request metrics
stay, and anything but a POST to an endpoint goes through its whole application.
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
"""A method of the service, with the service as its first argument."""


class Direct:
    """Wraps ``app``; ``endpoints`` maps paths to methods of the service."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint]) -> None:
        self._app, self._endpoints = app, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._endpoints:
            await self._app(scope, receive, send)
            return
        response = await self._endpoints[scope["path"]](get_current_service(), Request(scope, receive, send))
        await response(scope, receive, send)


class MetricsMiddleware(RunnerTrafficMetricsMiddleware):
    """BentoML's request metrics, with their labelled children cached instead of looked up each time."""

    def _setup(self, *injected: Any, **by_name: Any) -> None:
        super()._setup(*injected, **by_name)
        for name in (
            "metrics_request_duration",
            "metrics_request_total",
            "metrics_request_in_progress",
            "metrics_last_request_timestamp",
        ):
            setattr(self, name, _CachedMetric(getattr(self, name)))
        # As BentoML does for 200 and 500: a rate needs a value from before the first increase.
        for endpoint in server_context.service_routes:
            self._replies(endpoint, HTTPStatus.SERVICE_UNAVAILABLE)

    def count(self, path: str, status: int, seconds: list[float]) -> None:
        """Count requests answered with ``status`` outside the application, which has started; ``seconds`` each took."""
        total, duration = self._replies(path, status)
        total.inc(len(seconds))
        for each in seconds:
            duration.observe(each)

    def _replies(self, path: str, status: int) -> tuple[Any, Any]:
        """The counter and the duration histogram of replies with ``status``."""
        about = {
            "endpoint": path,
            "service_name": server_context.bento_name,
            "service_version": server_context.bento_version,
            "http_response_code": int(status),
            "runner_name": server_context.service_name,
        }
        return self.metrics_request_total.labels(**about), self.metrics_request_duration.labels(**about)


class _CachedMetric:
    """Stands in for a metric and caches its children; the paths and statuses that label them are few."""

    def __init__(self, metric: Any) -> None:
        self._metric, self._children = metric, dict[tuple[object, ...], Any]()

    def labels(self, **values: object) -> Any:
        key = tuple(values.values())
        if key not in self._children:
            self._children[key] = self._metric.labels(**values)
        return self._children[key]


def bypass(app: Starlette, endpoints: Mapping[str, Endpoint]) -> ASGIApp:
    """BentoML's ``app`` with its request metrics outermost and the direct path to ``endpoints`` right behind them."""
    direct = Direct(app, endpoints)
    options = remove_middleware(app, RunnerTrafficMetricsMiddleware)
    # None if BentoML is configured to measure nothing.
    return direct if options is None else MetricsMiddleware(direct, **options)


def remove_middleware(app: Starlette, layer: Any) -> dict[str, Any] | None:
    """Remove a middleware from ``app``; returns the options it was to be created with, or None if there was none."""
    for entry in app.user_middleware:
        if entry.cls is layer:
            app.user_middleware.remove(entry)
            return dict(entry.kwargs)
    return None
