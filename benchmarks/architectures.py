"""Every architecture beside llama.cpp: perplexity without and with Θ, and a fit, on tiny models with random weights.

    python -m benchmarks.architectures --llama-perplexity PATH
    python -m benchmarks.architectures --llama-perplexity PATH --llama-server PATH --only gemma4 phi3 --chunks 8
    python -m benchmarks.architectures --speed --llama-bench PATH

Shapes are small, what is computed is not: attention, norms, RoPE, windows and caps are the architecture's
(`tests/support/tiny_models.py`). llama.cpp gets Θ as an adapter, whose factors are half-precision numbers, and computes
with float32 keys and values; its GELU comes from a table of half-precision numbers. A fit of a few steps has to lower
the perplexity of the text that it learns. With llama-server the tokens are compared that both choose after 24 others.
--speed measures decoding instead, on files of some 150 MB (`benchmarks.architecture_speed`): run nothing else then. The
last line of stdout is JSON; the status is 0 when all agree, else 1.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.architectures")

import argparse
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import architecture_speed
from benchmarks.greedy import compare_greedy
from nkat.api import fit_theta, make_theta, open_model, perplexity, save
from nkat.errors import NKATError
from nkat.host import commandline, hardware
from nkat.host.console import note, say
from nkat.host.record import print_record, write_json
from nkat.host.tables import Column, Table, show
from nkat.lm.load import load_model
from nkat.measure.texts import default_text
from tests.support.tiny_models import ARCHITECTURES, FURTHER_FAMILIES, MIXTURE_FAMILIES, write_tiny_model

GAMMA = 0.5
_RESULT = re.compile(r"\[\d+\]([\d.]+|-?nan|inf),")
_TRIES = 8
# Relative. Its GELU from a table of half-precision numbers alone moves a tiny gemma4 by 2e-4, and by 1e-3 where that
# sends a token to another expert.
TOLERANCE = 2e-3
EFFECT = 3e-3  # of Θ, at least
NEAR = 0.02  # logits: where the choices part, they may be so close, which that GELU moves
TOKENS = 64


def llama_perplexity(program: Path, model: Path, text: Path, chunks: int, adapter: Path | None = None) -> list[float]:
    """What llama-perplexity finds over a text's first chunk of 512 tokens, its first two, and so on.

    b11434 now and then ends, with status 0, before its last lines are written: then it is run again.
    """
    command = [program, "-m", model, "-f", text, "--chunks", chunks, "-c", 512, "-t", 1, "-fa", "off"]
    command += ["-ctk", "f32", "-ctv", "f32", *(() if adapter is None else ("--lora", adapter))]
    longest: list[str] = []
    for _ in range(_TRIES):
        try:
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        except OSError as error:
            raise NKATError(f"{program}: cannot be run: {error.strerror}") from None
        longest = max(longest, _RESULT.findall(done.stdout + done.stderr), key=len)
        if len(longest) == chunks or done.returncode:
            break
    if longest:
        return [float(value) for value in longest]
    last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
    raise NKATError(f"{program}: gave no perplexity for {model.name}: {last}")


def compare(
    program: Path, server: Path | None, arch: str, options: dict[str, Any], chunks: int, steps: int, folder: Path
) -> dict[str, Any]:
    """Both programs on one tiny model, and a fit here."""
    content = default_text().content[: 4000 * chunks]
    text, adapter = folder / "text.txt", folder / "adapter.gguf"
    text.write_bytes(content.encode())
    model = open_model(write_tiny_model(folder / f"{arch}.gguf", arch, **options))
    theta = make_theta(model, rank=4, gamma=GAMMA)
    save(theta, adapter, model, layout="lora", force=True)
    fitted = fit_theta(model, content, rank=2, gamma=0.97, steps=steps, guard=None)
    record: dict[str, Any] = {"architecture": arch, "options": sorted(options), "layers": len(theta.layers)}
    for name, on, file in (("plain", None, None), ("theta", theta, adapter)):
        theirs = llama_perplexity(program, model.path, text, chunks, file)
        nll = perplexity(model, content, on, chunks=chunks).perplexity.nll[: len(theirs)]
        record |= {name: float(nll.mean().exp()), f"{name}_llama_cpp": theirs[-1], f"{name}_chunks": len(theirs)}
    # what was learned is refused as a text to judge by: the same one from its second character on
    change = perplexity(model, content[1:], fitted, chunks=chunks).change
    record["fit_percent"] = 100.0 * math.expm1(change.log_ratio)
    if server is not None:
        ids = [(29 * i + 5) % 200 for i in range(24)]
        greedy = compare_greedy(server, load_model(model.path, repack=True), ids, TOKENS)
        record["greedy"] = {**asdict(greedy), "text": greedy.text}
    return record


def agrees(row: dict[str, Any]) -> bool:
    """Whether both programs found the same, Θ was no small matter, and the fit lowered the perplexity."""
    same = all(abs(row[key] / row[f"{key}_llama_cpp"] - 1) < TOLERANCE for key in ("plain", "theta"))
    margin = row.get("greedy", {}).get("margin")
    same = same and (margin is None or margin < NEAR)
    return same and abs(row["theta"] / row["plain"] - 1) > EFFECT and row["fit_percent"] < 0.0


def main() -> None:
    parser = commandline.parser("Every architecture beside llama.cpp, on tiny models with random weights.", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--llama-perplexity", type=Path, metavar="PATH")
    what.add_argument("--speed", action="store_true", help="of decoding, beside --llama-bench")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="to compare the tokens that it chooses, too")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH")
    parser.add_argument("--threads", type=commandline.thread_count, metavar="N", help="of --speed (default: all)")
    parser.add_argument("--turns", type=commandline.positive_int, default=3, metavar="N", help="of --speed")
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, metavar="NAME", help="of these architectures")
    parser.add_argument("--chunks", type=commandline.positive_int, default=4, metavar="N", help="of 512 tokens")
    parser.add_argument("--steps", type=commandline.positive_int, default=24, metavar="N", help="of the fit")
    parser.add_argument("--json", metavar="FILE", help="write the record to a file too")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    if options.speed:
        _measure_speed(parser, options)
        return
    known = [(arch, {}) for arch in ARCHITECTURES if arch not in dict(FURTHER_FAMILIES)]
    mixtures = [(arch, changes) for arch, changes in MIXTURE_FAMILIES if changes]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arch, changes in [*known, *FURTHER_FAMILIES, *mixtures]:
            if options.only is None or arch in options.only:
                note(f"{arch} {' '.join(sorted(changes))}")
                rows.append(
                    compare(
                        *(options.llama_perplexity, options.llama_server, arch, changes),
                        *(options.chunks, options.steps, Path(folder)),
                    )
                )
    columns = [
        Column("", "architecture"),
        Column("layers with Θ", "layers"),
        Column("llama.cpp", "plain_llama_cpp", ".3f"),
        Column("here", "plain", ".3f"),
        Column("its adapter", "theta_llama_cpp", ".3f"),
        Column("Θ here", "theta", ".3f"),
        Column("a fit", "fit_percent", "{:+.2f} %".format),
        Column("same tokens", "greedy", lambda greedy: greedy["text"]),
        Column("agree", "agree", lambda same: "yes" if same else "NO"),
    ]
    _finish(Table("architectures", columns, [{**row, "agree": agrees(row)} for row in rows]), rows, options.json)
    sys.exit(0 if all(map(agrees, rows)) else 1)


def _measure_speed(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.llama_bench is None:
        parser.error("--speed needs --llama-bench")
    names = options.only or list(ARCHITECTURES)
    rows = architecture_speed.measure(options.llama_bench, names, options.threads, options.turns)
    _finish(architecture_speed.table(rows), rows, options.json)


def _finish(table: Table, rows: list[dict[str, Any]], path: str | None) -> None:
    show(table)
    say()
    record = {"rows": rows, "machine": hardware.describe(torch.device("cpu"))}
    if path:
        write_json(record, path)
    print_record(record)


if __name__ == "__main__":
    main()
