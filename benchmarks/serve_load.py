"""The server under load: many clients at once, none of whose answers may be lost, changed, or somebody else's.

    python -m benchmarks.serve_load models/smollm2.nkat --clients 32 --requests 8

Starts `nkat_server.py` on a free port. Each question (a prompt, as a text or a chat, with one of the Θ that /v1/models
lists) is asked alone first. Then so many clients at once ask at random, with temperature 0 and half of them streaming;
each answer is compared with the one that was given alone, and one client in eight goes away in the middle of an answer
now and then. Answers that differ are counted: what is in the cache already was computed in other groups of tokens,
whose sums are rounded otherwise, and a near tie can fall the other way. The server's memory is looked at four times a
second. At the end it is told to stop while it writes an answer. The last line of stdout is JSON.

Fails when an answer is lost or ends early, or the server does not end with status 0.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.serve_load")

import http.client
import json
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch

from nkat.errors import NKATError
from nkat.host import commandline, console, hardware
from nkat.host.console import format_bytes, note, say
from nkat.host.record import print_record, toolkit_version
from nkat.host.tables import Column, Table, show

SERVER = Path(__file__).resolve().parents[1] / "nkat_server.py"
PROMPTS = (
    "The history of the steam engine",
    "A recipe for bread begins with",
    "In the year 1969",
    "Name three rivers.",
    "The hen and the fox went",
    "Why is the sky blue?",
)
_ANSWER_SECONDS = 600
_START_SECONDS = 300
_LEAVES = 8  # one client in so many goes away now and then
_LEAVING = 0.5  # of its streams


@dataclass(frozen=True, slots=True)
class Question:
    prompt: str
    model: str
    chat: bool

    def body(self, most: int, stream: bool) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": self.model, "max_tokens": most, "temperature": 0, "stream": stream}
        if self.chat:
            return asked | {"messages": [{"role": "user", "content": self.prompt}]}
        return asked | {"prompt": self.prompt}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request: "same", "other text", "left", or what went wrong; and after how many seconds."""

    kind: str
    seconds: float


def ask(url: str, question: Question, most: int, stream: bool, leave: bool = False) -> str | None:
    """The answer's text; None: it was left behind its first piece. Raises NKATError for one that does not come."""
    link = http.client.HTTPConnection(urlsplit(url).netloc, timeout=_ANSWER_SECONDS)
    path = "/v1/chat/completions" if question.chat else "/v1/completions"
    try:
        link.request("POST", path, json.dumps(question.body(most, stream)), {"Content-Type": "application/json"})
        answer = link.getresponse()
        if answer.status != 200:
            raise NKATError(f"status {answer.status}")
        if not stream:
            choice = json.loads(answer.read())["choices"][0]
            return str(choice["message"]["content"] if question.chat else choice["text"])
        text, ended = "", False
        while line := answer.readline():
            data = line.strip().removeprefix(b"data: ")
            if data == b"[DONE]":
                ended = True
            if ended or not line.startswith(b"data: "):
                continue
            part = json.loads(data)
            if "error" in part:
                raise NKATError(part["error"]["message"])
            piece = part["choices"][0]["delta"].get("content", "") if question.chat else part["choices"][0]["text"]
            if piece and leave:
                return None
            text += piece
        if not ended:
            raise NKATError("a stream ended early")
        return text
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise NKATError(f"{type(error).__name__}") from None
    finally:
        link.close()


@contextmanager
def server(arguments: Sequence[object]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, once it listens. Raises NKATError where it does not."""
    command = [sys.executable, str(SERVER), *map(str, arguments), "--port", "0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    listening = threading.Event()
    url = ""

    def read() -> None:
        nonlocal url
        assert child.stdout is not None
        for line in child.stdout:
            said.append(line.rstrip())
            if found := re.search(r"listening at (http://\S+) ", line):
                url = found[1]
                listening.set()
        listening.set()

    threading.Thread(target=read, daemon=True).start()
    listening.wait(_START_SECONDS)
    try:
        if not url:
            raise NKATError(f"the server did not start: {said[-1] if said else 'it said nothing'}")
        yield child, url
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def models(url: str) -> list[str]:
    link = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    link.request("GET", "/v1/models")
    found = [one["id"] for one in json.loads(link.getresponse().read())["data"]]
    link.close()
    return found


def run_client(
    url: str, number: int, questions: Sequence[Question], alone: dict[Question, str], requests: int, most: int, bar: Any
) -> list[Outcome]:
    """One client's questions, one after the other."""
    draw, found = random.Random(number), []
    for _ in range(requests):
        question, stream = draw.choice(questions), draw.random() < 0.5
        leave = stream and number % _LEAVES == 0 and draw.random() < _LEAVING
        started = perf_counter()
        try:
            text = ask(url, question, most, stream, leave)
            kind = "left" if text is None else "same" if text == alone[question] else "other text"
        except NKATError as error:
            kind = str(error)
        found.append(Outcome(kind, perf_counter() - started))
        bar.update()
    return found


class Watch:
    """The resident memory of a process, four times a second."""

    def __init__(self, pid: int) -> None:
        self._process, self._over = psutil.Process(pid), threading.Event()
        self.bytes: list[int] = []
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self.bytes.append(self._process.memory_info().rss)
            if self._over.wait(0.25):
                return


def stop(child: subprocess.Popen[str], url: str, question: Question) -> dict[str, Any]:
    """Tells it to stop while it writes an answer, of which the client gets the end or a word."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, url, question, 64, True)
        sleep(1.0)
        started = perf_counter()
        child.send_signal(signal.SIGTERM)
        child.wait(120)
        try:
            answer.result()
            told = "whole"
        except NKATError as error:
            told = str(error)
    return {"status": child.returncode, "seconds": perf_counter() - started, "answer": told}


def main() -> None:
    parser = commandline.parser(
        "The server under load.", "  python -m benchmarks.serve_load models/smollm2.nkat --clients 32"
    )
    parser.add_argument("model", type=Path, help="a .nkat or .gguf")
    parser.add_argument("--clients", type=commandline.positive_int, default=32, metavar="N", help="at once (32)")
    parser.add_argument("--requests", type=commandline.positive_int, default=8, metavar="N", help="of each client (8)")
    parser.add_argument("--max-tokens", type=commandline.positive_int, default=16, metavar="N", help="an answer (16)")
    parser.add_argument("--gammas", type=float, nargs="+", default=[], metavar="G", help="further strengths of Θ")
    parser.add_argument("--threads", type=commandline.thread_count, metavar="N")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    arguments: list[object] = ["--model", options.model, "--queue", options.clients, "--quiet"]
    arguments += ["--gammas", *options.gammas] if options.gammas else []
    arguments += ["--threads", options.threads] if options.threads else []
    with server(arguments) as (child, url):
        questions = [Question(p, model, chat) for p in PROMPTS for model in models(url) for chat in (False, True)]
        alone: dict[Question, str] = {}
        with console.bar(len(questions), "each question alone", "answer") as bar:
            for question in questions:
                text = ask(url, question, options.max_tokens, stream=True)
                assert text is not None
                alone[question] = text
                bar.update()
        total = options.clients * options.requests
        started = perf_counter()
        with (
            Watch(child.pid) as watch,
            console.bar(total, f"{options.clients} clients", "answer") as bar,
            ThreadPoolExecutor(options.clients) as pool,
        ):
            clients = [
                pool.submit(run_client, url, i, questions, alone, options.requests, options.max_tokens, bar)
                for i in range(options.clients)
            ]
            outcomes = [outcome for client in clients for outcome in client.result()]
        seconds = perf_counter() - started
        end = stop(child, url, questions[0])
    report(options, questions, outcomes, seconds, watch.bytes, end)


def report(
    options: Any,
    questions: Sequence[Question],
    outcomes: Sequence[Outcome],
    seconds: float,
    resident: Sequence[int],
    end: dict[str, Any],
) -> None:
    counts = Counter(outcome.kind for outcome in outcomes)
    answered = [outcome for outcome in outcomes if outcome.kind in ("same", "other text")]
    lost = {kind: count for kind, count in counts.items() if kind not in ("same", "other text", "left")}
    quarter = max(1, len(resident) // 4)
    first, last = float(np.mean(resident[:quarter])), float(np.mean(resident[-quarter:]))
    waits = [float(value) for value in np.quantile([outcome.seconds for outcome in answered], (0.5, 0.9, 0.99))]
    lost_text = ", ".join(f"{count} ({kind})" for kind, count in lost.items()) or "0"
    columns = [
        Column("", "model"),
        Column("requests", ("requests", "clients", "questions"), "{} by {} clients, {} questions".format),
        Column("answered as alone", "same"),
        Column("another text than alone", "other_text"),
        Column("left by the client", "left"),
        Column("lost", "lost"),
        Column("memory, first quarter of the time", "first_bytes", format_bytes),
        Column("memory, last quarter", ("last_bytes", "growth"), lambda n, more: f"{format_bytes(n)} ({more:+.2%})"),
        Column("memory, most", "most_bytes", format_bytes),
        Column("answers a second", "answers_per_second", ".2f"),
        Column("an answer took, s", ("p50_s", "p90_s", "p99_s"), "half {:.2f}, 90 % {:.2f}, 99 % {:.2f}".format),
        Column("told to stop in an answer", ("stop_status", "stop_answer"), "status {}, the answer {}".format),
    ]
    row = {
        "model": str(options.model),
        "requests": len(outcomes),
        "clients": options.clients,
        "questions": len(questions),
        "lost": lost_text,
        "most_bytes": max(resident),
        **{kind.replace(" ", "_"): counts[kind] for kind in ("same", "other text", "left")},
        "first_bytes": first,
        "last_bytes": last,
        "growth": last / first - 1,
        "answers_per_second": len(answered) / seconds,
        **dict(zip(("p50_s", "p90_s", "p99_s"), waits, strict=True)),
        "stop_status": end["status"],
        "stop_answer": end["answer"],
    }
    show(Table("serve load", columns, [row], sideways=True))
    say()
    record = {
        "model": options.model.name,
        "clients": options.clients,
        "requests": len(outcomes),
        "max_tokens": options.max_tokens,
        "outcomes": dict(counts),
        "lost": sum(lost.values()),
        "seconds": seconds,
        "seconds_quantiles": {"0.5": waits[0], "0.9": waits[1], "0.99": waits[2]},
        "resident_bytes": {"first_quarter": first, "last_quarter": last, "most": max(resident)},
        "stop": end,
        "machine": hardware.describe(torch.device("cpu")),
        **toolkit_version(),
    }
    print_record(record)
    if lost or end["status"] != 0:
        raise NKATError(f"lost: {lost or 'none'}; the server ended with status {end['status']}")
    note("nothing was lost")
