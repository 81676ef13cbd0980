"""The load test of the server finds what is lost, and a small run of it loses nothing."""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import serve_load
from benchmarks.serve_load import Outcome, Question, ask, report
from nkat.errors import NKATError
from tests.support.serving import write_model

QUESTION = Question("the rain", "tiny", chat=False)
ENDED = {"status": 0, "seconds": 1.0, "answer": "whole"}


def summary(outcomes: list[Outcome], end: dict[str, object]) -> None:
    options = argparse.Namespace(model=Path("tiny.nkat"), clients=2, max_tokens=4)
    report(options, [QUESTION], outcomes, 1.0, [100, 101], end)


def test_what_is_lost_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    fine = [Outcome("same", 1.0), Outcome("other text", 2.0), Outcome("left", 0.1)]
    summary(fine, ENDED)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["lost"], record["outcomes"]["same"]) == (0, 1)
    with pytest.raises(NKATError, match="status 503"):
        summary([*fine, Outcome("status 503", 1.0)], ENDED)
    with pytest.raises(NKATError, match="ended with status -9"):
        summary(fine, ENDED | {"status": -9})


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "status 500"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"text": "a"}]}\n\n', "ended early"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "shutting down"}}\n\n', "shutting down"),
        (b"", "RemoteDisconnected"),
    ],
)
def test_an_answer_that_does_not_come_is_noticed(sent: bytes, said: str) -> None:
    def serve(listener: socket.socket) -> None:
        link, _ = listener.accept()
        with link:
            link.recv(65536)
            link.sendall(sent)
            link.shutdown(socket.SHUT_WR)
            while link.recv(65536):  # what is closed with something unread ends as a reset
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with pytest.raises(NKATError, match=said):
            ask(f"http://127.0.0.1:{listener.getsockname()[1]}", QUESTION, 4, stream=True)


def test_a_small_run_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("uvicorn", reason="the server needs starlette and uvicorn: pip install nkat[serve]")
    flags = ("--clients", "9", "--requests", "2", "--max-tokens", "4", "--threads", "1")
    monkeypatch.setattr(sys, "argv", ["serve_load", str(write_model(tmp_path)), *flags])
    monkeypatch.setattr(serve_load, "PROMPTS", ("the rain",))
    serve_load.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["lost"], record["requests"]) == (0, 18)
    assert record["stop"]["status"] == 0
