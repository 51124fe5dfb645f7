"""The service's own classes, in this process and without HTTP."""

from __future__ import annotations

import os
import threading

import numpy as np

import settings as configuration
from client.errors import ClientError
from client.rows import Reply
from model import store
from model.artifact import ArtifactError
from model.classifier import Classifier
from model.ensemble import Ensemble, EnsembleError
from model.preprocess import Pixels, preprocess
from model.runtimes import RuntimeUnavailableError
from model.tuning import compare
from model.verification import VerificationError, verify
from serving.errors import ApiError, from_exception
from serving.options import Options
from serving.replies import Replies
from serving.requests import bounded

ERRORS = (store.StoreError, ArtifactError, EnsembleError, RuntimeUnavailableError, VerificationError)


class Local:
    """What ``MODEL=model`` would serve, on all cores; the service's other settings apply, from the environment."""

    def __init__(self, model: str | None, prediction_set: float | None) -> None:
        store.set_environment()
        try:
            self._settings = configuration.load(**({"model": model} if model else {}))
            self._load()
        except (*ERRORS, configuration.SettingsError) as error:
            raise ClientError(str(error).removeprefix("error: ")) from error
        self._options = Options(prediction_set=prediction_set)
        self._engine_is_free = threading.Lock()

    def _load(self) -> None:
        tags = store.resolve_all(self._settings.resolved_model())
        served = Ensemble([store.get(tag) for tag in tags])
        threads = len(os.sched_getaffinity(0))
        runtime = self._settings.resolved_runtime(served.runtimes)
        if runtime == "fastest":
            runtime = compare(served, threads).fastest
        reference = served.reference(runtime)
        self._engine = served.engine(runtime, threads)
        verify(self._engine, reference)
        self._classifier = Classifier(served.config, reference, self._settings.foreign_rate)
        self._replies = Replies(",".join(tags), self._classifier)

    def __call__(self, images: list[bytes]) -> list[Reply]:
        decoded = [self._decode(image) for image in images]
        pixels = [image for image in decoded if not isinstance(image, ApiError)]
        if pixels:
            with self._engine_is_free:
                outputs = self._engine(np.stack(pixels))
        predictions = iter(self._classifier(outputs) if pixels else ())
        return [
            image.body() if isinstance(image, ApiError) else self._replies(next(predictions), self._options)
            for image in decoded
        ]

    def _decode(self, image: bytes) -> Pixels | ApiError:
        try:
            bounded(image, self._settings.max_image_bytes)
            return preprocess(image, self._classifier.config.input_size, self._settings.max_pixels)
        except (ValueError, ApiError) as error:
            return from_exception(error)
