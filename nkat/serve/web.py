"""The API over HTTP: routes, keys, limits, one line of log for each request. The only file that knows Starlette."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from base64 import b64encode
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import monotonic, strftime
from typing import Any

from nkat.host.streams import printable
from nkat.serve.answers import encoded
from nkat.serve.api import Api
from nkat.serve.arms import Arm
from nkat.serve.refusal import Refusal, failed

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_MOST_BYTES = 8 << 20  # of a request: a prompt of a million tokens
_BODY_SECONDS = 60.0  # for the whole of it to arrive
_REMARKS = "nkat.remarks"  # in a request's scope: what its line of log says of it
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Settings:
    """How the API is reached.

    keys: one of which a client must show; none: everybody is answered
    hosts: names by which a browser may call it; None: any. A page from elsewhere could otherwise have its own name
        point here (DNS rebinding), and read what it is answered
    origins: web pages that may call it, beside its own; "*": all
    created: of the model's file, seconds since 1970
    say: gets a line for each request
    """

    keys: tuple[str, ...]
    hosts: tuple[str, ...] | None
    origins: tuple[str, ...]
    created: int
    say: Callable[[str], object]


def make_app(api: Api, settings: Settings) -> App:
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    page, policy = read_page()
    models = [_model(api, arm, settings.created) for arm in api.arms.all()]

    def answer(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
        return Response(encoded(value), status, headers, _JSON)

    async def show_page(_: Request) -> Response:
        return Response(page, headers=policy, media_type="text/html")

    async def health(_: Request) -> Response:
        stopping = api.worker.stopping
        return answer(503 if stopping else 200, {"status": "stopping" if stopping else "ok"})

    async def list_models(_: Request) -> Response:
        return answer(200, {"object": "list", "data": models})

    async def one_model(request: Request) -> Response:
        return answer(200, _model(api, api.arms.named(request.path_params["name"]), settings.created))

    async def refused(_: Request, error: Exception) -> Response:
        if isinstance(error, Refusal):
            refusal, headers = error, error.headers
        elif isinstance(error, HTTPException):
            refusal = Refusal(error.status_code, f"{error.detail}: see docs/serve.md for what there is")
            headers = dict(error.headers or {})
        else:  # a fault of ours; Starlette raises it again, so that it is in the log
            refusal, headers = failed(), {}
        return answer(refusal.status, refusal.body(), headers)

    routes = [
        Route("/", show_page),
        Route("/health", health),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/completions", Generating(api, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", Generating(api, chat=True), methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {Refusal: refused, HTTPException: refused, Exception: refused}
    app: App = Guard(Starlette(routes=routes, exception_handlers=handlers), settings)
    if settings.origins:
        app = CORSMiddleware(app, settings.origins, ("GET", "POST"), ("*",), expose_headers=("Retry-After",))
    return Log(app, settings.say)


def read_page() -> tuple[bytes, dict[str, str]]:
    """The chat page, and headers by which a browser runs its one script and loads nothing else."""
    page = Path(__file__).with_name("page.html").read_bytes()
    found = re.search(rb"<script>(.*?)</script>", page, re.DOTALL)
    if found is None:
        raise RuntimeError("page.html has no script")
    script = b64encode(sha256(found[1]).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _model(api: Api, arm: Arm, created: int) -> dict[str, Any]:
    own = {
        "theta": dict(arm.weights),
        "gamma": api.arms.strength(arm),
        "context_length": api.context,
        "chat": api.chat_problem is None,
    }
    return {"id": arm.name, "object": "model", "created": created, "owned_by": "nkat", "nkat": own}


class Generating:
    """An endpoint that generates."""

    def __init__(self, api: Api, chat: bool) -> None:
        self._api, self._chat = api, chat

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        reply = HttpReply(scope, send)
        try:
            data = await read_body(scope, receive)
            await while_connected(receive, self._api.answer(data, self._chat, reply))
        except Refusal as refusal:
            reply.remark(refusal.message)
            await reply.json(refusal.status, refusal.body(), refusal.headers)
        except ClientGone:
            reply.remark("the client went away")


class HttpReply:
    """`nkat.serve.api.Reply` as HTTP."""

    def __init__(self, scope: Message, send: Send) -> None:
        self._scope, self._send = scope, send

    def remark(self, words: str) -> None:
        self._scope.setdefault(_REMARKS, []).append(words)

    async def json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = encoded(value)
        length = {"Content-Type": _JSON, "Content-Length": str(len(data))}
        await self._start(status, {**length, **(headers or {})})
        await self._send({"type": "http.response.body", "body": data})

    async def begin_stream(self) -> None:
        # the last one keeps a proxy from holding back what it has not all of
        kind = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        await self._start(200, {**kind, "X-Accel-Buffering": "no"})

    async def data(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


class ClientGone(Exception):
    """Nobody is there any more to be answered."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work, and gives it up when the client goes away. Raises ClientGone then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:  # also where this is cancelled itself
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
    if task.cancelled():
        raise ClientGone
    task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(scope: Message, receive: Receive) -> bytes:
    """A request's JSON. Raises Refusal for another type, or too many bytes; ClientGone."""
    kind = _header(scope, "content-type").partition(";")[0].strip().lower()
    if kind != _JSON:  # nothing else makes a browser ask first whether a page may send it here
        raise Refusal(415, f"the body must be JSON: send the header Content-Type: {_JSON}")
    if _header(scope, "content-encoding").lower() not in ("", "identity"):
        raise Refusal(415, "the body must not be compressed")
    length = _header(scope, "content-length")
    if length.isdecimal() and int(length) > _MOST_BYTES:
        raise _too_large()
    try:
        return await asyncio.wait_for(_body(receive), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refusal(408, "the body took too long to arrive") from None


async def _body(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MOST_BYTES:
            raise _too_large()
        more = message.get("more_body", False)
    return b"".join(parts)


def _too_large() -> Refusal:
    return Refusal(413, f"the body has more than {_MOST_BYTES} bytes")


def _header(scope: Message, name: str) -> str:
    wanted = name.encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == wanted), "")


class Guard:
    """Lets a request in whose host is known, and to /v1 one that shows a key."""

    def __init__(self, app: App, settings: Settings) -> None:
        self._app, self._hosts = app, settings.hosts
        self._keys = [_digest(key) for key in settings.keys]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        reply = HttpReply(scope, send)
        reply.remark(refusal.message)
        await reply.json(refusal.status, refusal.body(), refusal.headers)

    def _refusal(self, scope: Message) -> Refusal | None:
        host = host_name(_header(scope, "host"))  # no browser leaves it out
        if self._hosts is not None and host and host not in self._hosts and not is_this_machine(host):
            return Refusal(403, "this server answers to its own address only", code="host_not_allowed")
        if not self._keys or not scope["path"].startswith("/v1"):
            return None
        scheme, _, shown = _header(scope, "authorization").partition(" ")
        digest = _digest(shown.strip())
        known = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, whichever it is
        if scheme.lower() == "bearer" and any(known):
            return None
        said = "Incorrect API key provided" if shown else "You did not provide an API key (Authorization: Bearer KEY)"
        return Refusal(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    """Of the same length for every key, so that comparing takes the same time."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def host_name(header: str) -> str:
    """A Host header without its port: [::1]:8080 → ::1"""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def is_this_machine(host: str) -> bool:
    """Whether only this machine is called so, and no name server is asked."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Log:
    """A line for each request: when, who, what, what became of it, how long it took. No prompt and no answer."""

    def __init__(self, app: App, say: Callable[[str], object]) -> None:
        self._app, self._say = app, say

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = monotonic(), "-"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        remarks: list[str] = scope.setdefault(_REMARKS, [])
        try:
            await self._app(scope, receive, watched)
        finally:
            client = (scope.get("client") or ("?",))[0]
            about = "".join(f"; {words}" for words in remarks)
            line = f"{strftime('%H:%M:%S')} {client} {scope['method']} {scope['path']} {status}"
            self._say(printable(f"{line} {monotonic() - started:.2f} s{about}"))  # a path may hold line breaks
