"""From a path to the first token: opening a model as asked on the command line, and what that takes.

Time and memory of a start are measured in a process of its own, so that neither the caller's memory nor what it has
already imported and compiled is in them. There the model is opened twice: the first time pays for everything that a
process does once (compilation or loading compiled code, first use of libraries, starting CUDA), the second does not.
The file is in the system's page cache the second time, and usually the first.
"""

from __future__ import annotations

import contextlib
import gc
import io
import signal
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import psutil

from nkat.engine.decoder import make_decoder
from nkat.errors import NKATError
from nkat.host import hardware
from nkat.host.memory import Memory, memory
from nkat.lm.request import Request

PROMPT_TOKENS = 16  # of the prompt before the first token: short, because prefill is measured by itself
PROMPT_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Startup:
    """Seconds of one start, and the memory behind its first token.

    process: from the process's start to this measurement: the interpreter and imports
    load: opening and loading the model; with Θ in a file of its own that includes hashing the model
    decoder: making what runs the steps
    first_token: from opening the file to the first token behind a prompt of PROMPT_TOKENS tokens
    first_token_cold: the same, the first time in a process
    before, after: memory before opening the file and behind the first cold token
    """

    process: float
    load: float
    decoder: float
    first_token: float
    first_token_cold: float
    before: Memory
    after: Memory

    @property
    def once(self) -> float:
        """What a process pays once: compilation, first use of libraries, starting CUDA."""
        return max(0.0, self.first_token_cold - self.first_token)

    @property
    def model_bytes(self) -> int:
        """Resident memory that the model added: the file's pages, Θ, a small KV cache, compiled code, buffers."""
        return self.after.resident - self.before.resident

    def record(self) -> dict[str, Any]:
        return {
            "process_start_seconds": self.process,
            "load_seconds": self.load,
            "decoder_seconds": self.decoder,
            "first_token_seconds": self.first_token,
            "first_token_cold_seconds": self.first_token_cold,
            "compile_seconds": self.once,
            "model_memory_bytes": self.model_bytes,
            "memory_before_model": asdict(self.before),
            "memory_after_first_token": asdict(self.after),
        }


def measure_startup(request: Request, prompt: str) -> Startup:
    """Opens the model twice in this process, which should be a fresh one; see `fresh_startup`."""
    process = time.time() - psutil.Process().create_time()
    before = memory(request.model)
    cold, after = _first_token(request, prompt)
    gc.collect()
    warm, _ = _first_token(request, prompt)
    return Startup(process, warm[0], warm[1], warm[2], cold[2], before, after)


def fresh_startup(request: Request, prompt: str, threads: int) -> Startup:
    """`measure_startup` in a new process. Raises as loading does, and NKATError when that process dies.

    prompt: a text whose first PROMPT_CHARACTERS are at least PROMPT_TOKENS tokens; fewer are used as they are
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    # Little enough for the pipe to take at once: `start` would otherwise wait until the other process has imported all.
    arguments = sender, request, prompt[:PROMPT_CHARACTERS], threads
    process = context.Process(target=_answer, args=arguments, daemon=True)
    # Ctrl-C reaches every process of a terminal; a new one that ignores it from birth leaves the answer to this one.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    sender.close()  # the other process holds the only one, so that its end is noticed
    try:
        answer: Startup | Exception = receiver.recv()
    except EOFError:
        raise NKATError(
            f"{request.model}: the process that measures loading ended without an answer (too little memory?)"
        ) from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(sender: Connection, request: Request, prompt: str, threads: int) -> None:
    hardware.set_threads(threads)
    try:
        # notes on the model are for the process that asked to give: it loads the same one
        with contextlib.redirect_stderr(io.StringIO()):
            answer = measure_startup(request, prompt)
        sender.send(answer)
    except Exception as error:  # whatever it is, the process that asked reports it
        sender.send(error)


def _first_token(request: Request, prompt: str) -> tuple[tuple[float, float, float], Memory]:
    """Seconds for loading, for making the decoder, and for everything up to the first token; memory behind it."""
    started = time.perf_counter()
    loaded = request.load(*request.open())
    opened = time.perf_counter()
    ids = loaded.tokenizer.encode(prompt[:PROMPT_CHARACTERS], add_special=True)[:PROMPT_TOKENS]
    encoded = time.perf_counter()
    decoder = make_decoder(loaded.model, len(ids) + 1)
    made = time.perf_counter()
    int(decoder.prefill(ids).argmax())  # a number on the processor: whatever computes it has finished
    finished = time.perf_counter()
    seconds = opened - started, made - encoded, finished - started
    return seconds, memory(*loaded.file.files)
