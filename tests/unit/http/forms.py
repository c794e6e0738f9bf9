"""What schemathesis is told of forms, which a schema cannot say: loaded by its process."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from typing import Any

import schemathesis
from hypothesis import strategies as st
from PIL import Image

FORM, JSON = "multipart/form-data", "application/json"


def file(kind: str, width: int, height: int) -> bytes:
    out = BytesIO()
    Image.new("RGB", (width, height), "grey").save(out, kind)
    return out.getvalue()


for kind in ("png", "jpeg", "webp"):
    side = st.sampled_from([64, 96, 128])
    schemathesis.openapi.media_type(f"image/{kind}", st.builds(partial(file, kind), side, side))


@schemathesis.hook  # type: ignore[untyped-decorator, unused-ignore]
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Leave forms alone of what may be JSON too, without null, for which they have no text, and without
    lists, which are JSON in a text."""
    for path in raw_schema["paths"].values():
        content = path.get("post", {}).get("requestBody", {}).get("content", {})
        if FORM not in content:
            continue
        content.pop(JSON)
        body = raw_schema["components"]["schemas"][content[FORM]["schema"]["$ref"].rpartition("/")[2]]
        for name, field in list(body["properties"].items()):
            kinds = [one for one in field.get("anyOf", [field]) if one.get("type") != "null"]
            if not kinds or "contentSchema" in field:
                del body["properties"][name]
            elif "anyOf" in field:
                field["anyOf"] = kinds
