"""The thread that owns the model, and the one queue before it: first come, first answered."""

from __future__ import annotations

import math
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable
from time import monotonic

from nkat.host.console import note
from nkat.serve.model import Ask, End, Piece, Served
from nkat.serve.refusal import Refusal, busy, failed, stopping

Event = Piece | End | Refusal
_REMEMBERED = 16  # answers, of whose times the next one's is guessed
_MOST_PATIENCE = 60  # seconds, the longest that a client is told to wait before it tries again


class Job:
    """One question in the queue.

    deliver: is given what comes of it, from the worker's thread: pieces, then an end or a refusal; after `cancel`
        nothing more, or a little
    """

    def __init__(self, ask: Ask, deliver: Callable[[Event], object]) -> None:
        self.ask, self.deliver = ask, deliver
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


class Place:
    """Somebody's place in the queue, from before the question is prepared until it is answered or given up."""

    def __init__(self, give_back: Callable[[], object]) -> None:
        self._give_back: Callable[[], object] | None = give_back

    def leave(self) -> None:
        """Gives it back; a second time is as good as none."""
        if self._give_back is not None:
            self._give_back()
            self._give_back = None


class Worker:
    """Answers one question after the other, in a thread of its own.

    Whoever has a question takes a place first, so that no more are prepared than are to be answered.
    """

    def __init__(self, served: Served, places: int) -> None:
        """places: questions at a time, the one that is being answered included"""
        self._served, self._places, self._taken = served, places, 0
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._lock = threading.Lock()
        self._times: deque[float] = deque(maxlen=_REMEMBERED)
        self._deadline = math.inf
        self._thread = threading.Thread(target=self._work, name="nkat-answers", daemon=True)
        self._thread.start()

    def enter(self) -> Place:
        """Takes a place. Raises Refusal when there is none, or the server is stopping."""
        with self._lock:
            if self.stopping:
                raise stopping()
            if self._taken >= self._places:
                usual = sum(self._times) / len(self._times) if self._times else 1.0
                raise busy(max(1, min(_MOST_PATIENCE, math.ceil(usual))))
            self._taken += 1
        return Place(self._leave)

    def _leave(self) -> None:
        with self._lock:
            self._taken -= 1

    def submit(self, job: Job) -> None:
        with self._lock:
            if self.stopping:
                raise stopping()
            self._jobs.put(job)

    @property
    def stopping(self) -> bool:
        return self._deadline < math.inf

    def stop(self, grace: float) -> None:
        """No more questions; those that wait are refused, and the one being answered has so many seconds left."""
        with self._lock:
            first = not self.stopping
            self._deadline = min(self._deadline, monotonic() + grace)
            if first:
                self._jobs.put(None)

    def join(self, seconds: float) -> bool:
        """Waits until the thread has ended; False: it has not."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self.stopping:
                job.deliver(stopping())
            elif not job.cancelled:
                started = monotonic()
                self._answer(job)
                with self._lock:
                    self._times.append(monotonic() - started)

    def _answer(self, job: Job) -> None:
        def go_on() -> bool:
            return not job.cancelled and monotonic() < self._deadline

        event: Event | None = None
        try:
            for event in self._served.answer(job.ask, go_on):
                job.deliver(event)
        except Exception:  # whatever it is, the next client is to be answered
            note(f"warning: a request failed\n{traceback.format_exc()}")
            job.deliver(failed())
            return
        if not isinstance(event, End) and not job.cancelled:
            job.deliver(stopping())
