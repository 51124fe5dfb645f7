"""Predictions as the API says them."""

from __future__ import annotations

from typing import Any

from model.classifier import Classifier, Prediction
from serving import metrics
from serving.context import request_id
from serving.drift import Drift
from serving.requests import Options

DIGITS = 6
"""Of a probability."""


class Replies:
    """Makes replies in the name of the model ``tag``, and counts what they say."""

    def __init__(self, tag: str, classifier: Classifier, drift: Drift) -> None:
        self._tag, self._classifier, self._drift = tag, classifier, drift
        # At 0 from the start, and at hand for every image.
        self._images = [metrics.IMAGES.labels(name) for name in classifier.config.classes]

    def __call__(self, prediction: Prediction, options: Options) -> dict[str, Any]:
        self._images[prediction.class_index].inc()
        metrics.CONFIDENCE.observe(prediction.confidence)
        self._drift.hear(prediction)
        if not prediction.in_distribution:
            metrics.FOREIGN_IMAGES.inc()
        reply = {
            "predicted_class": prediction.class_index,
            "class_name": prediction.class_name,
            "confidence": round(prediction.confidence, DIGITS),
            "all_probabilities": {str(i): round(p, DIGITS) for i, p in enumerate(prediction.probabilities.tolist())},
            "in_distribution": prediction.in_distribution,
            "model": self._tag,
            "request_id": request_id.get(),
        }
        if options.prediction_set is not None:
            reply["prediction_set"] = self._set(prediction, options.prediction_set)
        if options.may_abstain:
            self._abstain(prediction, options, reply)
        return reply

    def _set(self, prediction: Prediction, level: float) -> list[str]:
        """Class names, the likeliest first."""
        chosen = self._classifier.prediction_set(prediction.probabilities, level)
        chosen.sort(key=lambda index: -prediction.probabilities[index])
        return [self._classifier.config.classes[index] for index in chosen]

    def _abstain(self, prediction: Prediction, options: Options, reply: dict[str, Any]) -> None:
        too_unsure = options.abstain_below is not None and prediction.confidence < options.abstain_below
        reply["abstained"] = too_unsure or (options.abstain_foreign and not prediction.in_distribution)
        if reply["abstained"]:
            metrics.ABSTAINED_IMAGES.inc()
            reply["predicted_class"] = reply["class_name"] = None
