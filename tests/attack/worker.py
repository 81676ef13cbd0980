"""Tries cases one after the other, in a process that may crash: `python -m tests.attack.worker FIRST STOP STEP PLANT`.

Says on stdout which case it begins ("case 7"), then what became of it ("read", "refused", "uncaught WHY").
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import psutil
import torch

from nkat.engine.decoder import make_decoder
from nkat.errors import NKATError
from nkat.gguf import file as gguf_file
from nkat.lm.load import load_model
from nkat.theta.modelfile import open_model_file
from tests.attack.mutate import make_seeds, mutated

_MORE_MEMORY = 2 << 30  # than the process has at its start; a file of 200 kB must not need it
_TOKENS = (1, 5, 9)


def try_file(path: Path, compiled: bool) -> None:
    """Everything that the commands do with a file before they compute for long."""
    model = open_model_file(path)
    file = model.base.file if model.base else None
    if file is not None:
        for key in file.metadata:
            file.metadata[key]
    if model.base is None:
        model.require_theta()
        return
    loaded = load_model(model, repack=compiled, int8_activations=compiled)
    ids = loaded.tokenizer.encode("The an 1 é", add_special=True, parse_special=True)
    loaded.tokenizer.decode(ids)
    decoder = make_decoder(loaded.model, 8)
    decoder.prefill(_TOKENS[: 3 if loaded.config.vocab_size > max(_TOKENS) else 0] or [0])


def outcome(path: Path, compiled: bool) -> str:
    """What became of a file, in one line."""
    try:
        try_file(path, compiled)
    except NKATError as error:
        lines = str(error).splitlines()
        return "refused" if len(lines) == 1 else f"uncaught a message of {len(lines)} lines"
    except Exception as error:  # the fault that is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return " ".join(f"uncaught {type(error).__name__} at {where}: {error}".split())[:200]
    return "read"


def plant(fault: str, case: int) -> None:
    """A fault on purpose, now and then, for the control."""
    if case % 20 != 7:
        return
    if fault == "crash":
        os.abort()
    elif fault == "hang":
        time.sleep(3600)


def _plant_reader() -> None:
    real = gguf_file._parse_tensor_info

    def careless(cursor: gguf_file._Cursor) -> object:
        if cursor.pos % 3 == 0:
            raise IndexError("planted")
        return real(cursor)

    gguf_file._parse_tensor_info = careless


def main() -> None:
    first, stop, step, fault = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="nkat-attack-") as name:
        folder = Path(name)
        seeds = make_seeds(folder)
        _limit_memory()
        if fault == "uncaught":
            _plant_reader()
        path = folder / "case.gguf"
        for case in range(first, stop, step):
            print(f"case {case}", flush=True)
            plant(fault, case)
            _, raw = mutated(seeds, case)
            path.unlink(missing_ok=True)  # a new file: views of the last one may still be mapped
            path.write_bytes(raw)
            print(outcome(path, compiled=case % 2 == 0), flush=True)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        most = psutil.Process().memory_info().vms + _MORE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
