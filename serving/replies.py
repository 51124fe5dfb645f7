"""Replies of the API, made of predictions; and the pydantic models that describe them.

The models are for ``/docs.json`` and BentoML's clients: replies are made without them, which is faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from model.classifier import Classifier, Prediction
from serving.context import request_id
from serving.errors import Failure
from serving.options import Options


class Ranked(BaseModel):
    class_index: int
    class_name: str
    probability: float = Field(ge=0, le=1, description="Calibrated.")


class Classification(BaseModel):
    predicted_class: int | None = Field(description="Index of the most probable class; null when abstained.")
    class_name: str | None = Field(description="Its name; null when abstained.")
    confidence: float = Field(ge=0, le=1, description="Calibrated probability of that class.")
    all_probabilities: dict[str, float] = Field(
        default={}, description="Calibrated probability of each class index; they sum to 1. Not with ?top."
    )
    top: list[Ranked] = Field(default=[], description="With ?top: that many classes, the most probable first.")
    in_distribution: bool = Field(description="Whether the image resembles the training images.")
    prediction_set: list[str] = Field(
        default=[],
        description="With ?prediction_set: classes that include the true one at that level, likeliest first.",
    )
    abstained: bool = Field(
        default=False, description="With ?abstain_below or ?abstain_foreign: whether there is no verdict."
    )
    model: str = Field(
        description="name:version of the model; for an ensemble, those of all its members, comma-separated."
    )
    request_id: str


class Explanation(Classification):
    evidence: list[list[float]] = Field(
        description="Share of the evidence at each pixel of the network's input, row by row."
    )


class Batch(BaseModel):
    results: list[Classification | Failure]


class Replies:
    """Turns predictions of the model ``tag`` into replies."""

    def __init__(self, tag: str, classifier: Classifier) -> None:
        self._tag, self._classifier = tag, classifier
        self._indices = [str(index) for index in range(len(classifier.config.classes))]

    def __call__(self, prediction: Prediction, options: Options) -> dict[str, Any]:
        reply = {
            "predicted_class": prediction.class_index,
            "class_name": prediction.class_name,
            "confidence": prediction.confidence,
            **self._probabilities(prediction, options.top),
            "in_distribution": prediction.in_distribution,
            "model": self._tag,
            "request_id": request_id.get(),
        }
        if options.prediction_set is not None:
            reply["prediction_set"] = self._set(prediction, options.prediction_set)
        if options.may_abstain:
            self._abstain(prediction, options, reply)
        return reply

    def _probabilities(self, prediction: Prediction, top: int | None) -> dict[str, Any]:
        """Of all classes, or of the ``top`` most probable ones: of a thousand classes, few are of interest."""
        rounded = prediction.rounded
        if top is None:
            return {"all_probabilities": dict(zip(self._indices, rounded, strict=True))}
        names, ranking = self._classifier.config.classes, np.argsort(-prediction.probabilities, kind="stable")
        ranked = [
            {"class_index": index, "class_name": names[index], "probability": rounded[index]}
            for index in ranking[:top].tolist()
        ]
        return {"top": ranked}

    def _set(self, prediction: Prediction, level: float) -> list[str]:
        """Class names, likeliest first."""
        chosen = self._classifier.prediction_set(prediction.probabilities, level)
        chosen.sort(key=lambda index: -prediction.probabilities[index])
        return [self._classifier.config.classes[index] for index in chosen]

    @staticmethod
    def _abstain(prediction: Prediction, options: Options, reply: dict[str, Any]) -> None:
        too_unsure = options.abstain_below is not None and prediction.confidence < options.abstain_below
        reply["abstained"] = too_unsure or (options.abstain_foreign and not prediction.in_distribution)
        if reply["abstained"]:
            reply["predicted_class"] = reply["class_name"] = None
