"""Requests that nobody should send, drawn from a seed."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import httpx
from PIL import Image

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
    "control": [{}, "canny", [{"name": "canny"}], [{"name": "../x", "image": "data:image/png;base64,"}], [1]],
    "ip_adapters": [
        {},
        "style",
        [{"name": "style"}],
        [{"name": "style", "image": "none", "start": 0.5}],
        [1],
    ],
    "gang_size": [0, -1, "two", 1.5, 10**6 + 1, False],
    "exchange": ["", "fast", 1, {}],
    "deadline_s": [0, -1, "1", [1], 1e30],
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
    method = chance.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "TRACE", "PROPFIND"])
    return Malformed(b"", 405, method=method)


def _other_path(chance: random.Random) -> Malformed:
    paths = [
        "/page/none.js",
        "/v1",
        "/v1/images",
        "/v1/images/nothing",
        "/v1/chat/completions",
        "/%00",
        "/v1/models/%ff",
        "//v1/models/",
    ]
    return Malformed(b"", 404, method="GET", path=chance.choice(paths))


def _too_long(chance: random.Random) -> Malformed:
    body = b'{"prompt": "' + b"a" * 300_000 + b'"}'
    chunks: list[bytes] = [body[start : start + 65536] for start in range(0, len(body), 65536)]
    return Malformed(chunks if chance.random() < 0.5 else body)


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


EDITS, BOUNDARY = "/v1/images/edits", "a boundary of parts"
_FORM = {"Content-Type": f'multipart/form-data; boundary="{BOUNDARY}"'}


def malformed_forms(seed: int, count: int) -> Iterator[Malformed]:
    """`count` forms with pictures, of every kind in turn."""
    chance = random.Random(seed)
    for index in range(count):
        yield _FORMS[index % len(_FORMS)](chance)


def form(*parts: tuple[str, bytes | str]) -> bytes:
    """A form of these fields: texts, and the contents of files."""
    body = b""
    for name, content in parts:
        file = "" if isinstance(content, str) else '; filename="a.png"\r\nContent-Type: image/png'
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        body += head.encode() + (content.encode() if isinstance(content, str) else content) + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def picture(size: tuple[int, int] = (96, 64), mode: str = "RGB", kind: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    Image.new(mode, size).save(out, kind, **options)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a thousand bytes that says it is so large."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(10**6))),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _edit(*parts: tuple[str, bytes | str], status: int = 400, path: str | None = None) -> Malformed:
    image = () if any(name in ("image", "image[]") for name, _ in parts) else (("image", picture()),)
    prompt = () if any(name == "prompt" for name, _ in parts) else (("prompt", "a lake"),)
    return Malformed(form(*prompt, *image, *parts), status, path=path or EDITS, headers=_FORM)


def _no_picture(chance: random.Random) -> Malformed:
    whole = picture((400, 300), kind=chance.choice(["PNG", "JPEG", "WEBP"]))
    bad = [
        b"", b"\x89PNG\r\n\x1a\n", chance.randbytes(300), b"\0" * 8_000_000, picture(kind="GIF"),
        picture(kind="TIFF"), picture(kind="BMP"), whole[: chance.randrange(1, len(whole) - 12)],
        picture(save_all=True, append_images=[Image.new("RGB", (96, 64), "red")]), b"<svg/>", b"%PDF-1.4",
        bomb(16000, 9000), bomb(4097, 4097), picture((96, 64), "L", "TIFF"), _web_picture_of_any_size(chance),
    ]  # fmt: skip
    return _edit((chance.choice(["image", "image[]"]), chance.choice(bad)))


def _web_picture_of_any_size(chance: random.Random) -> bytes:
    """A WebP file of one small frame that says it is of 16384 by 16384."""
    frame = picture(kind="WEBP")[12:]
    canvas = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + b"\xff\x3f\x00" * 2
    return b"RIFF" + (len(canvas + frame) + 4).to_bytes(4, "little") + b"WEBP" + canvas + frame


def _damaged_picture(chance: random.Random) -> Malformed:
    out = BytesIO()
    noise = Image.frombytes("L", (96, 64), chance.randbytes(96 * 64))  # the same, whatever the process did
    noise.convert("RGB").save(out, "PNG")
    whole = bytearray(out.getvalue())
    for _ in range(40):
        whole[chance.randrange(60, len(whole) - 20)] ^= 1 << chance.randrange(8)
    return _edit(("image", bytes(whole)))


def _wrong_mask(chance: random.Random) -> Malformed:
    clear, grey = picture(mode="RGBA"), picture(mode="L")
    return _edit(
        *chance.choice(
            [
                [("mask", picture())],
                [("mask", picture((64, 64), "RGBA"))],
                [("mask", clear), ("mask_image", grey)],
                [("mask_image", clear)],
                [("mask_image", picture((64, 96), "L"))],
                [("mask", clear[:50])],
                [("mask", "a.png")],
                [("mask", clear), ("mask", clear)],
            ]
        )
    )


def _wrong_text(chance: random.Random) -> Malformed:
    wrong = {
        "prompt": [""], "n": ["0", "two", "1.5", "", "[1]", "1e400", "9" * 5000, "NaN", "true"],
        "size": ["96", "95x64", "0x0"], "strength": ["0", "-1", "1.01", "half", "NaN", "Infinity", "1e-9"],
        "seed": ["-1", "x", str(2**63)], "stream": ["True", "yes", "1"], "num_inference_steps": ["0", "1e9"],
        "negative_prompt": ["x" * 5000], "style": ["vivid"], "input_fidelity": ["very"], "loras_of": ["1"],
        "response_format": ["png"], "gang_size": ["0", "{}"], "background": ["transparent"],
    }  # fmt: skip
    name = chance.choice(list(wrong))
    return _edit((name, chance.choice(wrong[name])))


def _file_for_text(chance: random.Random) -> Malformed:
    return _edit((chance.choice(["prompt", "n", "size", "seed", "unknown"]), b"\x89PNG" * 1000))


def _text_for_file(chance: random.Random) -> Malformed:
    return _edit(
        ("image", chance.choice(["", "a.png", "/etc/passwd", "file:///etc/passwd", "http://a/b.png"]))
    )


def _several(chance: random.Random) -> Malformed:
    name = chance.choice(["image", "mask", "mask[]"])
    return _edit(*[(name, picture())] * chance.choice([2, 3, 7, 9]))


def _missing(chance: random.Random) -> Malformed:
    parts: list[tuple[str, bytes | str]] = [("prompt", "a lake"), ("image", picture())]
    return Malformed(form(parts[chance.randrange(2)]), path=EDITS, headers=_FORM)


def _cut_short(chance: random.Random) -> Malformed:
    whole = form(("prompt", "a lake"), ("image", picture()), ("mask", picture(mode="RGBA")))
    return Malformed(whole[: chance.randrange(len(whole) - 4)], path=EDITS, headers=_FORM)


def _no_form(chance: random.Random) -> Malformed:
    body = chance.choice([b"", b"--", chance.randbytes(500), b"--" * 9999, b"\r\n" * 999, _fields()])
    kinds = [
        *_FORM.values(), "multipart/form-data", "multipart/form-data; boundary=", "application/json", "",
        "multipart/mixed; boundary=a", "multipart/form-data; boundary=" + "x" * 5000, "text/plain",
        f'multipart/form-data; charset=idna; boundary="{BOUNDARY}"',
    ]  # fmt: skip
    return Malformed(body, path=EDITS, headers={"Content-Type": chance.choice(kinds)})


def _odd_parts(chance: random.Random) -> Malformed:
    heads = [
        "Content-Disposition: form-data", "X: y", 'Content-Disposition: form-data; name="' + "x" * 9000 + '"',
        "Content-Disposition: form-data; name*=utf-16''%ff", "A: b\r\n" * 3000, "\0: \0", ": :",
        'Content-Disposition: attachment; filename="../../../tmp/owned"',
    ]  # fmt: skip
    part = f"--{BOUNDARY}\r\n{chance.choice(heads)}\r\n\r\nvalue\r\n".encode()
    return Malformed(part + form(("prompt", "a lake"), ("image", picture())), path=EDITS, headers=_FORM)


def _many_parts(chance: random.Random) -> Malformed:
    kind: bytes | str = chance.choice(["1", b"1"])
    return _edit(*[(f"field{index}", kind) for index in range(200)])


def _too_long_a_form(chance: random.Random) -> Malformed:
    whole = form(("prompt", "a lake"), ("image", b"\0" * (MOST + 1)))
    pieces = [whole[start : start + 2**18] for start in range(0, len(whole), 2**18)]
    return Malformed(pieces if chance.random() < 0.5 else whole, 413, path=EDITS, headers=_FORM)


def _too_long_a_text(chance: random.Random) -> Malformed:
    return _edit(("prompt", "a" * 400_000), status=413)


def _variation_with_mask(chance: random.Random) -> Malformed:
    return _edit((chance.choice(["mask", "mask_image"]), picture()), path="/v1/images/variations")


def _edit_for_nobody(chance: random.Random) -> Malformed:
    return _edit(("model", chance.choice(["dall-e-2", "gpt-image-1"])), status=404)


MOST = 9 * 2**20
"""Bytes of the longest form that these are refused for, by a service of such a bound."""

_FORMS: list[Callable[[random.Random], Malformed]] = [
    _no_picture,
    _damaged_picture,
    _wrong_mask,
    _wrong_text,
    _file_for_text,
    _no_picture,
    _text_for_file,
    _several,
    _missing,
    _cut_short,
    _wrong_text,
    _no_form,
    _odd_parts,
    _many_parts,
    _too_long_a_form,
    _too_long_a_text,
    _variation_with_mask,
    _edit_for_nobody,
]
