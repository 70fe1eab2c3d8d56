"""Nothing answers without a key: every route of the real app, by raw bytes, under every trick."""

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.config import HttpConfig
from serve.errors import ConfigurationError
from serve.ingress import auth
from serve.ingress.app import build_app
from serve.ingress.auth import Authentication
from serve.keys import ApiKey, KeyRing, hash_key, render_keys
from serve.testing.dispatcher import EchoDispatcher

from .conftest import Api

KEY = "sk-shoal-" + "Ab3_-" * 8 + "xyz"
GRANT = f"Authorization: Bearer {KEY}"
PREFLIGHT = "Origin: http://a\r\nAccess-Control-Request-Method: POST"
OPEN_PATHS = {
    "/",
    "/static/index.html",
    "/static/app.js",
    "/static/style.css",
    "/static/icon.svg",
    "/health",
    "/health/live",
    "/health/ready",
    "/-/healthz",
}
PUBLIC_BODIES = {
    b'{"status":"live"}',
    b'{"status":"ready","models_not_ready":[]}',
    *(file.read_bytes() for file in (resources.files("serve.ingress") / "page").iterdir()),
}
METHODS = (
    *("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "OPTIONS", "PROPFIND", "QUERY"),
    *("CONNECT", "FOO", "get", "Get", "OPTIONS/GET"),
)


@dataclass(frozen=True)
class Reply:
    """What came back over one connection."""

    status: int
    headers: bytes
    body: bytes
    whole: bytes

    @property
    def code(self) -> Any:
        return json.loads(self.body)["error"]["code"]


@pytest.fixture(scope="session")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(render_keys([ApiKey("me", hash_key(KEY), datetime.now(UTC))]))
    return path


@pytest.fixture(scope="session", params=["httptools", "h11"])
def live_locked(request: pytest.FixtureRequest, served: Any, keys_file: Path) -> Iterator[Api]:
    api = Api(*served, keys_file=keys_file, parser=request.param)
    api.start()
    yield api
    api.stop()


@pytest.fixture
def locked(live_locked: Api) -> Api:
    live_locked.reset()
    return live_locked


def connect(api: Api) -> socket.socket:
    return socket.create_connection(("127.0.0.1", api.port), timeout=60)


def read_all(connection: socket.socket) -> Reply:
    whole = b""
    while piece := connection.recv(65536):
        whole += piece
    head, _, body = whole.partition(b"\r\n\r\n")
    return Reply(int(head.split(b" ", 2)[1]), head.lower(), body, whole)


def send(
    api: Api, method: str, target: str, *headers: str, host: str = "Host: x", body: str = ""
) -> Reply:
    lines = [f"{method} {target} HTTP/1.1", host, "Connection: close", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    content = "\r\n".join([*filter(None, lines), "", body])
    with connect(api) as connection:
        connection.sendall(content.encode("latin-1"))
        return read_all(connection)


def routes_of(api: Api) -> list[str]:
    """A path for every route of the app, from the app itself."""
    inner = api.app._app  # type: ignore[union-attr]
    templates = [*inner._endpoints, *(route.path for route in inner._routes.routes)]
    return sorted({re.sub(r"\{[^}]*\}", "echo", path) for path in templates})


def guarded_of(api: Api) -> list[str]:
    return [path for path in routes_of(api) if path not in OPEN_PATHS]


def is_denied(method: str, reply: Reply) -> bool:
    """Whether nothing was told: refused, or public to the last byte."""
    if reply.status == 200 and method == "GET":
        return reply.body in PUBLIC_BODIES
    return reply.status in (400, 401)


def tricks(path: str) -> list[str]:
    """Ways to write `path`, or to write an open path so that something else might see `path`."""
    encoded = path.replace("/", "%2F")
    return [
        *(path + end for end in ("", "/", "//", "/.", "%20", "%00", "%2F", "?", "#", "%23", ";")),
        *(
            path + end
            for end in ("?/health", "#/health", "%3F/health", "%0d%0a/health", ";/health")
        ),
        *(
            path + end
            for end in ("/../health", "/..;/health", "%2F..%2Fhealth", "?key=x&api_key=x")
        ),
        *(start + path for start in ("/", "//", "/.", "/./", "/%2e", "/%2e%2e", "/..", "/%2F")),
        *(start + path for start in ("/health", "/health/..", "/health/%2e%2e", "/health;")),
        *(start + path for start in ("/health/ready/..;", "/health/ready/../..", "/health//..")),
        *(start + path for start in ("/health%2F..", "/health%252F..", "/health%5C..", "/health?")),
        *(start + path for start in ("/health#", "/health%23", "/health%3F", "/health%00")),
        *(start + path for start in ("/static/..", "/static/%2e%2e", "/static/app.js/../..")),
        *(start + path for start in ("/static/app.js?", "/static/app.js%3F..", "/-/healthz/../..")),
        *(start + path for start in ("http://x", "http://x/health/..", "http://x/health@")),
        *(start + path for start in ("http://health", "https://x:1", "http://x/%2e%2e", "x:")),
        *(encoded, "/" + encoded, encoded.lower(), path.replace("1", "%31"), path.upper()),
        *(path.replace("/", "\\"), "/" + path.replace("/", "\\"), path.replace("/", "%c0%af")),
        *(path.replace("/", "/./"), path.replace("/", "//"), path.replace("m", "%6D")),
        *(path.replace("/", "%252F"), path.title(), "/health" + encoded, "/static/" + encoded),
    ]


def test_the_list_of_open_paths_is_the_documented_one(locked: Api) -> None:
    layer = locked.app
    assert isinstance(layer, Authentication)
    assert layer._open_paths == OPEN_PATHS
    assert len(guarded_of(locked)) >= 7


def test_every_route_answers_with_a_key_and_to_nobody_without(locked: Api) -> None:
    for path in guarded_of(locked):
        assert send(locked, "GET", path, GRANT).status in (200, 404, 405)
        reply = send(locked, "GET", path)
        assert (reply.status, reply.code) == (401, "invalid_api_key")
    assert locked.dispatcher.requests == []


def test_a_request_s_prefixes_are_cached_for_its_key_alone(locked: Api) -> None:
    response = locked.client.post(
        "/v1/completions", json={"prompt": "hello"}, headers={"authorization": f"Bearer {KEY}"}
    )
    assert response.status_code == 200
    assert locked.last_request.namespace == b"me"


def test_open_paths_are_open_for_reading_alone(locked: Api) -> None:
    for path in OPEN_PATHS - {"/-/healthz"}:
        assert send(locked, "GET", path).status == 200
        assert send(locked, "HEAD", path).status == 200
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            assert send(locked, method, path).status == 401
    assert send(locked, "GET", "/-/healthz").status == 404  # Ray Serve answers it before us
    assert send(locked, "GET", "/static/other.js").status == 401
    assert send(locked, "GET", "/nothing").status == 401


def test_no_path_trick_reaches_a_route(locked: Api) -> None:
    for path in guarded_of(locked):
        for target in tricks(path):
            for method in ("GET", "POST"):
                reply = send(locked, method, target)
                assert is_denied(method, reply), (method, target, reply.whole[:300])
    assert locked.dispatcher.requests == []


def test_no_method_reaches_a_route(locked: Api) -> None:
    body = '{"prompt": "hi"}'
    for path in guarded_of(locked):
        for method in METHODS:
            reply = send(locked, method, path, body=body)
            assert is_denied(method, reply), (method, path, reply.whole[:300])
    assert locked.dispatcher.requests == []


@pytest.mark.parametrize(
    "header",
    [
        "X-Original-URL: /health",
        "X-Rewrite-URL: /health",
        "X-Forwarded-Prefix: /health",
        "X-Forwarded-Path: /health",
        "X-Forwarded-Uri: /health",
        "X-Script-Name: /health",
        "X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1",
        "Forwarded: for=127.0.0.1;host=localhost",
        "X-HTTP-Method-Override: OPTIONS",
        "X-HTTP-Method: GET\r\nX-Method-Override: HEAD",
        "Referer: http://x/health",
        "Origin: http://x",
        "Access-Control-Request-Method: GET",
        PREFLIGHT,
        f"X-Api-Key: {KEY}",
        f"Api-Key: {KEY}",
        f"Proxy-Authorization: Bearer {KEY}",
        f"Cookie: authorization=Bearer {KEY}; api_key={KEY}",
        f"X-Authorization: Bearer {KEY}",
        f"Authorization_: Bearer {KEY}",
        f"Sec-WebSocket-Protocol: bearer, {KEY}",
    ],
)
def test_no_other_header_opens_a_route(locked: Api, header: str) -> None:
    for path in guarded_of(locked):
        assert send(locked, "GET", path, header).status == 401
        assert send(locked, "POST", path, header, body="{}").status == 401


@pytest.mark.parametrize(
    "host",
    [
        *("Host: x/health", "Host: health", "Host: ", "Host: x?/health", "Host: x/health?"),
        *("Host: x@/health", "Host: 127.0.0.1", "Host: localhost:1/health#", "Host: a\r\nHost: b"),
        *("Host: x/static/app.js?", "Host: [::1]", "Host: http://x/health", ""),
    ],
)
def test_no_host_opens_a_route(locked: Api, host: str) -> None:
    for path in guarded_of(locked):
        assert send(locked, "GET", path, host=host).status in (400, 401)


def test_no_query_opens_a_route(locked: Api) -> None:
    for path in guarded_of(locked):
        for name in ("key", "api_key", "api-key", "token", "access_token", "authorization"):
            assert send(locked, "GET", f"{path}?{name}={KEY}").status == 401
            assert send(locked, "GET", f"{path}?{name}=Bearer%20{KEY}").status == 401


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Authorization:",),
        ("Authorization: Bearer",),
        ("Authorization: Bearer ",),
        (f"Authorization: {KEY}",),
        (f"Authorization: Basic {KEY}",),
        (f"Authorization: Bearer: {KEY}",),
        (f"Authorization: Bearer {KEY[:-1]}",),
        (f"Authorization: Bearer {KEY}x",),
        (f"Authorization: Bearer {KEY}=",),
        (f"Authorization: Bearer {KEY.upper()}",),
        (f"Authorization: Bearer {KEY} {KEY}",),
        (f"Authorization: Bearer {KEY}, Bearer {KEY}",),
        (f"Authorization: Bearer {hash_key(KEY).hex()}",),
        (f'Authorization: Bearer "{KEY}"',),
        ("Authorization: Bearer caf\u00e9",),
        ("Authorization: Bearer \u00ff\u00fe",),
        ("Authorization: Bearer " + "a" * 5000,),
        (GRANT, GRANT),
        (GRANT, "Authorization: Bearer x"),
        ("Authorization: Bearer x", GRANT),
        (GRANT, "Authorization:"),
        (f"Authorization : Bearer {KEY}",),
    ],
)
def test_a_header_that_is_not_exactly_one_known_key_is_401(
    locked: Api, headers: tuple[str, ...]
) -> None:
    reply = send(locked, "GET", "/v1/models", *headers)
    assert reply.status in (400, 401)  # 400: bytes that the parser takes for no header at all
    assert KEY.encode() not in reply.whole


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_s_case_and_spaces_do_not_matter(locked: Api, scheme: str) -> None:
    assert send(locked, "GET", "/v1/models", f"Authorization: {scheme} {KEY}").status == 200


def test_401_is_what_openai_s_clients_expect(locked: Api) -> None:
    reply = send(locked, "GET", "/v1/models", "X-Request-Id: abc")
    assert json.loads(reply.body)["error"] == {
        "message": "an API key is needed: send it as the one header `Authorization: Bearer KEY`",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    for header in (b"www-authenticate: bearer", b"cache-control: no-store", b"x-request-id: abc"):
        assert header in reply.headers
    with (
        openai.OpenAI(api_key="sk-wrong", base_url=f"{locked.url}/v1") as client,
        pytest.raises(openai.AuthenticationError, match="not known here, or it has expired"),
    ):
        client.models.list()
    with openai.OpenAI(api_key=KEY, base_url=f"{locked.url}/v1") as client:
        assert [model.id for model in client.models.list()] == ["echo", "org/other"]
        answer = client.completions.create(model="echo", prompt="hello", max_tokens=5)
        assert answer.choices[0].text


def test_preflights_pass_and_tell_nothing(locked: Api) -> None:
    for path in [*routes_of(locked), "/nothing"]:
        reply = send(locked, "OPTIONS", path, PREFLIGHT)
        assert (reply.status, reply.body) == (204, b"")


def test_a_websocket_is_refused_without_a_key(locked: Api) -> None:
    handshake = (
        *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    for path in (*routes_of(locked), "/nothing"):
        lines = [f"GET {path} HTTP/1.1", "Host: x", *handshake, "", ""]
        with connect(locked) as connection:
            connection.sendall("\r\n".join(lines).encode())
            assert read_all(connection).status == 401


def test_each_request_of_a_connection_is_judged_alone(locked: Api) -> None:
    pair = (f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{grant}\r\n" for grant in (GRANT + "\r\n", ""))
    with connect(locked) as connection:
        connection.sendall("".join(pair).encode() * 2)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        whole = read_all(connection).whole
    assert re.findall(rb"HTTP/1.1 (\d+)", whole) == [b"200", b"401", b"200", b"401", b"200"]


def test_401_comes_before_the_body_and_the_connection_ends_with_it(locked: Api) -> None:
    with connect(locked) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(head.encode())
        early = connection.recv(65536)
        assert early.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in early.lower()
        for _ in range(100):  # a connection that was closed under it would be reset by now
            connection.sendall(b"{" * 1000)
        assert b"HTTP/1.1" not in early[10:] + b"".join(iter(lambda: connection.recv(4096), b""))


def test_a_client_that_waits_for_100_continue_hears_401(locked: Api) -> None:
    with connect(locked) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")


def test_a_body_without_end_is_cut_off(locked: Api) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with connect(locked) as connection:
        connection.sendall(head.encode())
        assert num_taken(connection, chunk, most=4096) < 4096


def num_taken(connection: socket.socket, chunk: bytes, *, most: int) -> int:
    """How many chunks are sent before the other side ends the connection."""
    for number in range(most):
        try:
            connection.sendall(chunk)
        except (ConnectionResetError, BrokenPipeError):
            return number
    return most


# --- the layer alone -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def layer(keys_file: Path) -> Authentication:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "reached", "name": scope.get("state", {}).get(auth.KEY_NAME_STATE)})

    return Authentication(app, KeyRing(keys_file), open_paths=("/",))


def call(layer: Authentication, scope: dict[str, Any], receive: Any = None) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(layer(scope, receive, send))
    return sent


def scope(path: str = "/v1/models", *headers: tuple[bytes, bytes], **more: Any) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": path, "headers": headers, **more}


def test_the_key_s_name_goes_on_with_the_request(layer: Authentication) -> None:
    grant = (b"authorization", f"Bearer {KEY}".encode())
    assert call(layer, scope("/v1/models", grant)) == [{"type": "reached", "name": "me"}]
    asked = scope("/x", grant, type="websocket")
    del asked["method"]
    assert call(layer, asked) == [{"type": "reached", "name": "me"}]
    assert call(layer, scope("/", grant)) == [{"type": "reached", "name": None}]
    assert call(layer, {"type": "lifespan"}) == [{"type": "reached", "name": None}]


def test_a_websocket_is_closed_where_the_server_cannot_say_401(layer: Authentication) -> None:
    asked = {"type": "websocket", "path": "/", "headers": []}
    assert call(layer, asked) == [{"type": "websocket.close", "code": 1008}]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"authorization", b"x-api-key", b"host"]),
            st.binary(max_size=600)
            | st.binary(max_size=80).map(lambda tail: b"Bearer " + tail)
            | st.sampled_from([b"", b"Bearer", f"Bearer {KEY}".encode(), KEY.encode()]),
        ),
        max_size=4,
    )
)
def test_whatever_the_headers_one_exact_key_alone_passes(
    layer: Authentication, headers: list[tuple[bytes, bytes]]
) -> None:
    sent = call(layer, scope("/v1/models", *headers))
    values = [value for name, value in headers if name == b"authorization"]
    if values == [f"Bearer {KEY}".encode()]:
        assert sent == [{"type": "reached", "name": "me"}]
    else:
        assert sent[0]["status"] == 401


@given(
    path=st.text(max_size=30)
    | st.sampled_from(sorted(OPEN_PATHS)).flatmap(
        lambda path: st.text(max_size=4).map(lambda tail: path + tail)
    ),
    kind=st.sampled_from(["http", "websocket", "telnet", ""]),
    method=st.sampled_from(METHODS),
    root_path=st.sampled_from(["", "/", "/health", "/v1"]),
)
def test_whatever_the_path_only_the_list_is_open(
    layer: Authentication, path: str, kind: str, method: str, root_path: str
) -> None:
    sent = call(layer, scope(path, type=kind, method=method, root_path=root_path))
    is_open = kind == "http" and method in ("GET", "HEAD") and path in layer._open_paths
    assert (sent[0]["type"] == "reached") == is_open


def test_a_body_that_dribbles_holds_its_connection_for_a_while_only(
    layer: Authentication, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "DRAIN_S", 0.01)

    async def receive() -> Any:
        await asyncio.Event().wait()

    sent = call(layer, scope("/v1/x", (b"transfer-encoding", b"chunked")), receive)
    assert [message["type"] for message in sent] == [
        "http.response.start",
        "http.response.body",
        "http.response.body",
    ]
    assert sent[1]["more_body"]
    assert not sent[2].get("more_body", False)


# --- the last line of defence --------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "box", "127.0.0.1.example.org"])
def test_beyond_loopback_without_keys_there_is_no_app(served: Any, host: str) -> None:
    with pytest.raises(ConfigurationError, match="can be reached from other machines"):
        build_app(http=HttpConfig(host=host), models=served, dispatcher=EchoDispatcher())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_on_loopback_there_is_one_without_keys(served: Any, host: str) -> None:
    build_app(http=HttpConfig(host=host), models=served, dispatcher=EchoDispatcher())


def test_anonymous_is_served_when_somebody_said_so(served: Any) -> None:
    http = HttpConfig(host="0.0.0.0", allow_anonymous=True)
    build_app(http=http, models=served, dispatcher=EchoDispatcher())


@pytest.mark.parametrize(("has_keys", "status"), [(False, 404), (True, 401)])
def test_without_the_page_its_paths_are_like_any_other(
    served: Any, tmp_path: Path, *, has_keys: bool, status: int
) -> None:
    keys_file = tmp_path / "keys"
    keys_file.write_text("keys: []\n")
    http = HttpConfig(page=False, keys_file=keys_file if has_keys else None)
    app = build_app(http=http, models=served, dispatcher=EchoDispatcher())

    async def statuses() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            answers = [await client.get(path) for path in ("/", "/static/app.js")]
        return [answer.status_code for answer in answers]

    assert asyncio.run(statuses()) == [status, status]


def test_a_keys_file_that_cannot_be_used_ends_the_start(served: Any, tmp_path: Path) -> None:
    http = HttpConfig(keys_file=tmp_path / "none")
    with pytest.raises(ConfigurationError, match="No such file"):
        build_app(http=http, models=served, dispatcher=EchoDispatcher())


def test_the_openapi_document_tells_of_keys(locked: Api) -> None:
    document = json.loads(send(locked, "GET", "/openapi.json", GRANT).body)
    (name,) = document["components"]["securitySchemes"]
    assert document["components"]["securitySchemes"][name]["scheme"] == "bearer"
    assert document["security"] == [{name: []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert (operation.get("security") == []) == (path in OPEN_PATHS)
            assert ("401" in operation["responses"]) == (path not in OPEN_PATHS)
