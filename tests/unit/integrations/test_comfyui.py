"""The nodes as ComfyUI loads and runs them, with stand-ins of its modules."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deployments.http import HttpConfig
from distriray.adapters import Lora
from distriray.errors import GangBroken, QueueFull
from distriray.picture import mask_of
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from tests.unit.conftest import serving
from tests.unit.http import fake
from tests.unit.http.fake import FakeService, result_of

FOLDER = Path(__file__).parents[3] / "integrations" / "comfyui"


class Interrupted(Exception):
    """As ComfyUI's own InterruptProcessingException."""


class Comfy:
    """What a node may see of ComfyUI: `bars` have what they were told, `cancelled` is the user's wish."""

    def __init__(self) -> None:
        self.bars: list[list[tuple[int, int, Any]]] = []
        self.cancelled = False

    def bar(self, total: int) -> Any:
        told: list[tuple[int, int, Any]] = []
        self.bars.append(told)

        class ProgressBar:
            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                told.append((value, total or 0, preview))

        return ProgressBar()

    def check(self) -> None:
        if self.cancelled:
            raise Interrupted


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Comfy:
    there = Comfy()
    utils, management, whole = (
        ModuleType(name) for name in ("comfy.utils", "comfy.model_management", "comfy")
    )
    utils.ProgressBar = there.bar  # type: ignore[attr-defined]
    management.throw_exception_if_processing_interrupted = there.check  # type: ignore[attr-defined]
    whole.utils, whole.model_management = utils, management  # type: ignore[attr-defined]
    for module in (whole, utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for variable in ("DISTRIRAY_API_KEY", "DISTRIRAY_URL"):
        monkeypatch.delenv(variable, raising=False)
    return there


@pytest.fixture
def nodes(comfy: Comfy) -> Iterator[dict[str, Any]]:
    """The folder's classes by name, loaded by its path as ComfyUI does."""
    name = "custom_nodes.distriray"
    spec = importlib.util.spec_from_file_location(
        name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    yield module.NODE_CLASS_MAPPINGS
    for loaded in [other for other in sys.modules if other.startswith(name)]:
        del sys.modules[loaded]


def defaults(node: Any) -> dict[str, Any]:
    """What ComfyUI passes for widgets that nobody touched."""
    found = {}
    for kinds in node.INPUT_TYPES().values():
        for name, kind in kinds.items():
            if isinstance(kind[0], list):
                found[name] = kind[0][0]
            elif kind[0] not in ("IMAGE", "MASK", "DISTRIRAY_CONTROL"):  # those are sockets
                found[name] = kind[1]["default"]
    return found


def run(node: Any, **inputs: Any) -> Any:
    """A node as it is executed: made, and its FUNCTION called with all inputs by name."""
    result = getattr(node(), node.FUNCTION)(**{**defaults(node), **inputs})
    assert isinstance(result, tuple) and len(result) == len(node.RETURN_TYPES)
    return result


def test_a_prompt_becomes_an_image_with_steps_and_previews_in_the_bar(
    nodes: dict[str, Any], comfy: Comfy
) -> None:
    service = FakeService()
    with serving(service) as url:
        image, seed = run(nodes["DistrirayGenerate"], url=f"{url}/", prompt="a lake", seed=5)
    assert image.shape == (1, 64, 96, 3) and image.dtype == torch.float32 and float(image.max()) <= 1
    assert seed == 5
    (asked,) = service.asked
    assert (asked.prompt, asked.seed, asked.previews) == ("a lake", 5, 3)
    assert asked.num_inference_steps is None and asked.guidance_scale is None and asked.width is None
    (told,) = comfy.bars
    assert [value for value, *_ in told] == list(range(1, 26)) and {total for _, total, _ in told} == {25}
    kind, preview, _ = told[-1][2]
    assert kind == "JPEG" and preview.size == (8, 12) and told[0][2] is None


def test_every_widget_reaches_the_service(nodes: dict[str, Any]) -> None:
    service = FakeService()
    with serving(service) as url:
        run(
            nodes["DistrirayGenerate"],
            url=url, prompt="a lake", seed=2, negative_prompt="fog", model="builtin:landscapes", steps=4,
            guidance=0.0, width=128, height=64, scheduler="euler", gang_size="2",
        )  # fmt: skip
    (asked,) = service.asked
    assert (asked.width, asked.height, asked.num_inference_steps, asked.gang_size) == (128, 64, 4, 2)
    assert (asked.guidance_scale, asked.scheduler, asked.negative_prompt) == (0.0, "euler", "fog")
    assert asked.model == "builtin:landscapes"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"width": 100, "height": 64}, "width 100 is not a multiple of 8; use 96 or 104"),
        ({"width": 64}, "both width and height"),
        ({"loras": "ink:much"}, "no name with a scale"),
        ({"model": "none"}, "there is no model 'none'"),
        ({"url": "localhost"}, "is no address of a service"),
        ({"url": "http://localhost:port"}, "is no address of a service"),
        ({"url": "http://[::1"}, "is no address of a service"),
        ({"url": "http://127.0.0.1:9/é"}, "cannot be reached"),
        ({"url": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    nodes: dict[str, Any], inputs: dict[str, Any], message: str
) -> None:
    with serving(FakeService()) as url, pytest.raises(RuntimeError, match=message):
        run(nodes["DistrirayGenerate"], **{"url": url, "prompt": "a lake", "seed": 0, **inputs})


@pytest.mark.parametrize(
    "service",
    [
        FakeService(refusal=QueueFull("every queue is full; try again in 3.0 s", 3.0)),
        FakeService(failure=GangBroken("every queue is full of broken gangs")),
    ],
)
def test_an_error_of_the_service_is_the_nodes(nodes: dict[str, Any], service: FakeService) -> None:
    with serving(service) as url, pytest.raises(RuntimeError, match="every queue is full"):
        run(nodes["DistrirayGenerate"], url=url)


def test_a_key_comes_from_the_environment(nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", "secret, schlüssel")
    with serving(FakeService(), HttpConfig(keys_env="SOME_KEYS")) as url:
        with pytest.raises(RuntimeError, match="a key is needed"):
            run(nodes["DistrirayGenerate"], url=url)
        monkeypatch.setenv("DISTRIRAY_API_KEY", "secret")
        monkeypatch.setenv("DISTRIRAY_URL", f"{url}/")
        assert run(nodes["DistrirayGenerate"], url=url)[0].shape[0] == 1
        monkeypatch.setenv("DISTRIRAY_API_KEY", "secret\n")
        with pytest.raises(RuntimeError, match="^the environment variable DISTRIRAY_API_KEY has") as refused:
            run(nodes["DistrirayGenerate"], url=url)
        assert "secret" not in str(refused.value)
    with serving(FakeService(), HttpConfig(keys_env="SOME_KEYS")) as url:
        monkeypatch.setenv("DISTRIRAY_URL", url)
        monkeypatch.setenv("DISTRIRAY_API_KEY", "schlüssel")
        assert run(nodes["DistrirayGenerate"], url=url)[0].shape[0] == 1
    kinds = nodes["DistrirayGenerate"].INPUT_TYPES()
    assert not any("key" in name for kind in kinds.values() for name in kind)


def test_a_workflow_cannot_have_the_key_sent_to_a_service_that_it_is_not_for(
    nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTRIRAY_API_KEY", "secret")
    service = FakeService()
    with serving(service) as url:
        port = url.rpartition(":")[2]
        for own in (
            None,
            f"http://127.0.0.1:{int(port) - 1}",
            f"https://127.0.0.1:{port}",
            "http://pictures",
        ):
            if own is not None:
                monkeypatch.setenv("DISTRIRAY_URL", own)
            for named in (url, f"http://user@127.0.0.1:{port}"):
                with pytest.raises(RuntimeError, match="DISTRIRAY_API_KEY is for .* set DISTRIRAY_URL"):
                    run(nodes["DistrirayGenerate"], url=named)
    assert not service.asked


def test_cancelling_in_comfyui_cancels_at_the_service(nodes: dict[str, Any], comfy: Comfy) -> None:
    service = FakeService(pace_s=0.2)
    with serving(service) as url:
        threading.Timer(0.6, setattr, (comfy, "cancelled", True)).start()
        with pytest.raises(Interrupted):
            run(nodes["DistrirayGenerate"], url=url)
        for _ in range(100):
            if service.ended:
                break
            time.sleep(0.05)
    assert service.ended == ["cancelled"]


@pytest.mark.timeout(10)
@pytest.mark.parametrize("service", [FakeService(pace_s=60), FakeService(wakes_s=60)], ids=["step", "host"])
def test_cancelling_waits_for_nothing_that_the_service_has_to_say(
    service: FakeService, nodes: dict[str, Any], comfy: Comfy
) -> None:
    with serving(service) as url:
        threading.Timer(0.3, setattr, (comfy, "cancelled", True)).start()
        with pytest.raises(Interrupted):
            run(nodes["DistrirayGenerate"], url=url)
        while service.ended != ["cancelled"]:
            time.sleep(0.01)


@pytest.mark.timeout(10)
def test_a_service_that_does_not_answer_can_be_cancelled(nodes: dict[str, Any], comfy: Comfy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Timer(0.3, setattr, (comfy, "cancelled", True)).start()
        with pytest.raises(Interrupted):
            run(nodes["DistrirayGenerate"], url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        heard, _ = silent.accept()
        with heard:
            while heard.recv(4096):  # to its end
                pass


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a program that answers its one client so, and then hears it to its end."""

    def talk() -> None:
        asked, _ = program.accept()
        with asked:
            answer(asked)
            while asked.recv(65536):  # what is not heard breaks the connection
                pass

    with socket.create_server(("127.0.0.1", 0)) as program:
        talking = threading.Thread(target=talk)
        talking.start()
        yield f"http://127.0.0.1:{program.getsockname()[1]}"
        talking.join()


@pytest.mark.timeout(10)
def test_a_stream_in_which_nothing_comes_any_more_is_an_error(
    nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a service whose machine has lost its network: nobody closes the connection."""

    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    def answer(asked: socket.socket) -> None:
        asked.sendall(f"{head}3\r\n:\n\n\r\n".encode())

    monkeypatch.setattr(sys.modules["custom_nodes.distriray.service"], "SILENCE_S", 0.3)
    with answering(answer) as url, pytest.raises(RuntimeError, match="the connection to .* broke: timed out"):
        run(nodes["DistrirayGenerate"], url=url)


def test_what_is_answered_by_another_program_is_quoted(nodes: dict[str, Any]) -> None:
    def answer(asked: socket.socket) -> None:
        asked.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<h1>Log in")
        asked.shutdown(socket.SHUT_WR)

    with answering(answer) as url, pytest.raises(RuntimeError, match="answered 200: <h1>Log in"):
        run(nodes["DistrirayGenerate"], url=url)


def test_what_is_transparent_in_a_picture_shows_white(
    nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def transparent(request: GenerationRequest) -> GenerationResult:
        image = Image.new("RGBA", (request.width or 0, request.height or 0), (200, 0, 0, 0))
        return result_of(request).model_copy(update={"images": [image]})

    monkeypatch.setattr(fake, "result_of", transparent)
    with serving(FakeService()) as url:
        image, _ = run(nodes["DistrirayGenerate"], url=url)
    assert image.shape == (1, 64, 96, 3) and float(image.min()) == 1.0


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "RGB"), (4, "RGBA")])
def test_a_picture_is_sent_with_the_channels_that_it_has(
    nodes: dict[str, Any], channels: int, mode: str
) -> None:
    service, image = FakeService(), torch.full((1, 64, 96, channels), 0.5)
    with serving(service) as url:
        run(nodes["DistrirayEdit"], url=url, image=image, prompt="a hill", seed=3)
    (asked,) = service.asked
    assert asked.image is not None and asked.image.load().mode == mode
    assert set(np.array(asked.image.load()).flat) == {128}


def test_pictures_and_masks_are_sent_one_by_one_and_come_back_as_a_batch(
    nodes: dict[str, Any], comfy: Comfy
) -> None:
    service = FakeService()
    image = (torch.arange(2 * 64 * 96 * 3).reshape(2, 64, 96, 3) % 256) / 255
    mask = torch.zeros(64, 96)
    mask[:8] = 1.0
    with serving(service) as url:
        (drawn,) = run(
            nodes["DistrirayEdit"],
            url=url, image=image, prompt="a hill", seed=3, mask=mask, strength=0.5, loras="ink:0.8", steps=6,
        )  # fmt: skip
    assert drawn.shape == image.shape
    first, second = service.asked
    assert (first.prompt, first.seed, first.strength) == ("a hill", 3, 0.5)
    assert first.loras == (Lora(name="ink", scale=0.8),)
    for asked, sent in zip((first, second), image, strict=True):
        assert asked.image is not None and asked.mask_image is not None
        assert np.array_equal(asked.image.load(), (sent.numpy() * 255).round())
        white = np.array(mask_of(asked.mask_image)) > 127
        assert np.array_equal(white, mask.numpy() > 0.5)
    assert [len(bar) for bar in comfy.bars] == [3, 3] and comfy.bars[0][1][2][1].size == (8, 12)


@pytest.mark.parametrize("node", ["DistrirayGenerate", "DistrirayEdit"])
def test_control_is_chained(nodes: dict[str, Any], node: str) -> None:
    service, add = FakeService(), nodes["DistrirayControl"]
    edges, depth = torch.zeros(1, 16, 24, 3), torch.ones(1, 8, 8, 3)
    (first,) = run(add, name="canny", image=edges, scale=0.7, end=0.5)
    (both,) = run(add, name=" depth", image=depth, start=0.25, control=first)
    on = {"image": torch.zeros(1, 64, 96, 3)} if node == "DistrirayEdit" else {}
    with serving(service) as url:
        run(nodes[node], url=url, prompt="a lake", seed=2, control=both, **on)
        run(nodes[node], url=url, prompt="a lake", seed=2, control=first, **on)
    canny, other = service.asked[0].control
    assert (canny.name, canny.scale, canny.start, canny.end) == ("canny", 0.7, 0.0, 0.5)
    assert (other.name, other.scale, other.start, other.end) == ("depth", 1.0, 0.25, 1.0)
    for sent, given in ((canny, edges), (other, depth)):
        assert np.array_equal(sent.image.load(), (given[0].numpy() * 255).round())
    assert [each.name for each in service.asked[1].control] == ["canny"], "a chain is not changed by its next"


def test_a_control_of_an_edit_may_be_as_large_as_one_of_a_drawing(nodes: dict[str, Any]) -> None:
    service, noise = FakeService(), torch.rand(1, 400, 400, 3)
    (control,) = run(nodes["DistrirayControl"], name="tile", image=noise)
    with serving(service) as url:
        run(nodes["DistrirayGenerate"], url=url, control=control)
        run(nodes["DistrirayEdit"], url=url, control=control, image=torch.zeros(1, 64, 96, 3))
    drawn, edited = (asked.control[0].image for asked in service.asked)
    assert drawn is not None and drawn == edited and len(drawn.data) > HttpConfig().max_body_bytes


def test_a_control_goes_by_one_picture(nodes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="control 'canny' goes by one picture; there are 2"):
        run(nodes["DistrirayControl"], name="canny", image=torch.zeros(2, 8, 8, 3))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(8, 8), "the mask is 8 x 8 and the picture 24 x 16"),
        (torch.zeros(3, 16, 24), "3 masks for 1"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(nodes: dict[str, Any], mask: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(nodes["DistrirayEdit"], image=torch.zeros(1, 16, 24, 3), mask=mask)
