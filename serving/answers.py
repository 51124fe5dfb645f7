"""The JSON of replies as pydantic models, for ``/docs.json`` and BentoML's clients."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Classification(BaseModel):
    predicted_class: int | None = Field(description="Index of the most probable class; null when abstained.")
    class_name: str | None = Field(description="Its name; null when abstained.")
    confidence: float = Field(ge=0, le=1, description="Calibrated probability of that class.")
    all_probabilities: dict[str, float] = Field(
        description="Calibrated probability of each class index; they sum to 1."
    )
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


class Problem(BaseModel):
    code: str
    message: str
    request_id: str


class Failure(BaseModel):
    error: Problem


class Batch(BaseModel):
    results: list[Classification | Failure]
