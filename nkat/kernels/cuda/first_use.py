"""The first use of a kernel on a machine: whether it does here what the reference does, found out once and kept.

A check computes something of random numbers by a kernel and by torch. What it found is kept in the user's cache for as
long as device, driver, torch, Triton and the kernels' source stay the same. Where it found a difference, or could not
be done, a line says so and the reference is used in the kernel's place.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nkat.errors import NKATError
from nkat.host import hardware
from nkat.host.cache import Memo
from nkat.host.console import note

_MEMO = "cuda_checks.json"
_DECIDES = ("device_name", "capability", "driver", "cuda", "torch", "triton")

Check = Callable[[], str | None]  # in what kernel and reference differ; None: in nothing
verdicts: dict[tuple[str, torch.device], str] = {}  # of this process: what is wrong, "" if nothing


def works(name: str, what: str, device: torch.device, check: Check) -> bool:
    """Whether the kernels may be used: what is kept of an earlier check, or what `check` finds now.

    name: of the check in the cache; what: the kernels in a note, such as "the kernels for Q4_K"
    Raises NKATError only where the device takes no more work after a kernel: then the next run does without it.
    """
    key = name, device
    if key not in verdicts:
        try:
            verdicts[key] = found = _verdict(name, what, device, check)
        except (OSError, LookupError, ValueError, RuntimeError) as error:  # of asking the machine or the cache
            verdicts[key] = found = _reason(error)
        if found:
            note(f"{what} are not used on this GPU: {found}; the reference takes their place, which is slower")
    return not verdicts[key]


def difference(name: str, found: Tensor, expected: Tensor, tolerance: Tensor | float) -> str | None:
    """What a check says of a result that is further from `expected` than `tolerance` anywhere, or is not finite."""
    error = (found.double() - expected.double()).abs()
    if bool((error <= tolerance).all()):  # NaN is not
        return None
    return f"{name} differs from the reference by up to {float(error.max()):.2g}"


def _verdict(name: str, what: str, device: torch.device, check: Check) -> str:
    """What is wrong, "" if nothing. Kept, except where the check itself came to no end: that may be different later."""
    made_for = _made_for(device)
    found = Memo.open(_MEMO).get(lambda content: _kept(content, made_for)[name])
    if found is not None:
        return found
    try:
        with torch.no_grad():
            found = check() or ""
            _wait(device)
        _give_back(device)
    except Exception as error:  # of a compiler, of a driver: whatever it is, there is a way without these kernels
        if not _alive(device):
            _keep(name, f"their first check ended with {_reason(error)}", made_for)
            raise NKATError(
                f"{what}: the GPU stopped at their first check ({_reason(error)}); run the command again: it will use "
                "the reference in their place"
            ) from error
        return _reason(error)
    _keep(name, found, made_for)
    return found


def _reason(error: Exception) -> str:
    """In a part of a line."""
    first_line = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what went wrong in a kernel is told here


def _give_back(device: torch.device) -> None:
    """The memory that a check took: torch would keep it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _alive(device: torch.device) -> bool:
    """Whether the device still works: after a fault in a kernel it does not, for this process."""
    try:
        _wait(device)
    except RuntimeError:
        return False
    return True


def _keep(name: str, found: str, made_for: dict[str, str]) -> None:
    memo = Memo.open(_MEMO)
    before = memo.get(lambda content: _kept(content, made_for)) or {}
    memo.set({made_for["device_name"]: {"made_for": made_for, "found": {**before, name: found}}})


def _kept(content: dict[str, Any], made_for: dict[str, str]) -> dict[str, str]:
    """What checks found on such a device with these versions. Raises LookupError or TypeError for anything else."""
    entry = content[made_for["device_name"]]
    if entry["made_for"] != made_for:
        raise LookupError("found with other versions")
    found = entry["found"]
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise TypeError("not what is kept")
    return found


@functools.cache
def _made_for(device: torch.device) -> dict[str, str]:
    """All that can change what a kernel does."""
    machine = hardware.describe_cuda(device)
    return {key: str(machine[key]) for key in _DECIDES} | {"source": _source_hash()}


def _source_hash() -> str:
    """Of everything in this folder: the kernels, what launches them, and what is asked of them."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
