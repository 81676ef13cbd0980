"""Ctrl-C that waits, in a process of its own."""

from __future__ import annotations

import os
import signal

import pytest

from nkat.host.interrupts import Gate, Terminated, termination


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends the process")
def test_interruptions_wait_where_the_gate_is_closed() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Gate().closed() as gate:
        send(signal.SIGINT)
        done.append("work")  # not in the middle of this
        gate.check()
        done.append("never")
    with pytest.raises(KeyboardInterrupt), Gate().closed() as gate, gate.let_through():
        send(signal.SIGINT)
        done.append("never")
    with pytest.raises(KeyboardInterrupt), Gate().closed() as gate:
        send(signal.SIGINT)
        with gate.let_through():
            done.append("never")
    with pytest.raises(KeyboardInterrupt), Gate().closed():
        send(signal.SIGINT)
        done.append("more")
        send(signal.SIGINT)  # a second one does not wait
        done.append("never")
    with pytest.raises(KeyboardInterrupt), Gate().closed():
        send(signal.SIGINT)
        done.append("to the end")
    assert done == ["work", "more", "to the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(os.name == "nt", reason="Windows ends the process")
def test_a_request_to_end_stays_one_behind_the_gate() -> None:
    with termination() as received:
        with pytest.raises(Terminated), Gate().closed() as gate:
            send(signal.SIGTERM)
            gate.check()
        assert received == [signal.SIGTERM]
