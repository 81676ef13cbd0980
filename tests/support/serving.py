"""A server of this process on a free port, in a thread, and a model whose answers a test paces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nkat
from nkat.lm.load import LoadedModel, load_model
from nkat.serve.api import Api
from nkat.serve.arms import Arms
from nkat.serve.model import Ask, End, Piece, Served
from nkat.serve.server import address, bind, make_server
from nkat.serve.web import Settings, make_app
from nkat.serve.worker import Worker
from nkat.theta.set import ThetaSet
from tests.support.tiny_models import write_tiny_model

CONTEXT = 256
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ tone }}assistant\n{% endif %}"
)


def write_model(folder: Path, **options: Any) -> Path:
    """A tiny model with a chat template and a Θ that changes what it says."""
    plain = write_tiny_model(folder / "plain.gguf", "llama", chat_template=TEMPLATE, **options)
    model = nkat.open_model(plain)
    nkat.save(nkat.make_theta(model, rank=4, gamma=0.5), folder / "tiny.nkat", model)
    return folder / "tiny.nkat"


def load_served(path: Path) -> LoadedModel:
    """As the server loads it on a processor, without Θ."""
    return load_model(path, thetas={}, gamma=1.0, int8_activations=True, repack=True)


@dataclass
class Running:
    """log: its lines, one a request"""

    url: str
    worker: Worker
    log: list[str] = field(default_factory=list)


@contextmanager
def running(
    loaded: LoadedModel,
    served: Any = None,
    *,
    thetas: Mapping[str, ThetaSet] | None = None,
    places: int = 40,
    listed: tuple[float, ...] = (),
    **settings: Any,
) -> Iterator[Running]:
    """served: in place of the model itself; thetas: None: the one in its file"""
    if thetas is None:
        thetas = {} if loaded.file.theta is None else {"theta": loaded.file.theta}
    worker = Worker(Served(loaded, thetas, CONTEXT) if served is None else served, places)
    arms = Arms("tiny", {name: one.gamma for name, one in thetas.items()}, dict.fromkeys(thetas, 1.0), None, listed)
    api = Api(worker, loaded, arms, CONTEXT)
    bound = bind("127.0.0.1", 0)
    found = Running(address(bound), worker)
    usual: dict[str, Any] = {"keys": (), "hosts": ("127.0.0.1",), "origins": (), "created": 1, "say": found.log.append}
    server = make_server(make_app(api, Settings(**(usual | settings))), worker, 5.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield found
    finally:
        worker.stop(0)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert worker.join(30)
        bound.close()


class Paced:
    """Answers each prompt with endless "a", a piece each time that the test lets it; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        self.steps = threading.Semaphore(0)
        self.given_up = 0
        self.failure: Exception | None = None

    def answer(self, ask: Ask, go_on: Callable[[], bool]) -> Iterator[Piece | End]:
        self.asked.append(ask)
        if self.failure is not None:
            raise self.failure
        for _ in range(ask.max_tokens):
            while not self.steps.acquire(timeout=0.01):
                if not go_on():
                    self.given_up += 1
                    return
            yield Piece("a")
        yield End("length", len(ask.prompt), 0, ask.max_tokens)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    waiting = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it never came true")
