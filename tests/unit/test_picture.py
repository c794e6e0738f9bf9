"""Pictures as they come: what is read, turned, made opaque, and refused by name before it is decoded."""

from __future__ import annotations

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from PIL import ExifTags, Image

from distriray import picture as module
from distriray.errors import InvalidRequest
from distriray.limits import Limits
from distriray.picture import Picture, holes, mask_of, opaque, png
from distriray.requests import GenerationRequest
from tests.unit.http.malformed import bomb

COLORS = Image.merge(
    "RGB", [Image.linear_gradient("L").rotate(turn).resize((48, 32)) for turn in (0, 90, 180)]
)


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_a_file_is_its_content_says(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(file(COLORS, kind))
    picture = Picture.of(tmp_path / "a.txt")
    assert (picture.format, picture.size) == (kind.lower(), (48, 32))
    for same in (picture.data, picture.url, picture):
        assert Picture.of(same) == picture
    assert pickle.loads(pickle.dumps(picture)) == picture and picture != Picture.of(COLORS.rotate(180))
    assert repr(picture) == f"Picture({kind.lower()}, 48x32, {len(picture.data)} bytes)"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_as_its_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = (
        {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    )
    turned = Picture.of(file(COLORS, kind, exif=exif, **options))
    by_hand = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a.swapaxes(0, 1)[::-1],
    }  # fmt: skip
    expected = by_hand[orientation](np.array(COLORS, dtype=int))
    assert turned.size == expected.shape[1::-1] == turned.load().size
    assert abs(np.array(turned.load(), dtype=int) - expected).max() <= (6 if kind == "JPEG" else 0)


def test_an_orientation_that_there_is_not_is_none() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 77
    assert Picture.of(file(COLORS, "JPEG", exif=exif)).size == (48, 32)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = COLORS.convert(mode)
    loaded = Picture.of(file(image, "JPEG" if mode == "CMYK" else "PNG")).load()
    assert loaded.mode == ("RGBA" if "A" in mode else "RGB")
    difference = np.array(opaque(loaded), dtype=int) - np.array(image.convert("RGB"), dtype=int)
    assert abs(difference).max() <= (8 if mode == "CMYK" else 0)


def test_16_bits_of_grey_become_8() -> None:
    grey = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    loaded = Picture.of(file(Image.fromarray(grey))).load()
    assert np.array_equal(np.array(loaded)[..., 0], grey >> 8)


def test_what_is_transparent_shows_white_and_is_a_mask_where_it_is_so_wholly() -> None:
    image = Image.new("RGBA", (4, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    loaded = Picture.of(image).load()
    assert [opaque(loaded).getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]
    hole = holes(loaded)
    assert hole is not None and list(hole.tobytes()) == [0, 255, 0, 0]
    assert holes(Picture.of(COLORS).load()) is None
    assert holes(Image.new("RGBA", (4, 4), (1, 2, 3, 1))) is None
    with pytest.raises(InvalidRequest, match="mask_image has transparent parts"):
        mask_of(Picture.of(image))
    assert mask_of(Picture.of(Image.new("RGBA", (4, 4), "white"))).tobytes() == b"\xff" * 16


ANIMATED = [COLORS, COLORS.rotate(180)]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"", "send a PNG, JPEG or WebP file"),
        (b"GIF89a", "send a PNG, JPEG or WebP file"),
        (file(COLORS, "GIF"), "send a PNG, JPEG or WebP file"),
        (file(COLORS, "TIFF"), "send a PNG, JPEG or WebP file"),
        (file(COLORS)[:20], "cannot be read"),
        (bomb(10_000, 10_000), "is 10000x10000 pixels; no picture may have over"),
        (bomb(60_000, 60_000), "cannot be read"),
        (bomb(2**31 - 1, 2**31 - 1), "cannot be read"),
        (file(COLORS, "PNG", save_all=True, append_images=ANIMATED), "animated, of 3 frames; send one"),
        (file(COLORS, "WEBP", save_all=True, append_images=ANIMATED), "animated, of 2 frames; send one"),
        ("a.png", "image is no data: URL"),
        ("/etc/passwd", "image is no data: URL"),
        ("data:image/png;base64,%%%", "image is no base64"),
        ("data:text/html;base64,AAAA", "image is no data: URL"),
        (3, "image is a int; use bytes"),
        (Path("/nothing/there.png"), "cannot be read: no such file"),
        (Path("/dev/zero"), "cannot be read: no such file"),
        (Image.new("F", (8, 8)), "has mode F"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_no_picture_is_refused_by_name(source: Any, says: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        GenerationRequest(prompt="x", image=source)
    assert says in str(refused.value) and refused.value.param == "image"
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_file_that_is_cut_short_is_refused_when_it_is_loaded(kind: str, share: float) -> None:
    whole = file(Image.effect_noise((64, 64), 90), kind)
    with pytest.raises(
        InvalidRequest, match="mask_image (is damaged or cut short|cannot be read)"
    ) as refused:
        Picture.of(whole[: int(len(whole) * share)], "mask_image").load("mask_image")
    assert refused.value.param == "mask_image"


def test_more_bytes_than_any_picture_may_have_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_BYTES", 100)
    with pytest.raises(InvalidRequest, match="no picture may have over 100"):
        Picture.of(file(COLORS))


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"mask_image": COLORS}, "mask_image", "is of an image, and there is none"),
        ({"strength": 0.5}, "strength", "is of an image, and there is none"),
        (
            {"image": COLORS, "mask_image": COLORS.rotate(90, expand=True)},
            "mask_image",
            "32x48 pixels and image 48x32",
        ),
        (
            {"references": [{"image": COLORS}], "mask_image": COLORS.rotate(90, expand=True)},
            "mask_image",
            "32x48 pixels and references.0.image 48x32",
        ),
        (
            {"references": [{"image": COLORS}], "strength": 0.5},
            "strength",
            "is of an image, and there is none",
        ),
        ({"image": COLORS, "strength": 0.0}, "strength", "greater than 0"),
        ({"image": COLORS, "strength": 1.1}, "strength", "less than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        GenerationRequest(prompt="x", **fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_image_bytes": 100}, "image has [0-9]+ bytes; the limit is 100"),
        ({"max_image_pixels": 48 * 31}, "image has 48x32 pixels; the limit is 1488 in all"),
    ],
)
def test_limits_of_pictures_are_in_the_refusal(limits: dict[str, int], says: str) -> None:
    request = GenerationRequest(prompt="x", image=COLORS)
    Limits(min_side=8).check(request)
    with pytest.raises(InvalidRequest, match=says):
        Limits(**limits).check(request)


def test_a_size_beyond_the_limits_that_is_the_images_own_is_called_so() -> None:
    request = GenerationRequest(prompt="x", image=COLORS).settled(8, 8)
    with pytest.raises(
        InvalidRequest, match="height 32 is below the limit of 64; it is the image's own, name"
    ):
        Limits().check(request)
    with pytest.raises(
        InvalidRequest, match="width 48 is above the limit of 40; it is the image's own, name"
    ):
        Limits(min_side=8, max_side=40).check(request)


def test_a_request_with_a_picture_survives_json_and_pickle_and_says_little_of_it() -> None:
    request = GenerationRequest(prompt="x", image=png(Image.effect_noise((256, 256), 90)), strength=0.5)
    assert GenerationRequest.parse(request.model_dump_json()) == request
    assert GenerationRequest.parse(request.model_dump()) == request
    assert pickle.loads(pickle.dumps(request)) == request
    assert len(repr(request)) < 1000 < len(request.image.data)  # type: ignore[union-attr]
    assert request.without_pictures().image is None and request.pictures == {"image": request.image}


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    plain = file(COLORS, "JPEG", progressive=True)
    last = plain.rindex(b"\xff\xda")
    for count in (1, module.LARGEST_SCANS // 2):
        Picture.of(plain[:-2] + plain[last:-2] * count + plain[-2:]).load()
    with pytest.raises(InvalidRequest, match="over 100 scans; save it anew"):
        Picture.of(plain[:-2] + plain[last:-2] * module.LARGEST_SCANS + plain[-2:])


@pytest.mark.parametrize(
    ("kind", "head", "part"),
    [
        ("JPEG", 2, b"\xff\xe1\x00\x09Exif\x00\x00x"),
        ("PNG", 33, b"\x00\x00\x00\x00abCd" + crc32(b"abCd").to_bytes(4)),
    ],
)
def test_a_picture_of_many_parts_is_refused_before_it_is_opened(
    kind: str, head: int, part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = file(COLORS, kind)
    Picture.of(plain[:head] + part * (module.LARGEST_PARTS // 2) + plain[head:]).load()
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(InvalidRequest, match="over 2000 parts; save it anew"):
        Picture.of(plain[:head] + part * module.LARGEST_PARTS + plain[head:])


def test_the_pixels_of_a_png_may_be_in_any_number_of_parts() -> None:
    plain, empty = file(COLORS), b"\x00\x00\x00\x00IDAT" + crc32(b"IDAT").to_bytes(4)
    at = plain.index(b"IDAT") - 4
    whole = Picture.of(plain[:at] + empty * 2 * module.LARGEST_PARTS + plain[at:])
    assert whole.load().tobytes() == Picture.of(plain).load().tobytes()


def test_what_looks_like_scans_within_a_jpeg_or_behind_it_is_none() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.MakerNote] = b"\xff\xda" * 200
    for kind in ({}, {"progressive": True}, {"icc_profile": b"\xff\xda" * 200}):
        whole = file(COLORS, "JPEG", exif=exif, comment=b"\xff\xda" * 200, **kind)
        assert Picture.of(whole + b"\xff\xda" * 200).load().size == COLORS.size
