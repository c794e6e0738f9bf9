"""The page's files: what is sent, to whom, and what they may load."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest

from deployments.http import HttpConfig, build_http
from deployments.http.site import FOLDER, TYPES
from tests.unit.conftest import serving
from tests.unit.http.fake import FakeService

FILES = sorted(path.name for path in FOLDER.iterdir())


def test_the_folder_holds_nothing_that_is_not_sent() -> None:
    assert all((FOLDER / name).suffix in TYPES for name in FILES) and "index.html" in FILES


def test_the_page_and_all_its_files_are_sent_as_what_they_are(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert page.content == (FOLDER / "index.html").read_bytes()
    for name in FILES:
        file = http.get(f"/page/{name}")
        assert file.content == (FOLDER / name).read_bytes()
        assert file.headers["content-type"] == TYPES[(FOLDER / name).suffix]
        assert http.head(f"/page/{name}").headers["content-length"] == str(len(file.content))


def test_below_a_route_prefix_the_page_is_where_the_prefix_ends_in_a_slash() -> None:
    """Serve's proxy leaves the prefix in the path, and says which it is."""

    async def statuses() -> list[int]:
        app = build_http(FakeService(), HttpConfig(keys_env="NO_SUCH_VARIABLE"))
        below = httpx.ASGITransport(app, root_path="/draw", client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=below, base_url="http://localhost/draw") as http:
            paths = ("/", "/page/main.js", "/healthz", "/v1/models", "/v1/models/")
            return [(await http.get(path)).status_code for path in paths]

    assert asyncio.run(statuses()) == [200] * 5


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
def test_the_page_may_load_from_its_own_service_only(path: str, http: httpx.Client) -> None:
    headers = http.get(path).headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_the_document_loads_nothing_from_elsewhere_that_can_change(http: httpx.Client) -> None:
    answer = http.get("/docs")
    loaded = re.findall(r"<(?:script|link)[^>]+(?:src|href)=[^>]+>", answer.text)
    foreign = [tag for tag in loaded if "//" in tag]
    assert len(foreign) == 2 and "/openapi.json" in answer.text
    for tag in foreign:
        assert re.search(r'integrity="sha384-[\w+/]{64}" crossorigin="anonymous"', tag), tag
        assert re.search(r"@\d+\.\d+\.\d+/", tag), tag
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_the_files_name_no_other_origin() -> None:
    for name in FILES:
        urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", (FOLDER / name).read_text()))
        assert urls <= {"http://www.w3.org/2000/svg"}, name


def test_a_file_that_is_known_already_is_not_sent_again(http: httpx.Client) -> None:
    tag = http.get("/page/main.js").headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        again = http.get("/page/main.js", headers={"If-None-Match": known})
        assert again.status_code == 304 and not again.content and again.headers["etag"] == tag
    assert http.get("/page/main.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert http.get("/page/main.js").headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", ["none.js", "..%2Fapp.py", "%2e%2e/app.py", "page"])
def test_nothing_else_is_sent(name: str, http: httpx.Client) -> None:
    answer = http.get(f"/page/{name}")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_url"


def test_the_page_needs_no_key_and_what_it_asks_for_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", "secret")
    with serving(FakeService(), HttpConfig(keys_env="SOME_KEYS")) as url:
        assert httpx.get(f"{url}/").status_code == httpx.get(f"{url}/page/main.js").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401


def test_page_false_turns_it_off() -> None:
    with serving(FakeService(), HttpConfig(keys_env="NO_SUCH_VARIABLE", page=False)) as url:
        for path in ("/", "/page/main.js"):
            assert httpx.get(f"{url}{path}").json()["error"]["code"] == "unknown_url"
        assert httpx.get(f"{url}/v1/models").status_code == 200


def test_the_document_is_of_the_interface_and_not_of_the_page(http: httpx.Client) -> None:
    assert not {"/", "/page/{name}"} & http.get("/openapi.json").json()["paths"].keys()
