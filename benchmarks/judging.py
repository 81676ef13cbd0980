"""Perplexity on the CPU against llama.cpp's: same file, same text, taking turns in one run.

    python -m benchmarks.judging --llama-perplexity PATH models/smollm2.gguf Q4_K_M --threads 2

A model is a file, or the name of a mix of formats: then a 7B-shaped file is written for it (`benchmarks.shapes`). For
each number of threads llama-perplexity is tried with up to so many and with and without flash attention, and keeps what
suits it best. Each turn it measures the text's first chunks of 512 tokens, in the environment of the user's shell, and
then this toolkit does in this process: with inputs rounded to INT8, as llama.cpp rounds them, and exact. Loading and
tokenising are in neither; the ratio is the median over the turns of our speed / llama.cpp's, with the smallest and
largest. The perplexities show that both computed the same. llama.cpp's threads wait by spinning: with anything else
running on the machine they fall far behind, so run nothing else. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.judging")

import re
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.shapes import BLOCKS, MIXES, models
from benchmarks.vs_llama_cpp import Setting, settings_to_try, summary
from nkat.errors import NKATError
from nkat.host import commandline, console, hardware
from nkat.host.console import say
from nkat.host.environment import users_environment
from nkat.host.record import print_record, write_json
from nkat.host.tables import Column, Table, show
from nkat.lm.load import load_model
from nkat.measure.judge import Judge
from nkat.measure.perplexity import CONTEXT
from nkat.measure.texts import Text, load_text

WAYS = {"rounded": True, "exact": False}
_BEGIN, _END = "calculating perplexity over", re.compile(r"Final estimate: PPL = ([\d.]+|-?nan|inf)")


def llama_perplexity(program: Path, model: Path, text: Path, chunks: int, setting: Setting) -> tuple[float, float]:
    """Seconds from its first chunk to its result, and the perplexity that it finds."""
    flash = "on" if setting.flash_attention else "off"
    command = [program, "-m", model, "-f", text, "--chunks", chunks, "-c", CONTEXT, "-t", setting.threads, "-fa", flash]
    said, began = "", 0.0
    try:
        with subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=users_environment(),
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said = line.strip() or said
                if _BEGIN in line:
                    began = perf_counter()
                elif (found := _END.search(line)) and began:
                    return perf_counter() - began, float(found[1])
    except OSError as error:
        raise NKATError(f"{program}: cannot be run: {error.strerror}") from None
    raise NKATError(f"{program}: gave no perplexity: {said or 'it said nothing'}")


def compare(program: Path, path: Path, text: Text, chunks: int, threads: int, turns: int) -> dict[str, Any]:
    """Both programs on one model without Θ."""
    hardware.set_threads(threads)
    judges = {
        way: Judge.open(load_model(path, int8_activations=rounded), text, chunks) for way, rounded in WAYS.items()
    }
    for judge in judges.values():
        Judge(judge.loaded, judge.passages.pick(slice(1))).without(None)  # compiles
    count = len(judges["exact"].passages.chunks)
    tokens = count * CONTEXT
    ours: dict[str, list[float]] = {way: [] for way in WAYS}
    theirs, perplexities = [], {}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "text.txt"
        written.write_bytes(text.content.encode())
        few = max(2, min(count, 4))
        tried = {s: llama_perplexity(program, path, written, few, s)[0] for s in settings_to_try(threads)}
        setting = min(tried, key=tried.__getitem__)
        with console.bar(turns, f"{path.name}, {threads} threads", "turn") as bar:
            for _ in range(turns):
                seconds, perplexities["llama.cpp"] = llama_perplexity(program, path, written, count, setting)
                theirs.append(tokens / seconds)
                for way, judge in judges.items():
                    started = perf_counter()
                    perplexities[way] = Judge(judge.loaded, judge.passages).without(None).ppl
                    ours[way].append(tokens / (perf_counter() - started))
                bar.update()
    record = {"model": path.name, "bytes": path.stat().st_size, "threads": threads, "chunks": count}
    record |= {way: summary(speeds, theirs) | {"perplexity": perplexities[way]} for way, speeds in ours.items()}
    return record | {"llama_cpp_perplexity": perplexities["llama.cpp"], "llama_cpp_setting": asdict(setting)}


def main() -> None:
    example = "  python -m benchmarks.judging --llama-perplexity PATH a.gguf"
    parser = commandline.parser("Perplexity on the CPU against llama.cpp's.", example)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"a file, or one of {', '.join(MIXES)}")
    parser.add_argument(
        "--blocks", type=commandline.positive_int, default=BLOCKS, metavar="N", help="of a 7B-shaped file"
    )
    parser.add_argument("--llama-perplexity", type=Path, required=True, metavar="PATH")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: Python's documentation")
    parser.add_argument(
        "--chunks", type=commandline.positive_int, default=8, metavar="N", help="at least 2 (default 8)"
    )
    parser.add_argument("--threads", type=commandline.thread_count, nargs="+", metavar="N", default=[])
    parser.add_argument("--turns", type=commandline.positive_int, default=5, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the record to a file too")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    if options.chunks < 2:
        raise NKATError("llama-perplexity needs at least two chunks")
    text = load_text(options.text)
    rows = [
        compare(options.llama_perplexity, path, text, options.chunks, threads, options.turns)
        for path in models(options.models, options.blocks)
        for threads in options.threads or [hardware.set_threads(None)]
    ]
    lines = [
        {
            **{key: row[key] for key in ("model", "threads", "llama_cpp_perplexity")},
            **row[way],
            "way": way,
        }
        for row in rows
        for way in WAYS
    ]
    columns = [
        Column("", ("model", "way"), "{}, {}".format),
        Column("threads", "threads"),
        Column("tok/s", "nkat_tokens_per_second", ".0f"),
        Column("llama.cpp", "llama_cpp_tokens_per_second", ".0f"),
        Column("ratio", ("ratio", "ratio_min", "ratio_max"), "{:.2f} ({:.2f}-{:.2f})".format),
        Column("perplexity", "perplexity", ".4f"),
        Column("llama.cpp", "llama_cpp_perplexity", ".4f"),
    ]
    show(Table("judging", columns, lines))
    say()
    record = {"turns": options.turns, "text_sha256": text.sha256, "judging": rows}
    record["machine"] = hardware.describe(torch.device("cpu"))
    if options.json:
        write_json(record, options.json)
    print_record(record)
