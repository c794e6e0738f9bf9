"""A service with keys and tight limits answers as its document says, and nothing stops it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from deployments.http.errors import ErrorResponse
from tests.unit.http.conformance import schemathesis, schemathesis_of_forms
from tests.unit.http.malformed import IMAGES, malformed

from .conftest import HTTP, Service, until

pytestmark = pytest.mark.ray

KEY = {"Authorization": "Bearer right"}
# Whatever is asked for within these is drawn in a moment, and what asks for the defaults is within these.
LIMITS = {
    "max_side": 128,
    "max_pixels": 128 * 128,
    "max_steps": 25,
    "max_images": 2,
    "max_previews": 2,
    "max_clip_skip": 1,
}
PREFIX = "/strict"
URL = HTTP + PREFIX


@pytest.fixture(scope="module")
def strict(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Beside the service another, with the first pool alone, a key and `LIMITS`, under a prefix."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("right\n")
    args = {
        "pools": [{**service.args["pools"][0], "workers": 1}],
        "limits": LIMITS,
        "http": {"keys_file": str(file)},
    }
    service.deploy({"name": "strict", "route_prefix": PREFIX, "args": args})
    until(lambda: service.is_up("strict"), 240)
    yield service
    service.deploy()


def draws(service: Service) -> bool:
    body = {"prompt": "a lake", "size": "64x64", "num_inference_steps": 2, "model": service.models["pair"]}
    return httpx.post(f"{URL}{IMAGES}", json=body, headers=KEY, timeout=60).is_success


def test_the_openai_client_is_let_in_with_its_key_only(strict: Service) -> None:
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="right", max_retries=0) as client:
        assert client.images.generate(
            prompt="a lake", size="64x64", extra_body={"num_inference_steps": 2}
        ).data
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.images.generate(prompt="a lake")
        assert refused.value.code == "invalid_api_key"


def test_five_hundred_malformed_requests_are_each_refused_and_the_service_goes_on(strict: Service) -> None:
    with httpx.Client(base_url=URL, headers=KEY, timeout=30) as http:
        for number, request in enumerate(malformed(seed=66, count=500)):
            response = request.send(http)
            assert response.status_code == request.status, (number, request, response.text)
            if request.method != "HEAD":
                assert ErrorResponse.model_validate(response.json()).error.code
    assert draws(strict)


def test_schemathesis_finds_no_violation(strict: Service, tmp_path: Path) -> None:
    before = drawn()
    schemathesis(URL, "right", examples=30, folder=tmp_path)
    schemathesis_of_forms(URL, "right", examples=10, folder=tmp_path)
    assert drawn() > before + 10, "hardly a valid request was tried"
    assert draws(strict)


def drawn() -> int:
    pools = httpx.get(f"{URL}/v1/fleet", headers=KEY, timeout=30).json()["pools"]
    return sum(
        host["outcomes"].get("finished", 0) for pool in pools.values() for host in pool["hosts"].values()
    )
