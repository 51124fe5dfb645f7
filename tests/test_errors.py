"""What an error leaves behind. test_service.py checks the format of errors over HTTP."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from http import HTTPStatus

import pytest

from serving.errors import ApiError, from_exception


class Body:
    """Of a request; it may be megabytes."""


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
def test_an_error_that_was_answered_keeps_nothing_of_its_request_alive() -> None:
    """Raised as in pipeline.py, from an error found in an image's header: through a name that its frame still holds."""

    def refuse(body: Body) -> None:
        found = ApiError(HTTPStatus.BAD_REQUEST, "invalid_image", "what is wrong with it")
        raise found

    body = Body()
    held = weakref.ref(body)
    try:
        refuse(body)
    except Exception as error:
        from_exception(error).response()
    del body
    assert held() is None
