"""Requests that nobody should send, drawn from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

JSON = {"Content-Type": "application/json"}
IMAGES = "/v1/images/generations"


@dataclass(frozen=True)
class Malformed:
    """A request and the status that it deserves."""

    content: bytes | list[bytes]
    status: int = 400
    method: str = "POST"
    path: str = IMAGES
    headers: dict[str, str] = field(default_factory=lambda: JSON)

    def send(self, client: httpx.Client) -> httpx.Response:
        chunked = isinstance(self.content, list)
        content = iter(self.content) if chunked else self.content
        return client.request(self.method, self.path, content=content, headers=self.headers)  # type: ignore[arg-type]


def malformed(seed: int, count: int) -> Iterator[Malformed]:
    """`count` requests, of every kind in turn."""
    chance = random.Random(seed)
    for index in range(count):
        yield _KINDS[index % len(_KINDS)](chance)


def _fields(**fields: Any) -> bytes:
    return json.dumps({"prompt": "a lake", **fields}).encode()


_WRONG: dict[str, list[Any]] = {
    "prompt": ["", None, 1, ["a"], {"a": 1}, "x" * 100_000],
    "model": [1, [], {}],
    "n": [0, -1, 1.5, "2", True, 10**30, 10**3],
    "size": [
        "",
        "64",
        "64x",
        "0x64",
        "64x64x64",
        "65x64",
        "8x8",
        "99999x99999",
        "64X64",
        "٦٤x64",
        64,
        [64, 64],
    ],
    "response_format": ["png", 1],
    "output_format": ["gif", "PNG", 0],
    "output_compression": [-1, 101, 50, "9"],
    "quality": ["ultra", 3],
    "moderation": ["none", 1],
    "style": ["vivid", 1],
    "background": ["transparent", False],
    "user": [1, "x" * 257],
    "stream": ["true", 1, []],
    "partial_images": [-1, 1, 99, "1"],
    "progress": [True, "yes"],
    "negative_prompt": [1, "x" * 100_000],
    "seed": [-1, 2**63, 0.5, "7"],
    "num_inference_steps": [0, -3, 10**6, 2.5, "9"],
    "guidance_scale": [-0.1, 1e30, "5", []],
    "guidance_rescale": [-0.1, 1.1, "1", []],
    "scheduler": ["", "magic", 1],
    "gang_size": [0, -1, "two", 1.5, 10**6 + 1, False],
    "exchange": ["", "fast", 1, {}],
    "deadline_s": [0, -1, "1", [1]],
}


def _wrong_value(chance: random.Random) -> Malformed:
    name = chance.choice(list(_WRONG))
    value = chance.choice([value for value in _WRONG[name] if value is not None or name == "prompt"])
    return Malformed(_fields(**{name: value}))


def _unknown_field(chance: random.Random) -> Malformed:
    name = "".join(chance.choices("abcxyz_.é0", k=chance.randint(1, 40))) * chance.choice([1, 100])
    return Malformed(_fields(**{f"{name}_": chance.choice([None, 1, "a", {}])}))


def _garbage(chance: random.Random) -> Malformed:
    return Malformed(chance.randbytes(chance.randint(0, 200)))


def _truncated(chance: random.Random) -> Malformed:
    whole = _fields(seed=1, n=2)
    return Malformed(whole[: chance.randrange(len(whole))])


def _no_object(chance: random.Random) -> Malformed:
    return Malformed(chance.choice([b"[]", b"null", b"1", b'"a"', b"true", b"{}", b"[{}]", b"NaN"]))


def _no_number(chance: random.Random) -> Malformed:
    name = chance.choice(["guidance_scale", "deadline_s", "seed", "n"])
    value = chance.choice(["NaN", "Infinity", "-Infinity", "1e999", "-0.5", "9" * 5000, "01", "+1", "0x10"])
    return Malformed(f'{{"prompt": "a", "{name}": {value}}}'.encode())


def _no_text(chance: random.Random) -> Malformed:
    text = chance.choice(
        [rb"\ud800", rb"\udfff", b"\xed\xa0\x80", b"\xff\xfe", b"\x00", rb"\u12", rb"\x41", b"a\nb"]
    )
    return Malformed(b'{"prompt": "' + text + b'"}')


def _deep(chance: random.Random) -> Malformed:
    depth = chance.choice([10, 1000, 20_000])
    opening, closing = chance.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return Malformed(b'{"prompt": ' + opening * depth + b"1" + closing * depth + b"}")


def _other_content_type(chance: random.Random) -> Malformed:
    kinds = [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "json",
        "",
        "application/xml",
    ]
    return Malformed(_fields(), headers={"Content-Type": chance.choice(kinds)})


def _other_model(chance: random.Random) -> Malformed:
    name = chance.choice(["gpt-image-1", "", "../../etc/passwd", "builtin:", "x" * 5000, "a\u2028b", "/etc"])
    return Malformed(_fields(model=name), 404)


def _other_method(chance: random.Random) -> Malformed:
    method = chance.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND"])
    return Malformed(b"", 405, method=method)


def _other_path(chance: random.Random) -> Malformed:
    paths = [
        "/",
        "/v1",
        "/v1/images",
        "/v1/images/nothing",
        "/v1/chat/completions",
        "/%00",
        "/v1/models/%ff",
        "//",
    ]
    return Malformed(b"", 404, method="GET", path=chance.choice(paths))


def _too_long(chance: random.Random) -> Malformed:
    body = b'{"prompt": "' + b"a" * 300_000 + b'"}'
    chunks: list[bytes] = [body[start : start + 65536] for start in range(0, len(body), 65536)]
    return Malformed(chunks if chance.random() < 0.5 else body, 413)


_KINDS: list[Callable[[random.Random], Malformed]] = [
    _wrong_value,
    _unknown_field,
    _garbage,
    _wrong_value,
    _truncated,
    _no_object,
    _wrong_value,
    _no_number,
    _no_text,
    _deep,
    _wrong_value,
    _other_content_type,
    _other_model,
    _other_method,
    _other_path,
    _too_long,
]
