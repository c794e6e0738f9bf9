"""What schemathesis is told of forms, which a schema cannot say: loaded by its process."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import schemathesis
from hypothesis import strategies as st
from PIL import Image

FORM, JSON = "multipart/form-data", "application/json"


def file(kind: str) -> bytes:
    """Of one size, since a mask has its picture's."""
    out = BytesIO()
    Image.new("RGB", (64, 96), "grey").save(out, kind)
    return out.getvalue()


for kind in ("png", "jpeg", "webp"):
    schemathesis.openapi.media_type(f"image/{kind}", st.just(file(kind)))


@schemathesis.hook  # type: ignore[untyped-decorator, unused-ignore]
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Leave forms alone of what may be JSON too, without null, for which they have no text, and without
    lists, which are JSON in a text. Nor are sent `mask`, of which a part is to be transparent, `strength`, of
    which steps must be left, and `image[]`, whose files it would send as texts."""
    for path in raw_schema["paths"].values():
        content = path.get("post", {}).get("requestBody", {}).get("content", {})
        if FORM not in content:
            continue
        content.pop(JSON)
        body = raw_schema["components"]["schemas"][content[FORM]["schema"]["$ref"].rpartition("/")[2]]
        body["required"] = [*body["required"], "image"]
        del body["oneOf"], body["properties"]["image[]"]
        for name, field in list(body["properties"].items()):
            kinds = [one for one in field.get("anyOf", [field]) if one.get("type") != "null"]
            if not kinds or "contentSchema" in field or name in ("mask", "strength"):
                del body["properties"][name]
            elif "anyOf" in field:
                field["anyOf"] = kinds
