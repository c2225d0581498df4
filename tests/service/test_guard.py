"""No route can be reached without the token, from another site, or under another name."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from evomerge.service.app import make_app
from evomerge.service.guard import HEADERS, HEALTH
from tests.service.live import TOKEN, Live

AUTH = {"authorization": f"Bearer {TOKEN}"}


def call(
    live: Live, method: str, target: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send exactly this target: no client library tidies it."""
    place = urlsplit(live.service.address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port or 0, timeout=30)
    try:
        connection.putrequest(method, target, skip_host="host" in (headers or {}))
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def every_route(live: Live) -> list[tuple[str, str]]:
    """Return method and path of every route that OpenAPI documents."""
    answer = live.http.get("/openapi.json").json()
    found = []
    for path, methods in answer["paths"].items():
        filled = path.replace("{name}", "demo").replace("{number}", "1").replace("{file}", "config.json")
        found += [(method.upper(), filled) for method in methods]
    return found


def test_every_route_but_health_wants_the_token(live: Live) -> None:
    routes = every_route(live)
    assert len(routes) > 20
    more = [("GET", "/api/v1/openapi.json"), ("GET", "/api/v1/nothing"), ("POST", "/"), ("PUT", "/static/x")]
    for method, path in [*routes, *more]:
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
            status, headers, body = call(live, method, path, given)
            if path == HEALTH and method == "GET":
                assert status == 200
            else:
                assert (status, headers["www-authenticate"]) == (401, "Bearer"), (method, path, given)
                assert json.loads(body)["error"]["kind"] == "no_token"


def test_no_token_is_taken_from_a_url_or_a_cookie(live: Live) -> None:
    for query in ("token", "access_token", "authorization"):
        status, _, _ = call(live, "GET", f"/api/v1/runs?{query}={TOKEN}", {"cookie": f"{query}={TOKEN}"})
        assert status == 401


def test_every_route_refuses_a_foreign_page(live: Live) -> None:
    for method, path in [*every_route(live), ("GET", "/"), ("DELETE", "/api/v1/runs/demo")]:
        for site in (
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"origin": "http://127.0.0.1.evil.example"},
            {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
            {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
        ):
            status, headers, body = call(live, method, path, {**AUTH, **site})
            assert status == 403, (method, path, site)
            assert json.loads(body)["error"]["kind"] == "cross_site"
            assert "access-control-allow-origin" not in headers


def test_its_own_page_and_a_link_to_it_are_let_in(live: Live) -> None:
    own = {"origin": live.service.address, "sec-fetch-site": "same-origin"}
    assert call(live, "GET", "/api/v1/runs", {**AUTH, **own})[0] == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert call(live, "GET", "/", link)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.evil.com",
        "127.0.0.1.evil.example",
        "evil@127.0.0.1",
        "127.0.0.1/x",
        "",
        "[::1",
        "0",
    ],
)
def test_another_host_is_refused(live: Live, host: str) -> None:
    for path in ("/api/v1/health", "/api/v1/runs", "/"):
        status, _, body = call(live, "GET", path, {**AUTH, "host": host})
        # The server itself refuses what is no host at all.
        assert status in (400, 421), host
        assert status == 400 or json.loads(body)["error"]["kind"] == "wrong_host"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1234", "[::1]:80", "LOCALHOST:8642"])
def test_names_of_the_loopback_are_its_own(live: Live, host: str) -> None:
    assert call(live, "GET", "/api/v1/runs", {**AUTH, "host": host})[0] == 200


def test_every_answer_has_the_headers(live: Live) -> None:
    for path, given in (("/", {}), ("/api/v1/runs", AUTH), ("/api/v1/runs", {}), ("/static/none", {})):
        _, headers, _ = call(live, "GET", path, given)
        for name, value in HEADERS.items():
            assert headers[name] == value, (path, name)
        assert "server" not in headers
    policy = HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_large_requests_are_refused(live: Live) -> None:
    most = live.service.parts.settings.most_body
    json_body = {**AUTH, "content-type": "application/json"}
    status, _, body = call(live, "POST", "/api/v1/runs", {**json_body, "content-length": str(most + 1)})
    assert (status, json.loads(body)["error"]["kind"]) == (413, "too_large")

    def parts() -> Any:
        for _ in range(most // 1000 + 2):
            yield b" " * 1000

    assert live.http.post("/runs", content=parts(), headers=json_body).status_code == 413
    assert call(live, "POST", "/api/v1/runs", json_body, b'{"config": ')[0] == 422


TRAVERSALS = [
    "../../etc/passwd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%2f..%2fetc%2fpasswd",
    "%252e%252e%252fetc%252fpasswd",
    "..%5c..%5cx",
    "....//....//etc/passwd",
    "%2e%2e",
    "..",
    ".",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "demo%00",
    "demo%0a",
    "demo%2f..%2fdemo",
    "demo;x",
    "demo%23",
    "demo%3f",
    "%c0%ae%c0%ae%c0%afetc",
    "%e2%80%a6",
    "~root",
    "-demo",
    "x" * 5000,
    "d%d0%b5mo",
]


@pytest.mark.parametrize("name", TRAVERSALS)
@pytest.mark.parametrize(
    "place",
    [
        "/api/v1/runs/{}",
        "/api/v1/runs/{}/logs",
        "/api/v1/runs/{}/report",
        "/api/v1/runs/demo/exports/1/files/{}",
        "/static/{}",
    ],
)
def test_names_are_never_paths(live: Live, place: str, name: str) -> None:
    status, _, body = call(live, "GET", place.format(name), AUTH)
    assert status in (400, 404, 405), (status, body[:200])
    assert b"root:x" not in body


def test_there_is_no_way_round_the_guard(live: Live) -> None:
    from evomerge.service.guard import Guard

    assert isinstance(make_app(live.service.parts), Guard)
    for path in (
        "//api/v1/runs",
        "/API/v1/runs",
        "/api//v1/runs",
        "/static/../api/v1/runs",
        "/docs",
        "/redoc",
    ):
        assert call(live, "GET", path)[0] in (401, 404), path
        assert call(live, "GET", path)[2].find(b'"runs"') == -1
