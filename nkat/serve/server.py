"""The process that listens: its socket, its signals, its end. The only file that knows uvicorn."""

from __future__ import annotations

import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nkat.errors import NKATError
from nkat.host.console import note
from nkat.serve.web import App
from nkat.serve.worker import Worker

_LAST_SECONDS = 5  # that connections have after the last answer, and the thread that answers
_IDLE_SECONDS = 75  # that a client may keep a connection without a request


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, which nobody can connect to before it listens. Raises NKATError where it is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise NKATError(f"--host {host}: {error.strerror or error}") from None
    bound = socket.socket(family, kind, protocol)
    try:
        if hasattr(signal, "SIGHUP"):  # not on Windows, where it lets two programs have one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise NKATError(
                f"port {port} of {host} is taken or not allowed: give another --port, or 0 for any that is free"
            ) from None
        raise NKATError(f"cannot listen at {host}: {error.strerror or error}") from None
    return bound


def address(bound: socket.socket) -> str:
    """Its URL, as a client on this machine writes it."""
    host, port = bound.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def make_server(app: App, worker: Worker, grace: float, on_start: Callable[[], object] = lambda: None) -> Any:
    """A uvicorn server, whose `run(sockets=[…])` returns after Ctrl-C or SIGTERM, when all is told.

    grace: seconds that the answer being written then has to come to its end; on_start: called when it listens
    """
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn's, but a signal ends it in order: its own would end answers in the middle, and raise it again."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_start()

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            with _handled(self.handle_exit):
                yield

        def handle_exit(self, sig: int, frame: object) -> None:
            again, self.should_exit = self.should_exit, True
            if again:
                self.force_exit = True
            # in a thread, because a handler may have come in the middle of what holds the worker's lock
            threading.Thread(target=stop, args=(again,), daemon=True).start()

    def stop(again: bool) -> None:
        if again:
            worker.stop(0)
            return
        worker.stop(grace)
        note(f"stopping: the answer that is being written has {grace:g} s; press Ctrl-C again to stop at once")

    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=int(grace) + _LAST_SECONDS,
    )
    return Server(config)


def serve(app: App, bound: socket.socket, worker: Worker, grace: float, on_start: Callable[[], object]) -> None:
    """Serves until Ctrl-C, SIGTERM, or the terminal is gone."""
    server = make_server(app, worker, grace, on_start)
    server.run(sockets=[bound])
    worker.stop(0)
    if not worker.join(_LAST_SECONDS):
        note("warning: a step of the model was still running")


@contextmanager
def _handled(handle: Any) -> Iterator[None]:
    """Signals that end a program call `handle`; one that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    there = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in there}
    mine = {number: usual for number, usual in before.items() if usual not in (signal.SIG_IGN, None)}
    for number in mine:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, usual in mine.items():
            signal.signal(number, usual)
