"""From request to reply: read, decode, classify, reply."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from model import explain
from model.batching import Batcher
from model.classifier import DIGITS, Classifier, Prediction, Scores
from model.headers import Header, ImageError, has_exact_data, read_header
from model.preprocess import Pixels, inspect, render
from model.sandbox import DecoderError, Sandbox
from serving import accounting, metrics
from serving.accounting import Verdict
from serving.context import client_waits
from serving.decoding import DecodeQueue
from serving.drift import Drift
from serving.errors import ApiError, from_exception, no_evidence
from serving.options import Options, read_options
from serving.pacing import without_blocking
from serving.replies import Replies
from serving.requests import Item, read_image, read_images
from settings import Settings

logger = logging.getLogger("classifier.pipeline")

LARGE_BYTES, LARGE_PIXELS = 16_384, 65_536
"""From these sizes on, decoding takes longer than handing over to a process; a small file may hold a large image."""
JSON, PNG = "application/json", "image/png"


class Pipeline:
    """Every stage of a request; ``infer`` and ``evidence`` are the queues before the engine."""

    def __init__(
        self,
        settings: Settings,
        classifier: Classifier,
        replies: Replies,
        drift: Drift,
        infer: Batcher,
        evidence: Batcher,
        sandbox: Sandbox,
    ) -> None:
        self._settings, self._classifier, self._replies, self._drift = settings, classifier, replies, drift
        self._infer, self._evidence, self._sandbox = infer, evidence, sandbox
        self._size = classifier.config.input_size
        self._decode_queue = DecodeQueue(settings.max_wait)

    async def classify(self, request: Request) -> Response:
        options = read_options(request)
        stages = metrics.Stages()
        _, _, prediction = await self._classify_one(request, stages, self._admit_one)
        with stages.timed("reply"):
            document = orjson.dumps(self._reply(prediction, options))
        return Response(document, headers=stages.headers(), media_type=JSON)

    async def classify_batch(self, request: Request) -> Response:
        options = read_options(request)
        self._infer.admit(1)
        stages = metrics.Stages()
        with stages.timed("read"):
            items = await read_images(request, self._settings)
            headers = [self._inspect(item) async for item in without_blocking(items)]
        self._infer.admit(len(items))
        await self._charge(items, headers)
        with stages.timed("decode"):
            decoded = [await self._attempt(*pair) async for pair in without_blocking(zip(items, headers, strict=True))]
        images = [image for image in decoded if not isinstance(image, ApiError)]
        predictions = iter(self._classifier.predict(await self._scores(np.stack(images), stages)) if images else ())
        verdicts = [item if isinstance(item, ApiError) else next(predictions) for item in decoded]
        accounting.add_verdicts(items, verdicts)
        with stages.timed("reply"):
            results = [self._result(verdict, options) async for verdict in without_blocking(verdicts)]
            document = orjson.dumps({"results": results})
        return Response(document, headers=stages.headers(), media_type=JSON)

    def _result(self, verdict: Verdict, options: Options) -> dict[str, Any]:
        return verdict.body() if isinstance(verdict, ApiError) else self._reply(verdict, options)

    def _reply(self, prediction: Prediction, options: Options) -> dict[str, Any]:
        """What the caller is told about an image. Call it once for each, because it counts."""
        self._drift.count_verdict(prediction)
        reply = self._replies(prediction, options)
        if reply.get("abstained"):
            metrics.ABSTAINED_IMAGES.inc()
        return reply

    async def explain(self, request: Request) -> Response:
        """A picture of the evidence for the verdict, or its numbers if the caller accepts JSON."""
        options = read_options(request)
        if not self._classifier.config.has_evidence:
            raise no_evidence(self._classifier.config.name)
        stages = metrics.Stages()
        data, image, prediction = await self._classify_one(request, stages, self._admit_explanation)
        views = await asyncio.to_thread(explain.views, image)
        evidence = await self._evidence(views, client_waits())
        stride = self._classifier.config.stride
        heat = await asyncio.to_thread(explain.evidence_map, evidence, prediction.class_index, self._size, stride)
        reply = self._reply(prediction, options)
        if JSON in request.headers.get("accept", "").lower():
            reply["evidence"] = heat.astype(float).round(DIGITS).tolist()
            return Response(orjson.dumps(reply), headers=stages.headers(), media_type=JSON)
        original = await self._in_sandbox(self._sandbox.shrink, data, explain.MAX_SIDE)
        picture = await asyncio.to_thread(explain.overlay, original, heat)
        return Response(picture, headers=stages.headers(), media_type=PNG)

    async def _classify_one(
        self, request: Request, stages: metrics.Stages, admit: Callable[[], None]
    ) -> tuple[bytes, Pixels, Prediction]:
        """The image of a request, as sent and as decoded, and its prediction."""
        admit()  # refuse before doing any work
        with stages.timed("read"):
            data = await read_image(request, self._settings)
            header = self._inspect(data)
        admit()
        await self._charge([data], [header])
        with stages.timed("decode"):
            image = await self._decode(data, header)
        prediction = self._classifier.predict(await self._scores(image[None], stages))[0]
        accounting.add_verdicts([data], [prediction])
        return data, image, prediction

    def _admit_one(self) -> None:
        self._infer.admit(1)

    def _admit_explanation(self) -> None:
        self._infer.admit(1)
        self._evidence.admit(explain.VIEWS)

    async def _scores(self, images: Pixels, stages: metrics.Stages) -> Scores:
        with stages.timed("classify"):
            return await self._infer(images, client_waits())

    def _inspect(self, item: Item) -> Header | ApiError:
        """The header of an image, or what is wrong with the image."""
        if isinstance(item, ApiError):
            return item
        try:
            return inspect(item, self._settings.max_pixels)
        except ImageError as error:
            return from_exception(error)

    async def _charge(self, items: Sequence[Item], headers: Sequence[Header | ApiError]) -> None:
        """Charge a key for a request's images; raises ``QueueFullError`` if they would wait too long to be decoded."""
        if all(map(is_decoded_here, items, headers)):
            await accounting.charge(items)
        else:
            with self._decode_queue.reserved():
                await accounting.charge(items)

    async def _decode(self, data: bytes, header: Header | ApiError) -> Pixels:
        if isinstance(header, ApiError):
            raise header
        if is_decoded_here(data, header):
            return render(data, header, self._size)
        return await self._in_sandbox(self._sandbox.render, data, self._size)

    async def _in_sandbox(self, decode: Callable[..., Pixels], data: bytes, *how: Any) -> Pixels:
        return await self._decode_queue(client_waits(), partial(_reporting_deaths, decode), data, *how)

    async def _attempt(self, item: Item, header: Header | ApiError) -> Pixels | ApiError:
        """One decoded image of a batch, or what is wrong with it: it fails alone."""
        if isinstance(item, bytes):
            try:
                return await self._decode(item, header)
            except (ValueError, ApiError) as error:
                item = from_exception(error)
        metrics.REJECTED.labels(item.code).inc()
        return item


def _reporting_deaths(decode: Callable[..., Pixels], data: bytes, *how: Any) -> Pixels:
    """``decode(data, *how)``; it reports here, in the thread, because the caller may not wait for the outcome."""
    try:
        return decode(data, *how)
    except DecoderError:
        metrics.DECODER_DEATHS.inc()
        logger.warning(
            "a decoder died", extra={"sha256": hashlib.sha256(data).hexdigest(), **read_header(data)._asdict()}
        )
        raise


def is_decoded_here(item: Item, header: Header | ApiError) -> bool:
    """Whether an image is small and safe to decode in this process; one that is invalid needs no decoder either."""
    if isinstance(item, ApiError) or isinstance(header, ApiError):
        return True
    is_small = len(item) < LARGE_BYTES and header.width * header.height < LARGE_PIXELS
    return header.is_plain and is_small and (header.format != "PNG" or has_exact_data(item))
