"""Request and reply schemas for BentoML and its clients.

The inputs hand the request itself to the endpoint instead of parsing it. ``serving.requests`` does the parsing: every
mistake gets its own 4xx, and none of BentoML's defaults fetches URLs or writes temporary files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from _bentoml_sdk.io_models import IODescriptor, IORootModel
from bentoml.validators import ContentType
from pydantic import Field

from serving.replies import Classification


class _Unparsed(IODescriptor):
    @classmethod
    async def from_http_request(cls, request: Any, serde: Any) -> Any:
        return _Handle(request)


class _Handle:
    """Has one field, from which BentoML takes the endpoint's only argument."""

    model_fields: ClassVar[tuple[str, ...]] = ("request",)

    def __init__(self, request: Any) -> None:
        self.request = request


class ClassifyInput(_Unparsed):
    image: Path = Field(description="The image file: JPEG, PNG, WebP, BMP, GIF or TIFF.")


class BatchInput(_Unparsed):
    images: list[Path] = Field(description="The image files, one per part.")


class ClassifyOutput(Classification, IODescriptor):  # type: ignore[misc]  # BentoML's own mix-in
    pass


class ExplainOutput(IORootModel[Annotated[Path, ContentType("image/png")]]):
    # Not ``Explanation``: BentoML's client does not ask for JSON, and gets the picture.
    pass


class BatchOutput(IODescriptor):
    # Not ``Batch``: BentoML's schema keeps only the first of two alternatives, and its client drops every field that
    # the schema does not name. A failed image would come out as {}.
    results: list[dict[str, Any]]
