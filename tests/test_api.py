"""``/docs.json`` against the server that it describes, by schemathesis: it generates requests and checks the replies.

Requests are made both from what the document allows and from what it forbids; status, type, headers and content of each
reply must conform to it.
"""

from __future__ import annotations

import base64
from http import HTTPStatus

import orjson
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.checks import negative_data_rejection, not_a_server_error

from serving.openapi import describe
from tests import seeds
from tests.live import Server

IMAGES = st.sampled_from(list(seeds.images().values()))
EXAMPLES = 40
"""Requests per endpoint."""

schemathesis.openapi.format("binary", IMAGES)
schemathesis.openapi.format("base64-image", IMAGES.map(lambda image: base64.b64encode(image).decode()))
schemathesis.openapi.media_type("image/*", IMAGES)


DOCUMENT = describe("1", asks_for_keys=False)
api = schemathesis.openapi.from_dict(DOCUMENT)


@api.parametrize()
@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])
def test_the_server_conforms_to_its_api_document(case: schemathesis.Case, embedded: Server) -> None:
    response = case.call(base_url=embedded.url)
    forgiven = []
    if response.status_code == HTTPStatus.GATEWAY_TIMEOUT:  # a deadline too short to meet, missed as documented
        forgiven.append(not_a_server_error)
    if response.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:  # a refusal too, though not to schemathesis
        forgiven.append(negative_data_rejection)
    if (case.path, response.status_code) == ("/classify/batch", HTTPStatus.OK):  # invalid images fail singly
        forgiven.append(negative_data_rejection)
    case.validate_response(response, excluded_checks=forgiven)


def test_the_document_is_the_one_the_server_sends(embedded: Server) -> None:
    served = requests.get(f"{embedded.url}/docs.json", timeout=60).json()
    assert {**served, "info": DOCUMENT["info"]} == orjson.loads(orjson.dumps(DOCUMENT))
