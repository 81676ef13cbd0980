"""A server over HTTP: ports, URLs, one request."""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from nkat.errors import NKATError
from nkat.host.record import parse_json

_EVERYWHERE = ("", "0.0.0.0", "::")
_MOST_BYTES = 1 << 20  # of an answer; another program at that port may never end one


def base_url(host: str, port: int, secure: bool = False) -> str:
    """Where to reach a server that listens on `host`, from this machine."""
    name = "127.0.0.1" if host in _EVERYWHERE else host
    return f"http{'s' if secure else ''}://{f'[{name}]' if ':' in name else name}:{port}"


def is_private(host: str) -> bool:
    """Whether only this machine can reach it."""
    return host in ("localhost", "::1") or host.startswith("127.")


def check_port(host: str, port: int, known: Mapping[str, Callable[[str], str | None]]) -> None:
    """Raises NKATError when a server could not listen there: why, who does, and which port is free.

    known: programs by name, with what asks a URL for its model
    By connecting and by binding: KoboldCpp itself asks for an address that is in use (SO_REUSEADDR), which Windows
    grants.
    """
    name = "127.0.0.1" if host in _EVERYWHERE else host
    refused = _refusal(host, port)
    code = refused.errno if refused is not None else 0
    # Windows may say "access denied" for a port that another program has.
    busy = code == errno.EADDRINUSE or (code in (0, errno.EACCES) and _listens(name, port))
    if refused is not None and not busy:
        raise NKATError(f"cannot listen at port {port} of --host {host}: {refused.strerror or refused}")
    if not busy:
        return
    url = base_url(host, port)
    told = ((title, model) for title, name_of in known.items() if (model := name_of(url)))
    who = next((f"a {title} with {model}" for title, model in told), "another program")
    free = next((p for p in range(port + 1, min(port + 50, 65536)) if _refusal(host, p) is None), None)
    hint = f"; port {free} is free: --port {free}" if free else ""
    raise NKATError(f"port {port} at {name} is in use by {who}{hint}")


def get_json(url: str, seconds: float = 2) -> Any:
    """What a URL answers, or None when it answers no JSON, or with an error."""
    try:
        with _opener(url).open(url, timeout=seconds) as answer:
            return parse_json(answer.read(_MOST_BYTES))
    except (OSError, ValueError, http.client.HTTPException):  # not there yet, or something else
        return None


def post_json(url: str, body: Mapping[str, Any], seconds: float) -> Any:
    """What a URL answers to a JSON request. Raises NKATError when it does not."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with _opener(url).open(request, timeout=seconds) as answer:
            return parse_json(answer.read(_MOST_BYTES))
    except urllib.error.HTTPError as error:
        raise NKATError(f"{url}: status {error.code}, {error.read(300).decode(errors='replace')!r}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise NKATError(f"{url}: no answer: {error}") from None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Without the proxy that the environment may name, and without checking a certificate: the user's own machine."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if url.startswith("https"):
        handlers.append(urllib.request.HTTPSHandler(context=ssl._create_unverified_context()))
    return urllib.request.build_opener(*handlers)


def _listens(name: str, port: int) -> bool:
    try:
        with socket.create_connection((name, port), timeout=1):
            return True
    except OSError:
        return False


def _refusal(host: str, port: int) -> OSError | None:
    """Why the system does not let a program listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name != "nt":  # or a port that was closed a minute ago would count as taken
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None
