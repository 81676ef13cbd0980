"""Prefill and decoding on the CPU against llama.cpp: same file, same threads, taking turns in one run.

    python -m benchmarks.vs_llama_cpp --llama-bench PATH models/smollm2.gguf models/other.gguf --threads 2
    python -m benchmarks.vs_llama_cpp --llama-bench PATH --llama-completion PATH models/smollm2.nkat

llama-bench is llama.cpp's own benchmark (`-p 512 -n 128`, one repetition a turn, after its warm-up). Each turn measures
it, then this toolkit in this process: 512 tokens of prefill, then 128 steps of decoding from an empty cache, as
llama-bench does. The ratio is the median over the turns of ours / llama.cpp's, with the smallest and largest.

Where a model has a Θ and llama-completion is given, a second table has Θ's cost in prefill and decoding: here, as a
LoRA adapter in llama.cpp (`--lora`), and here as plain torch products beside each layer. llama.cpp's threads wait by
spinning: with anything else running on the machine they fall far behind, so run nothing else. The last line of stdout
is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.vs_llama_cpp")

import gc
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from nkat.engine.decoder import Decoder, make_decoder
from nkat.errors import NKATError
from nkat.gguf.writer import write_gguf
from nkat.host import commandline, console, hardware
from nkat.host.console import format_table, note
from nkat.host.environment import users_environment
from nkat.host.record import write_json
from nkat.kernels import reference
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.texts import load_text
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import ModelFile, open_model_file

PREFILL, DECODE = 512, 128
Speeds = tuple[float, float]  # tokens a second: prefill, decoding


def llama_bench(program: Path, model: Path, threads: int) -> Speeds:
    command = [program, "-m", model, "-t", threads, "-p", PREFILL, "-n", DECODE, "-r", 1, "-o", "json"]
    records = json.loads(_run(command).stdout)
    prefill = next(r["avg_ts"] for r in records if r["n_prompt"] == PREFILL and r["n_gen"] == 0)
    return prefill, next(r["avg_ts"] for r in records if r["n_gen"] == DECODE and r["n_prompt"] == 0)


def llama_completion(program: Path, model: Path, threads: int, prompt: Path, lora: Path | None) -> Speeds:
    """Speeds that llama-completion prints at its end: the prompt, then DECODE tokens behind it."""
    command = [
        program,
        "-m",
        model,
        "-t",
        threads,
        "-f",
        prompt,
        "-n",
        DECODE + 1,
        "--ignore-eos",
        "-no-cnv",
        "--temp",
        0,
    ]
    found = _run([*command, *(["--lora", lora] if lora else [])]).stderr
    speeds = [
        float(re.search(rf"print: +{kind} time = .*?([\d.]+) tokens per second", found)[1])  # type: ignore[index]
        for kind in ("prompt eval", "eval")
    ]
    return speeds[0], speeds[1]


def ours(decoder: Decoder, tokens: list[int], after_prompt: bool) -> Speeds:
    """Prefill, then decoding: from an empty cache, or behind the prompt."""
    decoder.length = 0
    started = perf_counter()
    decoder.prefill(tokens)
    prefill = len(tokens) / (perf_counter() - started)
    if not after_prompt:
        decoder.length = 0
    started = perf_counter()
    for token in tokens[:DECODE]:
        decoder.step(token)
    return prefill, DECODE / (perf_counter() - started)


def compare(program: Path, path: Path, threads: int, turns: int) -> dict[str, Any]:
    """Both programs on one model without Θ."""
    loaded = load_model(path, int8_activations=True, repack=True)
    tokens = _tokens(loaded)
    decoder = make_decoder(loaded.model, PREFILL + 1)
    decoder.set_gamma(None)
    ours(decoder, tokens, False)  # compiles
    pairs: list[tuple[Speeds, Speeds]] = []
    with console.bar(turns, path.name, "turn") as bar:
        for _ in range(turns):
            pairs.append((ours(decoder, tokens, False), llama_bench(program, path, threads)))
            bar.update()
    return {"model": path.name} | {
        name: _summary([a[i] for a, _ in pairs], [b[i] for _, b in pairs])
        for i, name in enumerate(("prefill", "decode"))
    }


def theta_cost(program: Path, model_file: ModelFile, threads: int, turns: int) -> dict[str, Any]:
    """Overhead of Θ in per cent of the time without, in three ways of computing it."""
    base_view = model_file.base
    assert model_file.theta is not None
    assert base_view is not None
    loaded = load_model(model_file, int8_activations=True, repack=True)
    thetas, gamma = model_file.theta, model_file.theta.gamma
    tokens = _tokens(loaded)
    decoder = make_decoder(loaded.model, PREFILL + DECODE + 1)
    unfused = _unfused(loaded)
    times: dict[str, list[tuple[Speeds, Speeds]]] = {"fused": [], "unfused": [], "llama.cpp --lora": []}
    with tempfile.TemporaryDirectory() as folder:
        base, lora, prompt = (Path(folder) / name for name in ("base.gguf", "lora.gguf", "prompt.txt"))
        write_gguf(base, base_view.parts(), force=True)
        write_gguf(lora, lora_parts(thetas, base_view, gamma), force=True)
        prompt.write_text(loaded.tokenizer.decode(tokens[1:]), encoding="utf-8")

        def fused(strength: float | None) -> Speeds:
            decoder.set_gamma(strength)
            return ours(decoder, tokens, True)

        def llama(strength: float | None) -> Speeds:
            return llama_completion(program, base, threads, prompt, lora if strength else None)

        runs: dict[str, Callable[[float | None], Speeds]] = {
            "fused": fused,
            "unfused": unfused,
            "llama.cpp --lora": llama,
        }
        fused(gamma)
        unfused(gamma)
        with console.bar(turns, f"{model_file.path.name}, Θ", "turn") as bar:
            for turn in range(turns):
                for name, run in runs.items():
                    first, second = (gamma, None) if turn % 2 else (None, gamma)
                    both = {strength: run(strength) for strength in (first, second)}
                    times[name].append((both[gamma], both[None]))
                bar.update()
    record: dict[str, Any] = {"model": model_file.path.name, "rank": thetas.rank, "gamma": gamma}
    for name, pairs in times.items():
        record[name] = {
            part: _percent([off[i] / on[i] for on, off in pairs]) for i, part in enumerate(("prefill", "decode"))
        }
    return record


def _unfused(loaded: LoadedModel) -> Callable[[float | None], Speeds]:
    """The layers one by one, Θ as two torch products beside each: what a LoRA in torch costs."""
    layers = list(loaded.model.star_linears().values())
    x = {layer.shape[1]: torch.randn(PREFILL, layer.shape[1]) for layer in layers}

    def seconds(count: int, strength: float | None) -> float:
        started = perf_counter()
        for layer in layers:
            inputs = x[layer.shape[1]][:count]
            y = layer.require_compiled().rows(inputs, 0, layer.shape[0], 0.0, torch.get_num_threads())
            if strength is not None and layer.down is not None:
                y += reference.star_term(inputs, layer.down, layer.up, 0.01)
        return perf_counter() - started

    def run(strength: float | None) -> Speeds:
        steps = 16
        return PREFILL / seconds(PREFILL, strength), steps / sum(seconds(1, strength) for _ in range(steps))

    return run


def _tokens(loaded: LoadedModel) -> list[int]:
    """PREFILL tokens of Python's documentation."""
    return loaded.tokenizer.encode(load_text(None).content[:20000], add_special=True)[:PREFILL]


def _run(command: list[Any]) -> subprocess.CompletedProcess[str]:
    try:
        words = [str(part) for part in command]
        return subprocess.run(words, capture_output=True, text=True, check=True, env=users_environment())
    except OSError as error:
        raise NKATError(f"{command[0]}: cannot be run: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        raise NKATError(f"{command[0]}: failed: {error.stderr.strip().splitlines()[-1]}") from None


def _summary(a: list[float], b: list[float]) -> dict[str, float]:
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return {
        "nkat_tokens_per_second": median(a),
        "llama_cpp_tokens_per_second": median(b),
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def _percent(ratios: list[float]) -> dict[str, float]:
    return {f"{name}_percent": 100 * (of(ratios) - 1) for name, of in (("median", median), ("min", min), ("max", max))}


def main() -> None:
    parser = commandline.parser(
        "CPU speed against llama.cpp.", "  python -m benchmarks.vs_llama_cpp --llama-bench PATH a.gguf"
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--llama-bench", type=Path, required=True, metavar="PATH")
    parser.add_argument("--llama-completion", type=Path, metavar="PATH", help="to compare Θ with a LoRA there")
    parser.add_argument("--threads", type=commandline.thread_count, metavar="N")
    parser.add_argument("--turns", type=commandline.positive_int, default=5, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the record to a file too")
    options = parser.parse_args()
    threads = hardware.set_threads(options.threads)
    record: dict[str, Any] = {"turns": options.turns, "threads": threads, "speed": [], "theta": []}
    for path in options.models:
        model_file = open_model_file(path)
        if model_file.theta is None:
            record["speed"].append(compare(options.llama_bench, path, threads, options.turns))
        elif options.llama_completion is None:
            note(f"{path}: has a Θ; give --llama-completion to compare its cost")
        else:
            record["theta"].append(theta_cost(options.llama_completion, model_file, threads, options.turns))
        gc.collect()
    if record["speed"]:
        _print_speed(record["speed"])
    if record["theta"]:
        _print_theta(record["theta"])
    record["machine"] = hardware.describe(torch.device("cpu"))
    if options.json:
        write_json(record, options.json)
    write_json(record, "-")


def _print_speed(records: list[dict[str, Any]]) -> None:
    rows = []
    for r in records:
        cells = [r["model"]]
        for part in ("prefill", "decode"):
            s = r[part]
            cells += [f"{s['nkat_tokens_per_second']:.1f}", f"{s['llama_cpp_tokens_per_second']:.1f}"]
            cells.append(f"{s['ratio']:.2f} ({s['ratio_min']:.2f}-{s['ratio_max']:.2f})")
        rows.append(cells)
    header = ["tok/s", f"prefill {PREFILL}", "llama.cpp", "ratio", f"decode {DECODE}", "llama.cpp", "ratio"]
    print(format_table(rows, header) + "\n")


def _print_theta(records: list[dict[str, Any]]) -> None:
    rows = []
    for r in records:
        for way in ("fused", "unfused", "llama.cpp --lora"):
            cells = [
                f"{r['median_percent']:+.1f} ({r['min_percent']:+.1f} to {r['max_percent']:+.1f})"
                for r in r[way].values()
            ]
            rows.append([f"{r['model']}, rank {r['rank']}, {way}", *cells])
    print(format_table(rows, ["Θ's overhead, %", "prefill", "decode"]) + "\n")
