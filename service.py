"""The BentoML services: HTTP in, HTTP out.

    bentoml serve service:Classifier

Embedded, every worker of ``Classifier`` owns an engine. As a runner, workers only decode and gather, and one
``Runner`` process per GPU batches across all of them. Which of the two follows from the hardware or from ``TOPOLOGY``.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import bentoml
import numpy as np
import orjson
from _bentoml_sdk.service import Service
from bentoml.models import BentoModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

import settings as configuration
from model import runtimes, store
from model.artifact import ArtifactError, Logits
from model.batching import Batcher, Engine
from model.classifier import Prediction, VerificationError, check, predictions, verify
from model.preprocess import Pixels, inspect, render
from serving import logs, metrics
from serving.context import request_id
from serving.errors import ApiError, from_exception
from serving.gateway import Gateway
from serving.openapi import describe
from serving.requests import Item, read_image, read_images
from serving.schemas import BatchInput, BatchOutput, ClassifyInput, ClassifyOutput

logger = logging.getLogger("classifier.service")

settings = configuration.load()
try:
    TAG = store.resolve(settings.model)
except (store.StoreError, ArtifactError) as error:
    raise configuration.SettingsError(f"error: MODEL={settings.model!r}: {error}") from None
os.environ["MODEL"] = TAG  # so that a worker that is started later serves the same version
RUNTIME = settings.resolved_runtime()
TOPOLOGY = settings.resolved_topology()
GPUS = runtimes.cuda_devices() if RUNTIME == runtimes.TORCH else 0

RUNNER_MAX_BATCH = 256
"""Images of one batch of the runner, gathered over all workers."""
RUNNER_HOPS = 4
"""Batches that one worker keeps on their way to the runner."""
LARGE_BYTES, LARGE_PIXELS = 16_384, 65_536
"""From here on decoding takes longer than handing it to a thread; a small file may well hold a large image."""
PATHS = (
    "/classify",
    "/classify/batch",
    "/model",
    "/livez",
    "/healthz",
    "/readyz",
    "/metrics",
    "/docs.json",
    "/schema.json",
)
VERIFY_SECONDS = 10.0
"""For the reference images; longer means that the engine hangs."""
HOUR = 3600.0
"""BentoML's own time limit stands behind ours and is never reached."""

SHARED: dict[str, Any] = {
    "traffic": {"timeout": HOUR},
    "logging": {"access": {"enabled": False}},
    "tracing": {"excluded_urls": ".*"},
}
# A distribution that BentoML has no recipe for: for "debian" it would install compilers and git, 0.6 GB of them.
IMAGE = bentoml.images.Image(base_image="python:3.11-slim", distro="slim")


@bentoml.service(  # type: ignore[operator]  # a module of that name hides the function from mypy
    name="runner",
    workers=max(1, GPUS),
    resources={"gpu": GPUS} if GPUS else {},
    # By default the client closes its session every 100 requests, and calls in flight with it.
    runner_connection={"max_requests": 10**9, "max_age": 1e9},
    **SHARED,
)
class Runner:
    """Owns one engine and batches over every API worker."""

    artifact_model = BentoModel(TAG)

    def __init__(self) -> None:
        worker = bentoml.server_context.worker_index or 1
        logs.configure(settings, f"runner-{worker}")
        artifact = store.get(TAG)
        self._runtime = runtimes.create(RUNTIME, artifact, settings.threads, (worker - 1) % max(1, GPUS))
        verify(self._runtime, artifact)

    @bentoml.api(batchable=True, max_batch_size=RUNNER_MAX_BATCH)
    def infer(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 pixels to (N, K) float32 logits."""
        return self._runtime(images)


def json_response(document: bytes) -> Response:
    return Response(document, media_type="application/json")


class ClassifierService(Service[Any]):
    """Puts the gateway around BentoML's application, and the model card beside its endpoints."""

    def on_load_bento(self, bento: bentoml.Bento) -> None:
        """Takes the services of this machine's topology; BentoML's own fails if the build machine's had no runner."""
        for service in self.all_services().values():
            service.bento = bento

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        app = super().to_asgi(is_main)
        assert isinstance(app, Starlette)
        app.add_route("/model", lambda request: bentoml.get_current_service().card(), ["GET"])
        if is_main:
            document = orjson.dumps(describe(self.openapi_spec.asdict()))
            # Before BentoML's own route of that path.
            app.router.routes.insert(0, Route("/docs.json", lambda request: json_response(document)))
        return Gateway(app, PATHS, settings.log_requests)


@bentoml.service(  # type: ignore[operator]  # as above
    name="classifier", workers=settings.workers, service_class=ClassifierService, image=IMAGE, **SHARED
)
class Classifier:
    """Classifies images: POST one to /classify, or several to /classify/batch."""

    artifact_model = BentoModel(TAG)
    if TOPOLOGY == "runner":
        runner = bentoml.depends(Runner)  # type: ignore[call-overload]  # as above

    def __init__(self) -> None:
        worker = bentoml.server_context.worker_index or 1
        logs.configure(settings, f"api-{worker}")
        self._artifact = store.get(TAG)
        self._config = self._artifact.config
        self._verified = False
        self._verifying = asyncio.Lock()
        self._decoders = ThreadPoolExecutor(2, "decode")
        if TOPOLOGY == "runner":
            self._batcher = self._queue(self._infer_remotely, RUNNER_HOPS)
        else:
            self._runtime = runtimes.create(RUNTIME, self._artifact, settings.threads, (worker - 1) % max(1, GPUS))
            verify(self._runtime, self._artifact)
            self._engine_thread = ThreadPoolExecutor(1, "engine")
            self._batcher = self._queue(self._infer_here, 1)
        metrics.MODEL_INFO.labels(self._config.name, self._artifact.version, RUNTIME, TOPOLOGY).set(1)
        logger.info("loaded", extra={"model": TAG, "runtime": RUNTIME, "topology": TOPOLOGY})

    def _queue(self, engine: Engine, concurrency: int) -> Batcher:
        return Batcher(
            engine,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            concurrency=concurrency,
            observe=metrics.BATCH_IMAGES.observe,
        )

    async def _infer_here(self, images: Pixels) -> Logits:
        metrics.QUEUE_IMAGES.set(self._batcher.waiting)
        with metrics.timed("infer"):
            return await asyncio.get_running_loop().run_in_executor(self._engine_thread, self._runtime, images)

    async def _infer_remotely(self, images: Pixels) -> Logits:
        metrics.QUEUE_IMAGES.set(self._batcher.waiting)
        with metrics.timed("infer"):
            try:
                return np.asarray(await self.runner.to_async.infer(images), np.float32)
            except Exception as error:
                logger.error("the runner failed", extra={"reason": repr(error)})
                raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", "the engine cannot be reached") from error

    async def __is_ready__(self) -> bool:
        """Ready once the reference images have come back right, on the very path that requests take."""
        # One at a time: the first requests wait for the verdict instead of each asking for their own.
        async with self._verifying:
            if self._verified:
                return True
            try:
                async with asyncio.timeout(VERIFY_SECONDS):
                    check(await self._reference_logits(), self._artifact, RUNTIME)
            except VerificationError as error:
                logger.critical("not ready", extra={"reason": str(error)})
                return False
            except Exception as error:
                logger.warning("not ready yet", extra={"reason": repr(error)})
                return False
            self._verified = True
            logger.info("ready", extra={"model": TAG, "runtime": RUNTIME})
            return True

    async def _reference_logits(self) -> Logits:
        """Logits of the reference images, in batches that the smallest queue admits."""
        images = self._artifact.reference().images
        size = min(settings.max_batch, settings.max_queue)
        return np.concatenate([await self._batcher(images[i : i + size]) for i in range(0, len(images), size)])

    def card(self) -> Response:
        """The reply of ``GET /model``."""
        config = self._config
        card = {key: value for key, value in self._artifact.card.items() if key != "files"}
        about = {
            "name": config.name,
            "version": self._artifact.version,
            "runtime": RUNTIME,
            "topology": TOPOLOGY,
            "classes": config.classes,
            "input_size": config.input_size,
            "temperature": config.temperature,
        }
        return json_response(orjson.dumps({**about, **card}))

    @bentoml.api(route="/classify", input_spec=ClassifyInput, output_spec=ClassifyOutput)
    async def classify(self, request: Request) -> Response:
        """Classify one image: multipart field ``image``, a body of type ``image/*``, or JSON with base64."""
        return await self._answer(self._classify, request)

    @bentoml.api(route="/classify/batch", input_spec=BatchInput, output_spec=BatchOutput)
    async def classify_batch(self, request: Request) -> Response:
        """Classify several images, results in order: repeated multipart field ``images``, or JSON with base64."""
        return await self._answer(self._classify_batch, request)

    async def _answer(self, work: Callable[[Request], Awaitable[dict[str, Any]]], request: Request) -> Response:
        try:
            async with asyncio.timeout(settings.request_timeout):
                if not self._verified and not await self.__is_ready__():
                    raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", "the model is not ready yet")
                return json_response(orjson.dumps(await work(request)))
        except Exception as error:
            answer = from_exception(error)
            if answer.status == HTTPStatus.INTERNAL_SERVER_ERROR:
                logger.exception("request failed")
            return answer.response()

    async def _classify(self, request: Request) -> dict[str, Any]:
        with metrics.timed("read"):
            data = await read_image(request, settings)
        with metrics.timed("decode"):
            image = await self._decode(data)
        logits = await self._logits(image[None])
        with metrics.timed("reply"):
            return self._result(predictions(logits, self._config)[0])

    async def _classify_batch(self, request: Request) -> dict[str, Any]:
        with metrics.timed("read"):
            items = await read_images(request, settings)
        with metrics.timed("decode"):
            decoded = [await self._attempt(item) for item in items]
        images = [image for image in decoded if not isinstance(image, ApiError)]
        logits = (
            await self._logits(np.stack(images)) if images else np.empty((0, len(self._config.classes)), np.float32)
        )
        with metrics.timed("reply"):
            verdicts = iter(predictions(logits, self._config))
            return {"results": [i.body() if isinstance(i, ApiError) else self._result(next(verdicts)) for i in decoded]}

    async def _logits(self, images: Pixels) -> Logits:
        with metrics.timed("classify"):
            try:
                return await self._batcher(images)
            finally:  # who gave up has left the queue too
                metrics.QUEUE_IMAGES.set(self._batcher.waiting)

    async def _decode(self, data: bytes) -> Pixels:
        header = inspect(data, settings.max_pixels)
        if len(data) < LARGE_BYTES and header.width * header.height < LARGE_PIXELS:
            return render(data, header, self._config.input_size)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, render, data, header, self._config.input_size)

    async def _attempt(self, item: Item) -> Pixels | ApiError:
        """One image of a batch, or what is wrong with it: it fails alone."""
        if isinstance(item, bytes):
            try:
                return await self._decode(item)
            except ValueError as error:
                item = from_exception(error)
        metrics.REJECTED.labels(item.code).inc()
        return item

    def _result(self, prediction: Prediction) -> dict[str, Any]:
        metrics.IMAGES.labels(prediction.class_name).inc()
        metrics.CONFIDENCE.observe(prediction.confidence)
        return {
            "predicted_class": prediction.class_index,
            "class_name": prediction.class_name,
            "confidence": round(prediction.confidence, 6),
            "all_probabilities": {str(i): round(p, 6) for i, p in enumerate(prediction.probabilities.tolist())},
            "model": TAG,
            "request_id": request_id.get(),
        }
