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
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import bentoml
import numpy as np
import orjson
from _bentoml_sdk.service import Service, get_current_service
from bentoml._internal.resource import CpuResource
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from bentoml.models import BentoModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

import settings as configuration
from model import runtimes, store
from model.artifact import ONNX_INT8, TORCH, Artifact, ArtifactError, Outputs
from model.batching import Batcher, Results
from model.classifier import Classifier as Calibrated
from model.classifier import Scores, VerificationError, check, verify
from model.ensemble import Ensemble, EnsembleError
from model.explain import VIEWS
from model.preprocess import Pixels
from model.runtimes import Runtime
from model.sandbox import Sandbox
from model.tuning import best_batch, compare, measure_batches
from serving import arrays, connections, draining, logs, metrics, supervision
from serving.access import GUARDED, AccessError, Keys
from serving.accounting import Accounting
from serving.bodies import Bodies
from serving.direct import MetricsMiddleware, bypass, remove_middleware
from serving.drift import Drift
from serving.engines import EngineClient, LocalEngine, RunnerClient
from serving.errors import ApiError, from_exception
from serving.gateway import UNLOGGED, Gateway
from serving.heartbeat import beat
from serving.openapi import describe
from serving.pipeline import Pipeline
from serving.replies import Replies
from serving.requests import read_timeout
from serving.schemas import BatchInput, BatchOutput, ClassifyInput, ClassifyOutput, ExplainOutput
from serving.shadow import Shadowed
from serving.shedding import LoadShedder
from serving.static import Page
from serving.usage import Usage

logger = logging.getLogger("classifier.service")

settings = configuration.load()
CORES = max(1, min(len(os.sched_getaffinity(0)), int(CpuResource.from_system())))
"""Whole CPUs available to this process, by its affinity and its container's quota."""
WORKERS = CORES if settings.workers == "cpu_count" else settings.workers
IS_WORKER = bentoml.server_context.worker_index is not None
if IS_WORKER:
    supervision.follow()
    connections.install()
    connections.Connection.delays_accept = WORKERS != 1
else:
    supervision.install()
MEASURED = "RUNTIME_MEASURED"
"""Environment variable that tells workers what was measured before they started."""


def load_models() -> tuple[Ensemble, Ensemble | None]:
    """The models that answer, and the shadow model if there is one."""
    served = Ensemble([store.get(tag) for tag in TAGS])
    shadow = Ensemble([store.get(SHADOW)]) if SHADOW else None
    if shadow:
        served.expect_interchangeable(shadow)
    return served, shadow


RUNTIME = settings.resolved_runtime()
MODEL = settings.model
try:
    MODEL = MODEL or store.packed() or settings.resolved_model()
    TAGS = store.resolve_all(MODEL)
    SHADOW = store.resolve(settings.shadow) if settings.shadow else None
    if not IS_WORKER:
        # One clear line now instead of a traceback from every worker.
        load_models()[0].reference(ONNX_INT8 if RUNTIME == "fastest" else RUNTIME)
    KEYS = Keys(settings.api_keys, is_running=IS_WORKER) if settings.api_keys else None
    USAGE = Usage(settings.usage_file, is_running=IS_WORKER) if KEYS else None
except (store.StoreError, ArtifactError, EnsembleError, OSError) as error:  # OSError: from the disk
    asked = f"MODEL={MODEL!r}" + (f", SHADOW={settings.shadow!r}" if settings.shadow else "")
    raise configuration.SettingsError(f"error: {asked}: {error}") from None
except AccessError as error:
    raise configuration.SettingsError(f"error: {error}") from None
TAG = ",".join(TAGS)
if RUNTIME == "fastest":
    try:
        measured = compare(load_models()[0], settings.threads)
    except runtimes.RuntimeUnavailableError as error:
        raise configuration.SettingsError(f"error: {error}") from None
    RUNTIME = measured.fastest
    os.environ[MEASURED] = orjson.dumps(measured._asdict()).decode()
# Workers started later must serve the same.
os.environ.update({"MODEL": TAG, "SHADOW": SHADOW or "", "RUNTIME": RUNTIME})
if USAGE:
    os.environ["USAGE_FILE"] = str(USAGE.file)
TOPOLOGY = settings.resolved_topology()
GPUS = runtimes.cuda_devices() if RUNTIME == TORCH else 0
if RUNTIME == TORCH and not GPUS and not IS_WORKER:
    logger.warning("RUNTIME='torch' finds no GPU and computes on the CPU, slower than the other runtimes")

DEFAULT_BATCH = 32
"""Batch size until the best one has been measured, and the most images in one hop to the runner."""
PATHS = (*GUARDED, *UNLOGGED)
MAX_HELD_BODIES = 5
"""Bodies of ``MAX_BODY_BYTES`` each that one worker may hold at once."""
CONCURRENCY = 1 if WORKERS >= CORES else 2
"""Batches in flight to an engine. With two, the engine need not wait for the event loop, which pays off where there are
fewer workers than cores; elsewhere, halving the batches costs more than that gains."""
VERIFY_SECONDS = 10.0
"""Time limit for the reference images; an engine that takes longer is hung."""
WRONG_SECONDS = 60.0
"""Delay before a wrong engine is verified again, or the runner that owns it restarted."""
REBALANCE = 0.01
"""Share of its replies with which one of several runners closes the connection, so that one that started later, as in
the place of another, gets its share of the workers: BentoML's client would never leave the others."""
RETRY_SECONDS = 0.5
"""Interval at which a starting runner is polled for readiness."""
IDLE_SECONDS = 0.05
"""Interval at which the measuring of batches checks whether the queue is empty."""
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
    workers=max(1, GPUS),
    resources={"gpu": GPUS} if GPUS else {},
    # By default the client closes its session every 100 requests, and calls in flight with it.
    runner_connection={"max_requests": 10**9, "max_age": 1e9},
    **SERVICE_OPTIONS,
)
class Runner:
    """Owns one engine and batches across all API workers."""

    def __init__(self) -> None:
        worker = bentoml.server_context.worker_index or 1
        logs.configure(settings, process_name("runner"))
        served, shadow = load_models()
        engine, answer = start_engine(worker, served, shadow)
        self._is_right = verify_runner(engine, served)
        self._engine = LocalEngine(engine, answer)
        # Batches span all workers: on a GPU, up to the largest CUDA graph.
        most = runtimes.graphed_images(served.config.input_size) if GPUS else DEFAULT_BATCH
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
        if GPUS > 1 and random.random() < REBALANCE:
            headers["connection"] = "close"
        return Response(body, headers=headers)


def verify_runner(engine: Runtime, served: Ensemble) -> bool:
    """Whether a runner's engine is right.

    The workers' own verification reaches only one of several runners, and none that replaces another. A wrong runner
    exits after ``WRONG_SECONDS``: it is then restarted, and may be right. Where there are other runners it accepts
    nothing until then, because a worker asks whichever is free.
    """
    try:
        verify(engine, served.reference(RUNTIME))
    except VerificationError as error:
        logger.critical("not ready", extra={"reason": str(error)})
        end = draining.exit_after(WRONG_SECONDS)
        if GPUS > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            end.join()
        return False
    logger.info("proven", extra={"model": TAG, "runtime": RUNTIME})
    return True


def start_engine(worker: int, served: Ensemble, shadow: Ensemble | None) -> tuple[Runtime, Callable[[Pixels], Outputs]]:
    """The warmed-up engine of a worker, and the function that infers with it, shadowed if there is a shadow model.

    Verifying the engine is up to ``__is_ready__``: a worker that exited here would be restarted for ever.
    """
    device = (worker - 1) % max(1, GPUS)
    engine = served.engine(RUNTIME, settings.threads, device)
    engine(served.reference(RUNTIME).images)
    return engine, Shadowed(engine, shadow.engine(RUNTIME, settings.threads, device)) if shadow else engine


def process_name(kind: str) -> str:
    """Name of this process in its log lines, log files and heartbeat."""
    return f"{kind}-{bentoml.server_context.worker_index or 1}"


def json_response(document: bytes) -> Response:
    return Response(document, media_type="application/json")


def describe_artifact(artifact: Artifact) -> dict[str, Any]:
    """The model card of ``artifact``, as ``GET /model`` shows it."""
    config = artifact.config
    return {
        "name": config.name,
        "version": artifact.version,
        "classes": config.classes,
        "input_size": config.input_size,
        "temperature": config.temperature,
        **{key: value for key, value in artifact.card.items() if key != "files"},
    }


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
            document = orjson.dumps(describe(version, asks_for_keys=KEYS is not None))
            # Ahead of BentoML's own route for that path.
            app.router.routes.insert(0, Route("/docs.json", lambda request: json_response(document)))
        accounting = Accounting.open(settings, TAG, KEYS, USAGE, process_name("api"))
        bodies = Bodies(MAX_HELD_BODIES * settings.max_body_bytes)
        endpoints = {method.route: method.func for method in self.apis.values()}
        direct = bypass(app, endpoints)
        # API keys require 401 before 429, and the audit log a line for each request: the load shedder can do neither.
        if not (KEYS or settings.audit_directory):
            count = direct.count if isinstance(direct, MetricsMiddleware) else None
            connections.Connection.shedder = LoadShedder(
                endpoints, lambda *load: get_current_service().admit(*load), settings.log_requests, count
            )
        return Gateway(direct, PATHS, Page(), settings.log_requests, bodies, accounting)


@bentoml.service(  # type: ignore[operator]  # as above
    name="classifier",
    workers=WORKERS,
    service_class=ClassifierService,
    image=IMAGE,
    envs=[{"name": "MODEL", "value": TAG}],  # for a Bento, which holds no other model
    **SERVICE_OPTIONS,
)
class Classifier:
    """Classifies images: POST one to /classify, or several to /classify/batch."""

    if TOPOLOGY == "runner":
        runner = bentoml.depends(Runner)  # type: ignore[call-overload]  # as above

    def __init__(self) -> None:
        worker = bentoml.server_context.worker_index or 1
        logs.mute_native_code()
        logs.configure(settings, process_name("api"))
        if settings.drain_seconds:
            draining.install(settings.drain_seconds)
        self._served, shadow = load_models()
        self._reference = self._served.reference(RUNTIME)
        self._classifier = Calibrated(self._served.config, self._reference, settings.foreign_rate)
        self._drift = Drift(self._served.config, self._reference)
        self._verified = False
        self._verifying = asyncio.Lock()
        self._next_verification = 0.0
        self._engine: EngineClient = (
            RunnerClient(self.runner)
            if TOPOLOGY == "runner"
            else LocalEngine(*start_engine(worker, self._served, shadow), concurrency=CONCURRENCY)
        )
        self._queue = Batcher(
            self._infer,
            max_batch=DEFAULT_BATCH if settings.max_batch == "auto" else settings.max_batch,
            max_queue=settings.max_queue,
            max_wait=settings.max_wait,
            concurrency=self._engine.concurrency,
            # The runner counts its own batches, which span all workers.
            observe=metrics.BATCH_IMAGES.observe if isinstance(self._engine, LocalEngine) else lambda size: None,
        )
        # An explanation is one batch of views, so bounding the queue by images bounds it by explanations too.
        most = max(VIEWS, settings.max_queue)
        explanations = Batcher(self._engine.evidence, max_batch=VIEWS, max_queue=most)
        replies = Replies(TAG, self._classifier)
        sandbox = Sandbox(settings.max_pixels)
        self._pipeline = Pipeline(settings, self._classifier, replies, self._drift, self._queue, explanations, sandbox)
        self._measured = orjson.loads(os.environ.get(MEASURED, "null"))
        self._announce()
        # What exists now stays for good: keep the garbage collector from ever traversing it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)

    def _announce(self) -> None:
        """Report what is served in the metrics and the log."""
        metrics.WORKERS.set(WORKERS)
        metrics.BATCH_LIMIT.set(self._queue.max_batch)
        for artifact in self._served.artifacts:
            metrics.MODEL_INFO.labels(artifact.config.name, artifact.version, RUNTIME, TOPOLOGY).set(1)
        loaded = {"model": TAG, "runtime": RUNTIME, "topology": TOPOLOGY, "measured": self._measured}
        logger.info("loaded", extra=loaded)
        if self._classifier.foreign_warning:
            logger.warning("foreign images are not detected", extra={"reason": self._classifier.foreign_warning})

    async def _infer(self, images: Pixels) -> Scores:
        metrics.QUEUE_IMAGES.set(self._queue.waiting)
        try:
            outputs = await self._engine.infer(images)
        except ApiError:  # the runner is gone
            self._verified = False
            raise
        metrics.QUEUE_IMAGES.set(self._queue.waiting)
        if self._verified:  # the reference images are not traffic
            self._drift.count_images(images)
        return self._classifier.score(outputs)

    @bentoml.on_startup
    async def verify_at_startup(self) -> None:
        """Verify each worker at startup: a probe reaches only one, and first requests would meet the others cold."""
        self._verification = asyncio.create_task(self._verify_when_possible())

    @bentoml.on_startup
    async def start_heartbeat(self) -> None:
        self._heartbeat = asyncio.create_task(beat(process_name("api")))

    async def _verify_when_possible(self) -> None:
        while not await self._engine.is_ready():  # noqa: ASYNC110  # another process sets no event
            await asyncio.sleep(RETRY_SECONDS)
        await self.__is_ready__()

    async def __is_ready__(self) -> bool:
        """Whether the reference images have come back right on the very path of requests; False from SIGTERM on."""
        if draining.started.is_set():
            return False
        if not await self._engine.is_ready():
            self._verified = False  # whatever replaces the runner must be verified again
            return False
        # One at a time: the first requests share a verification instead of each starting their own.
        async with self._verifying:
            if not self._verified and time.monotonic() >= self._next_verification:
                self._verified = await self._verify()
            return self._verified

    async def _verify(self) -> bool:
        """Whether the engine is right. If so, its batch sizes are measured in the background."""
        try:
            async with asyncio.timeout(VERIFY_SECONDS):
                check(await self._reference_outputs(), self._reference, RUNTIME)
        except VerificationError as error:
            # The next request or probe would find the same: no need to compute and log it each time.
            self._next_verification = time.monotonic() + WRONG_SECONDS
            logger.critical("not ready", extra={"reason": str(error)})
            return False
        except Exception as error:
            logger.warning("not ready yet", extra={"reason": repr(error)})
            return False
        logger.info("ready", extra={"model": TAG, "runtime": RUNTIME})
        if settings.max_batch == "auto" and isinstance(self._engine, LocalEngine):
            # In a context of its own: it does not belong to the request that triggered it.
            self._tuning = asyncio.create_task(self._tune(self._engine), context=contextvars.Context())
        return True

    async def _tune(self, engine: LocalEngine) -> None:
        """Measure batch sizes while no request waits, and adopt the best."""
        try:
            seconds = await measure_batches(engine.seconds_of, self._reference.images, self._until_idle)
        except Exception:
            logger.exception("measuring batch sizes failed")
            return
        self._queue.max_batch = best_batch(seconds)
        metrics.BATCH_LIMIT.set(self._queue.max_batch)
        rates = {size: round(size / taken, 1) for size, taken in seconds.items()}
        logger.info("measured batches", extra={"images_per_s": rates, "max_batch": self._queue.max_batch})

    async def _until_idle(self) -> None:
        while self._queue.waiting:  # noqa: ASYNC110  # an event would cost every request a little
            await asyncio.sleep(IDLE_SECONDS)

    async def _reference_outputs(self) -> Outputs:
        """Outputs for the reference images, in batches that even the smallest queue admits."""
        images = self._reference.images
        size = min(self._queue.max_batch, settings.max_queue)
        scores = np.concatenate([await self._queue(images[i : i + size]) for i in range(0, len(images), size)])
        return scores[:, : self._reference.outputs.shape[1]]

    def admit(self, count: int, ahead: int) -> None:
        """Raise ``QueueFullError`` if ``count`` more images do not fit behind the ``ahead`` that are on their way."""
        self._queue.admit(count, ahead)

    def card(self) -> Response:
        """The reply of ``GET /model``."""
        cards = [describe_artifact(artifact) for artifact in self._served.artifacts]
        about = {"runtime": RUNTIME, "topology": TOPOLOGY, "shadow": SHADOW, "measured": self._measured}
        members = {"members": cards} if len(cards) > 1 else {}
        return json_response(orjson.dumps({**cards[0], **about, **members}))

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
                if not self._verified and not await self.__is_ready__():
                    raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", "the model is not ready yet")
                return await work(request)
        except Exception as error:
            answer = from_exception(error)
            if answer.status == HTTPStatus.INTERNAL_SERVER_ERROR:
                logger.exception("request failed")
            elif answer.status == HTTPStatus.GATEWAY_TIMEOUT and seconds < limit:
                request.state.reason = "caller_deadline"  # not a failure of this service: counted separately
            return answer.response()


for service in (Runner, Classifier):
    service.models.extend(BentoModel(tag) for tag in (*TAGS, SHADOW) if tag)  # type: ignore[union-attr]  # as above
