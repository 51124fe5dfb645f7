"""FastAPI: parsing on the event loop, inference in Starlette's thread pool."""

from __future__ import annotations

import orjson
from fastapi import FastAPI, Response, UploadFile
from fastapi.concurrency import run_in_threadpool

from tests.benchmark.peers import common

app = FastAPI()


@app.post("/classify")
async def classify(image: UploadFile) -> Response:
    (result,) = await run_in_threadpool(common.classify, [await image.read()])
    return Response(orjson.dumps(result), media_type="application/json")


@app.post("/classify/batch")
async def classify_batch(images: list[UploadFile]) -> Response:
    data = [await image.read() for image in images]
    return Response(await run_in_threadpool(common.classify_json, data), media_type="application/json")
