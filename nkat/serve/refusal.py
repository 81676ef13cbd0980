"""What a client gets instead of an answer: HTTP's status, and a body in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Refusal(Exception):
    """One request that is not answered; the message is for whoever wrote it, and names nothing of this machine.

    status: HTTP's; kind, code, param: OpenAI's `type`, `code` and `param`; headers: besides the usual ones
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """A request that makes no sense."""
    return Refusal(400, message, param=param, code=code)


def busy(seconds: int) -> Refusal:
    """The queue is full."""
    return Refusal(
        429,
        f"the queue is full; try again in {seconds} s",
        kind="requests",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


def stopping() -> Refusal:
    """The server ends before it could answer, or finish an answer."""
    return Refusal(503, "the server is shutting down", kind="server_error", code="shutting_down")


def failed() -> Refusal:
    """A fault of the server's; its log has what happened."""
    return Refusal(500, "the server failed to answer; its log says why", kind="server_error", code="internal_error")
