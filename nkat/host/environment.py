"""The environment: what this toolkit puts into it for itself, and what other programs get.

Threads that wait for each other shall sleep instead of spin. On a quiet machine that costs about 5 %; with one other
busy process on two cores, spinning made the same work 5 to 25 times slower. OpenMP reads OMP_WAIT_POLICY when torch is
loaded, so it has to be said before. Programs that are not ours must not inherit it: llama.cpp, whose threads meet after
every product, decoded SmolLM2 at a third of its speed with it, and KoboldCpp computes with the same code.
"""

from __future__ import annotations

import os

_POLICY = "OMP_WAIT_POLICY"
_OURS = "NKAT_SET_OMP_WAIT_POLICY"  # tells processes that this one starts whose value it is


def sleep_while_waiting() -> None:
    """Sets the policy for this process and its own kind; a value the user has set stays."""
    if _POLICY not in os.environ:
        os.environ[_POLICY] = "PASSIVE"
        os.environ[_OURS] = "1"


def users_environment() -> dict[str, str]:
    """The environment as the user's shell has it: for programs that are not ours."""
    environment = dict(os.environ)
    if environment.pop(_OURS, None) is not None:
        environment.pop(_POLICY, None)
    return environment
