"""Flask, for gunicorn's threaded workers."""

from __future__ import annotations

import orjson
from flask import Flask, Response, request

from tests.benchmark.peers import common

app = Flask(__name__)


@app.post("/classify")
def classify() -> Response:
    (result,) = common.classify([request.files["image"].read()])
    return Response(orjson.dumps(result), mimetype="application/json")


@app.post("/classify/batch")
def classify_batch() -> Response:
    data = [image.read() for image in request.files.getlist("images")]
    return Response(common.classify_json(data), mimetype="application/json")
