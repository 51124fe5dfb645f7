"""What an error leaves behind. The form of every one over HTTP: test_service.py."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from http import HTTPStatus

import pytest

from serving.errors import ApiError, from_exception


class Body:
    """Of a request, megabytes maybe."""


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
def test_an_error_that_was_answered_holds_nothing_of_its_request() -> None:
    """As pipeline.py raises the one that the header of an image gave: by the name that its frame knows it by."""

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
