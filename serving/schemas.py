"""What ``/docs.json`` is made of, and what BentoML's clients are told of requests and replies.

The inputs hand the request itself to the endpoint instead of parsing it: parsing is ``serving.requests``', where every
mistake gets its own 4xx, and no default of BentoML's fetches URLs or writes temporary files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from _bentoml_sdk.io_models import IODescriptor
from pydantic import BaseModel, Field


class _Unparsed(IODescriptor):
    @classmethod
    async def from_http_request(cls, request: Any, serde: Any) -> Any:
        return _Handle(request)


class _Handle:
    """Has the one field that the endpoint's only argument is taken from."""

    model_fields: ClassVar[tuple[str, ...]] = ("request",)

    def __init__(self, request: Any) -> None:
        self.request = request


class ClassifyInput(_Unparsed):
    image: Path = Field(description="The image file: JPEG, PNG, WebP, BMP, GIF or TIFF.")


class BatchInput(_Unparsed):
    images: list[Path] = Field(description="The image files, each a part of its own.")


class Classification(BaseModel):
    predicted_class: int | None = Field(description="Index of the most probable class; null when abstained.")
    class_name: str | None = Field(description="Its name; null when abstained.")
    confidence: float = Field(ge=0, le=1, description="Calibrated probability of that class.")
    all_probabilities: dict[str, float] = Field(
        description="Calibrated probability of each class index; they sum to 1."
    )
    in_distribution: bool = Field(description="Whether the image resembles the training images.")
    prediction_set: list[str] = Field(
        default=[], description="With ?prediction_set: classes that hold the true one at that level, likeliest first."
    )
    abstained: bool = Field(default=False, description="With ?abstain_below or ?abstain_foreign.")
    model: str = Field(description="name:version of the model; of an ensemble, all of them with commas between.")
    request_id: str


class Explanation(Classification):
    evidence: list[list[float]] = Field(
        description="The image as the network saw it, row by row: the share of the evidence that lies in each place."
    )


class Problem(BaseModel):
    code: str
    message: str
    request_id: str


class Failure(BaseModel):
    error: Problem


class Batch(BaseModel):
    results: list[Classification | Failure]


class ClassifyOutput(Classification, IODescriptor):  # type: ignore[misc]  # BentoML's own mix-in
    pass


class ExplainOutput(Explanation, IODescriptor):  # type: ignore[misc]  # as above
    pass


class BatchOutput(Batch, IODescriptor):  # type: ignore[misc]  # as above
    pass
