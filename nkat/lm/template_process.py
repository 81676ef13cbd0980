"""The process in which a chat template runs (`nkat.lm.template`), for one conversation or for many in turn."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from nkat.errors import NKATError

SECONDS = 20  # by the clock: `nkat.lm.template` has half of it on the processor
_SIGKILL, _SIGXCPU = 9, 24  # what Linux sends for too much time


class TemplateProcess:
    """Started when it is first needed, and anew after a template that ended it.

    Ends when it is closed, or nobody has it any more.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def answers(self, template: str, renders: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """{"text": …} or {"error": …} for each set of variables. Raises NKATError for what ends the process."""
        request = json.dumps({"template": template, "renders": renders}).encode() + b"\n"
        process, given, taken = self._running()
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        clock = threading.Timer(SECONDS, end)
        clock.daemon = True
        clock.start()
        try:
            given.write(request)
            given.flush()
            line = taken.readline()
        except OSError:  # it is gone, or went while it was given something
            line = b""
        except BaseException:  # Ctrl-C: what it still answers belongs to no later request
            self.close()
            raise
        finally:
            clock.cancel()
        try:
            found: list[dict[str, str]] = json.loads(line)
        except ValueError:
            process.kill()
            status = process.wait()
            self.close()
            if late.is_set():
                raise failed(f"it was not done after {SECONDS} seconds") from None
            took_long = status in (-_SIGXCPU, -_SIGKILL)
            raise failed("it takes too long" if took_long else f"it ended its process with status {status}") from None
        return found

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue  # what was not yet written to it went with it

    def _running(self) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
        process = self._process
        if process is not None and process.poll() is not None:
            self.close()
            process = None
        if process is None:
            program = str(Path(__file__).with_name("template.py"))
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            try:  # in a session of its own: a terminal's Ctrl-C would end it between two requests
                process = subprocess.Popen([sys.executable, "-I", program], **pipes, start_new_session=True)
            except OSError as error:
                raise NKATError(
                    f"no process could be started for the chat template: {error.strerror or error}"
                ) from None
            self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        return process, process.stdin, process.stdout


def failed(why: str) -> NKATError:
    return NKATError(f"the chat template cannot be used: {why}")
