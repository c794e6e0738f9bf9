"""Whatever is sent, the answer is an error object and the service goes on."""

from __future__ import annotations

import httpx

from deployments.http.errors import ErrorResponse
from tests.unit.http.fake import FakeService
from tests.unit.http.malformed import IMAGES, malformed


def test_five_hundred_malformed_requests_are_each_refused_with_the_error_object(
    http: httpx.Client, service: FakeService
) -> None:
    for number, request in enumerate(malformed(seed=6, count=500)):
        response = request.send(http)
        assert response.status_code == request.status, (number, request, response.text)
        if request.method != "HEAD":
            error = ErrorResponse.model_validate(response.json()).error
            assert error.message and error.code and error.type == "invalid_request_error"
            assert len(response.content) < 2000
    assert not service.asked
    assert http.post(IMAGES, json={"prompt": "a lake"}).status_code == 200
