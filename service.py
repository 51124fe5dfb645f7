"""The BentoML services: HTTP in, HTTP out.

    bentoml serve service:Classifier

In the embedded topology every worker of ``Classifier`` owns an engine. In the runner topology workers only decode and
gather, and one ``Runner`` process per GPU batches across all of them. The hardware, or ``TOPOLOGY``, decides which.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import random
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import bentoml
import numpy as np
import orjson
from _bentoml_sdk.service import Service, get_current_service
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from bentoml.models import BentoModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

import settings as configuration
from model import runtimes
from model.batching import Batcher, Results
from model.classifier import Classifier as Calibrated
from model.classifier import Scores
from model.explain import VIEWS
from model.preprocess import Pixels
from model.sandbox import Sandbox
from serving import arrays, connections, draining, logs, metrics, supervision
from serving.access import GUARDED
from serving.accounting import Accounting
from serving.bodies import Bodies
from serving.deployment import Deployment
from serving.direct import MetricsMiddleware, bypass, remove_middleware
from serving.drift import Drift
from serving.engines import EngineClient, LocalEngine, RunnerClient
from serving.errors import ApiError, deadline_exceeded, from_exception, not_ready
from serving.gateway import UNLOGGED, Gateway
from serving.heartbeat import beat
from serving.openapi import describe
from serving.options import read_timeout
from serving.pipeline import Pipeline
from serving.readiness import Readiness, verify_or_exit
from serving.replies import Replies
from serving.schemas import BatchInput, BatchOutput, ClassifyInput, ClassifyOutput, ExplainOutput
from serving.shedding import LoadShedder
from serving.static import Page
from serving.tuning import tune

logger = logging.getLogger("classifier.service")

settings = configuration.load()
is_worker = bentoml.server_context.worker_index is not None
if is_worker:
    supervision.follow()
else:
    supervision.install()
deployment = Deployment.resolve(settings, is_worker)
if is_worker:
    connections.install(delays_accept=deployment.workers != 1)

DEFAULT_BATCH = 32
"""Batch size until the best one has been measured, and the most images in one hop to the runner."""
PATHS = (*GUARDED, *UNLOGGED)
MAX_HELD_BODIES = 5
"""Bodies of ``MAX_BODY_BYTES`` each that one worker may hold at once."""
CONCURRENCY = 1 if deployment.workers >= deployment.cores else 2
"""Batches in flight to an engine. With two, the engine need not wait for the event loop, which pays off where there are
fewer workers than cores; elsewhere, halving the batches costs more than that gains."""
REBALANCE = 0.01
"""Share of its replies with which one of several runners closes the connection, so that one that started later, as in
the place of another, gets its share of the workers: BentoML's client would never leave the others."""
GC_THRESHOLD = 20_000
"""Allocations between garbage collections; CPython's 700 would cost a twentieth of the time."""
RUNNER_TIMEOUT = 3600.0
"""BentoML's time limit for one call to the runner: effectively none, because we enforce request deadlines ourselves."""

SERVICE_OPTIONS: dict[str, Any] = {
    "traffic": {"timeout": RUNNER_TIMEOUT},
    "logging": {"access": {"enabled": False}},
    "tracing": {"excluded_urls": ".*"},
    "runner_probe": {"enabled": False},  # it would answer errors with 500; ``__is_ready__`` asks instead
}
# BentoML has no recipe for a distribution "slim"; for "debian" it would install compilers and git, 0.6 GB of them. A
# volume mounted at /audit, for AUDIT_DIRECTORY, inherits the owner of that folder.
IMAGE = bentoml.images.Image(base_image="python:3.11-slim", distro="slim").run("install -d -o 1034 -g 1034 /audit")


class LeanService(Service[Any]):
    """A service without BentoML's timeout, which keeps a timer and the whole request until it expires: 4 KB each."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        app = super().to_asgi(is_main)
        assert isinstance(app, Starlette)
        remove_middleware(app, TimeoutMiddleware)
        return app


class RunnerService(LeanService):
    """Answers the workers directly, bypassing BentoML's layers, which are for callers of all kinds."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        app = super().to_asgi(is_main)
        assert isinstance(app, Starlette)
        return bypass(app, {"/infer": self.inner.infer, "/evidence": self.inner.evidence})


@bentoml.service(  # type: ignore[operator]  # a module of that name hides the function from mypy
    name="runner",
    service_class=RunnerService,
    workers=max(1, deployment.gpus),
    resources={"gpu": deployment.gpus} if deployment.gpus else {},
    # By default the client closes its session every 100 requests, and calls in flight with it.
    runner_connection={"max_requests": 10**9, "max_age": 1e9},
    **SERVICE_OPTIONS,
)
class Runner:
    """Owns one engine and batches across all API workers."""

    def __init__(self) -> None:
        logs.configure(settings, process_name("runner"))
        served, shadow = deployment.load_models()
        engine, infer = deployment.start_engine(worker_number(), served, shadow)
        self._is_right = verify_or_exit(engine, served.reference(deployment.runtime), is_alone=deployment.gpus <= 1)
        if self._is_right:
            logger.info("proven", extra={"model": deployment.tag, "runtime": deployment.runtime})
        self._engine = LocalEngine(engine, infer)
        # Batches span all workers: on a GPU, up to the largest CUDA graph.
        most = runtimes.graphed_images(served.config.input_size) if deployment.gpus else DEFAULT_BATCH
        self._queue = Batcher(
            self._engine.infer,
            max_batch=most if settings.max_batch == "auto" else settings.max_batch,
            observe=metrics.BATCH_IMAGES.observe,
        )
        metrics.BATCH_LIMIT.set(self._queue.max_batch)

    @bentoml.on_startup
    async def start_heartbeat(self) -> None:
        self._heartbeat = asyncio.create_task(beat(process_name("runner")))

    async def __is_ready__(self) -> bool:
        return self._is_right

    async def infer(self, request: Request) -> Response:
        """(N, H, W, 3) uint8 pixels to (N, K + 1) float32 outputs."""
        return await self._answer(self._queue, request)

    async def evidence(self, request: Request) -> Response:
        """(N, H, W, 3) uint8 pixels to (N, h, w, K) float32 evidence."""
        return await self._answer(self._engine.evidence, request)

    async def _answer(self, compute: Callable[[Pixels], Awaitable[Results]], request: Request) -> Response:
        if not self._is_right:
            return Response(status_code=HTTPStatus.SERVICE_UNAVAILABLE)
        pixels = arrays.unpack(await request.body(), request.headers[arrays.SHAPE], np.uint8)
        body, headers = arrays.pack(await compute(pixels))
        if deployment.gpus > 1 and random.random() < REBALANCE:
            headers["connection"] = "close"
        return Response(body, headers=headers)


def worker_number() -> int:
    """Which of the processes of its service this one is, from 1 on."""
    return bentoml.server_context.worker_index or 1


def process_name(kind: str) -> str:
    """Name of this process in its log lines, log files and heartbeat."""
    return f"{kind}-{worker_number()}"


def json_response(document: bytes) -> Response:
    return Response(document, media_type="application/json")


class ClassifierService(LeanService):
    """Wraps BentoML's application in the gateway, with the model card and the demo page beside its endpoints."""

    def on_load_bento(self, bento: bentoml.Bento) -> None:
        """Use this machine's topology; BentoML's own method fails if the build machine's had no runner."""
        for service in self.all_services().values():
            service.bento = bento

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        app = super().to_asgi(is_main)
        assert isinstance(app, Starlette)
        app.add_route("/model", lambda request: get_current_service().card(), ["GET"])
        if is_main:
            version = bentoml.server_context.bento_version or "development"
            document = orjson.dumps(describe(version, asks_for_keys=deployment.keys is not None))
            # Ahead of BentoML's own route for that path.
            app.router.routes.insert(0, Route("/docs.json", lambda request: json_response(document)))
        accounting = Accounting.open(settings, deployment.tag, deployment.keys, deployment.usage, process_name("api"))
        bodies = Bodies(MAX_HELD_BODIES * settings.max_body_bytes)
        endpoints = {method.route: method.func for method in self.apis.values()}
        direct = bypass(app, endpoints)
        # API keys require 401 before 429, and the audit log a line for each request: the load shedder can do neither.
        if not (deployment.keys or settings.audit_directory):
            count = direct.count if isinstance(direct, MetricsMiddleware) else None
            shedder = LoadShedder(
                endpoints, lambda *load: get_current_service().admit(*load), settings.log_requests, count
            )
            connections.guard(shedder)
        return Gateway(direct, PATHS, Page(), settings.log_requests, bodies, accounting)


@bentoml.service(  # type: ignore[operator]  # as above
    name="classifier",
    workers=deployment.workers,
    service_class=ClassifierService,
    image=IMAGE,
    envs=[{"name": "MODEL", "value": deployment.tag}],  # for a Bento, which holds no other model
    **SERVICE_OPTIONS,
)
class Classifier:
    """Classifies images: POST one to /classify, or several to /classify/batch."""

    if deployment.topology == "runner":
        runner = bentoml.depends(Runner)  # type: ignore[call-overload]  # as above

    def __init__(self) -> None:
        logs.mute_native_code()
        logs.configure(settings, process_name("api"))
        if settings.drain_seconds:
            draining.install(settings.drain_seconds)
        self._served, shadow = deployment.load_models()
        self._reference = self._served.reference(deployment.runtime)
        self._classifier = Calibrated(self._served.config, self._reference, settings.foreign_rate)
        self._drift = Drift(self._served.config, self._reference)
        self._engine: EngineClient = (
            RunnerClient(self.runner)
            if deployment.topology == "runner"
            else LocalEngine(*deployment.start_engine(worker_number(), self._served, shadow), concurrency=CONCURRENCY)
        )
        self._queue = Batcher(
            self._infer,
            max_batch=DEFAULT_BATCH if settings.max_batch == "auto" else settings.max_batch,
            max_queue=settings.max_queue,
            max_wait=settings.max_wait,
            concurrency=self._engine.concurrency,
            # The runner counts its own batches, which span all workers.
            observe=metrics.BATCH_IMAGES.observe if isinstance(self._engine, LocalEngine) else lambda size: None,
            report=metrics.QUEUE_IMAGES.set,
        )
        self._readiness = Readiness(
            self._engine, self._queue, self._reference, deployment.runtime, settings.max_queue, self._on_verified
        )
        # An explanation is one batch of views, so bounding the queue by images bounds it by explanations too.
        most = max(VIEWS, settings.max_queue)
        explanations = Batcher(self._engine.evidence, max_batch=VIEWS, max_queue=most)
        replies = Replies(deployment.tag, self._classifier)
        sandbox = Sandbox(settings.max_pixels)
        self._pipeline = Pipeline(settings, self._classifier, replies, self._drift, self._queue, explanations, sandbox)
        self._announce()
        # What exists now stays for good: keep the garbage collector from ever traversing it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)

    def _announce(self) -> None:
        """Report what is served in the metrics and the log."""
        runtime, topology = deployment.runtime, deployment.topology
        metrics.WORKERS.set(deployment.workers)
        metrics.BATCH_LIMIT.set(self._queue.max_batch)
        for artifact in self._served.artifacts:
            metrics.MODEL_INFO.labels(artifact.config.name, artifact.version, runtime, topology).set(1)
        loaded = {"model": deployment.tag, "runtime": runtime, "topology": topology, "measured": deployment.measured}
        logger.info("loaded", extra=loaded)
        if self._classifier.foreign_warning:
            logger.warning("foreign images are not detected", extra={"reason": self._classifier.foreign_warning})

    async def _infer(self, images: Pixels) -> Scores:
        try:
            outputs = await self._engine.infer(images)
        except ApiError:  # the runner is gone
            self._readiness.is_verified = False
            raise
        if self._readiness.is_verified:  # the reference images are not traffic
            self._drift.count_images(images)
        return self._classifier.score(outputs)

    @bentoml.on_startup
    async def verify_at_startup(self) -> None:
        self._verification = asyncio.create_task(self._readiness.check_when_possible())

    @bentoml.on_startup
    async def start_heartbeat(self) -> None:
        self._heartbeat = asyncio.create_task(beat(process_name("api")))

    async def __is_ready__(self) -> bool:
        """Asked by BentoML for ``GET /readyz``."""
        return await self._readiness.check()

    def _on_verified(self) -> None:
        logger.info("ready", extra={"model": deployment.tag, "runtime": deployment.runtime})
        if settings.max_batch == "auto" and isinstance(self._engine, LocalEngine):
            # In a context of its own: it does not belong to the request that triggered it.
            self._tuning = asyncio.create_task(
                tune(self._queue, self._engine, self._reference.images), context=contextvars.Context()
            )

    def admit(self, count: int, ahead: int) -> None:
        """Raise ``QueueFullError`` if ``count`` more images do not fit behind the ``ahead`` that are on their way."""
        self._queue.admit(count, ahead)

    def card(self) -> Response:
        """The reply of ``GET /model``."""
        return json_response(orjson.dumps(deployment.card(self._served)))

    @bentoml.api(route="/classify", input_spec=ClassifyInput, output_spec=ClassifyOutput)
    async def classify(self, request: Request) -> Response:
        """Classify one image: multipart field ``image``, a body of type ``image/*``, or JSON with base64."""
        return await self._answer(self._pipeline.classify, request)

    @bentoml.api(route="/classify/batch", input_spec=BatchInput, output_spec=BatchOutput)
    async def classify_batch(self, request: Request) -> Response:
        """Classify several images, results in order: repeated multipart field ``images``, or JSON with base64."""
        return await self._answer(self._pipeline.classify_batch, request)

    @bentoml.api(route="/explain", input_spec=ClassifyInput, output_spec=ExplainOutput)
    async def explain(self, request: Request) -> Response:
        """Explain the verdict on one image: a PNG overlay, or numbers for callers that accept ``application/json``."""
        return await self._answer(self._pipeline.explain, request)

    async def _answer(self, work: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
        limit = seconds = settings.request_timeout
        try:
            seconds = read_timeout(request, limit)
            async with asyncio.timeout(seconds):
                if not self._readiness.is_verified and not await self._readiness.check():
                    raise not_ready("the model is not ready yet")
                return await work(request)
        except Exception as error:
            answer = deadline_exceeded(seconds) if isinstance(error, TimeoutError) else from_exception(error)
            if answer.status == HTTPStatus.INTERNAL_SERVER_ERROR:
                logger.exception("request failed")
            elif answer.status == HTTPStatus.GATEWAY_TIMEOUT and seconds < limit:
                request.state.reason = "caller_deadline"  # not a failure of this service: counted separately
            return answer.response()


for service in (Runner, Classifier):
    service.models.extend(BentoModel(tag) for tag in (*deployment.tags, deployment.shadow) if tag)  # type: ignore[union-attr]  # as above
