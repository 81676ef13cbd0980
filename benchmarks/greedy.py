"""The tokens that llama-server chooses at temperature 0, and those that a decoder here does; none ends the text."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nkat.engine.decoder import make_decoder
from nkat.errors import NKATError
from nkat.host.environment import users_environment
from nkat.lm.load import LoadedModel

_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Greedy:
    """count: tokens that llama.cpp chose; equal: how many of them, from the first on, are the same here

    margin: by how much the logit of the choice here leads that of llama.cpp's where they part; None where they do not
    """

    count: int
    equal: int
    margin: float | None

    @property
    def text(self) -> str:
        where = "" if self.margin is None else f" (then one that leads by {self.margin:.1g})"
        return f"{self.equal} of {self.count}{where}"


def compare_greedy(program: Path, loaded: LoadedModel, ids: Sequence[int], count: int) -> Greedy:
    """program: llama-server; loaded: repacked."""
    theirs = _theirs(program, loaded.file.path, ids, count)
    decoder = make_decoder(loaded.model, len(ids) + count)
    logits = decoder.prefill(list(ids))
    ends = list(loaded.tokenizer.eog_ids)
    for at, token in enumerate(theirs):
        logits = logits.flatten().clone()
        logits[ends] = -torch.inf
        if int(logits.argmax()) != token:
            return Greedy(count, at, float(logits.max() - logits[token]))
        logits = decoder.step(token)
    return Greedy(count, len(theirs), None)


def _theirs(program: Path, model: Path, ids: Sequence[int], count: int) -> list[int]:
    question = {
        "prompt": list(ids),
        "n_predict": count,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "return_tokens": True,
    }
    with _server(program, model, len(ids) + count + 8) as url:
        answer = _ask(f"{url}/completion", question)
    chosen = [int(token) for token in answer["tokens"]]
    if len(chosen) != count:
        raise NKATError(f"{program}: chose {len(chosen)} tokens of {count} with {model.name}")
    return chosen


def _ask(url: str, question: dict[str, Any] | None) -> Any:
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_SECONDS) as answer:
        return json.load(answer)


@contextmanager
def _server(program: Path, model: Path, context: int) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [program, "-m", model, "--host", "127.0.0.1", "--port", port, "-c", context, "-t", 1, "-fa", "off"]
    words += ["-ctk", "f32", "-ctv", "f32", "-np", 1, "--no-webui"]
    try:
        child = subprocess.Popen(
            [str(word) for word in words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=users_environment(),
        )
    except OSError as error:
        raise NKATError(f"{program}: cannot be run: {error.strerror}") from None
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + _SECONDS
        while True:
            if child.poll() is not None or time.monotonic() > end:
                raise NKATError(f"{program}: did not come up with {model.name}")
            try:
                _ask(f"{url}/health", None)
                break
            except (OSError, ValueError):
                time.sleep(0.05)
        yield url
    finally:
        child.terminate()
        child.wait()


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nIt is a part of another command: python -m benchmarks.architectures --help")
