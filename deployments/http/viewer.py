"""`/docs`: the OpenAPI document for people, by a viewer that comes from elsewhere as it was published."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html

_HOME = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0"
# Who could change them would have the key that the page keeps for this origin. Of another version:
# `npm pack swagger-ui-dist@VERSION`, and of each file `openssl dgst -sha384 -binary FILE | base64`.
_SCRIPT, _STYLE = f"{_HOME}/swagger-ui-bundle.js", f"{_HOME}/swagger-ui.css"
_INTEGRITY = {
    _SCRIPT: "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9",
    _STYLE: "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I",
}
_HEADERS = {
    "Content-Security-Policy": "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_viewer(app: FastAPI) -> None:
    """Let `app` answer `/docs`, where nothing is loaded that is not what it was."""

    @app.get("/docs", include_in_schema=False)
    async def get_docs(request: Request) -> Response:
        page = get_swagger_ui_html(
            openapi_url=request.scope.get("root_path", "").rstrip("/") + str(app.openapi_url),
            title=f"{app.title} - Swagger UI",
            swagger_js_url=_SCRIPT,
            swagger_css_url=_STYLE,
            swagger_favicon_url="data:,",
        )
        text = bytes(page.body).decode()
        for url, digest in _INTEGRITY.items():
            text = text.replace(f'"{url}"', f'"{url}" integrity="{digest}" crossorigin="anonymous"')
        return Response(text, media_type="text/html", headers=_HEADERS)
