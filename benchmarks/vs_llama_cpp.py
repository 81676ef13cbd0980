"""Prefill and decoding on the CPU against llama.cpp: same file, taking turns in one run.

    python -m benchmarks.vs_llama_cpp --llama-bench PATH models/smollm2.gguf Q4_K_M Q6_K --threads 1 2
    python -m benchmarks.vs_llama_cpp --llama-bench PATH --llama-completion PATH models/smollm2.nkat
    python -m benchmarks.vs_llama_cpp --llama-bench ik_llama.cpp/…/llama-bench --flags '-rtr 0' '-rtr 1 -mmp 0' Q4_K_M

A model is a file, or the name of a mix of formats: then a 7B-shaped file is written for it (`benchmarks.shapes`). For
each number of threads llama-bench, llama.cpp's own benchmark, is tried with up to so many and with and without flash
attention (and with each of --flags, which a program of the family may have), and keeps what suits it best, for prefill
and decoding apart. Each turn measures it so, one repetition after
its warm-up, in the environment of the user's shell, and then this toolkit in this process: 512 random tokens of
prefill, then 128 steps of decoding from an empty cache, as llama-bench does. The ratio is the median over the turns of
ours / llama.cpp's, with the smallest and largest. `share` is the file's bytes that a token reads, times its tokens a
second, over the most that this memory gives (`benchmarks.memory`); above 1 the benchmark fails. What the kernels keep
wider than the file has it (IQ1, IQ2, IQ3) counts as in the file. A file that the last cache could hold is marked, and
has none.

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
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.memory import Ceiling, last_cache_bytes, measure_ceiling, share_of
from benchmarks.shapes import BLOCKS, MIXES, models
from nkat.engine.decoder import Decoder, make_decoder
from nkat.errors import NKATError
from nkat.gguf.writer import write_gguf
from nkat.host import commandline, console, hardware
from nkat.host.console import note, say
from nkat.host.environment import users_environment
from nkat.host.record import print_record, write_json
from nkat.host.tables import Column, Table, show
from nkat.kernels import reference
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.texts import load_text
from nkat.measure.tpe import bytes_per_token
from nkat.theta.algebra import low_rank_form
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import ModelFile, open_model_file

PREFILL, DECODE = 512, 128
Speeds = tuple[float, float]  # tokens a second: prefill, decoding


@dataclass(frozen=True, slots=True)
class Setting:
    """Of llama-bench: what it is given."""

    threads: int
    flash_attention: bool
    flags: str = ""

    @property
    def words(self) -> list[Any]:
        return ["-t", self.threads, "-fa", int(self.flash_attention), *shlex.split(self.flags)]


def settings_to_try(threads: int) -> list[Setting]:
    """With at most so many threads."""
    counts = sorted({threads, *(2**i for i in range(threads.bit_length()) if 2**i <= threads)})
    return [Setting(count, flash) for count in counts for flash in (False, True)]


def best_settings(program: Path, model: Path, threads: int, flags: Sequence[str] = ("",)) -> tuple[Setting, Setting]:
    """What suits llama-bench best, in prefill and in decoding, with at most so many threads and one of `flags`."""
    tried = _try_settings(program, model, threads, PREFILL // 2, flags)
    return _best(tried, decoding=False), _best(tried, decoding=True)


def best_for_decoding(program: Path, model: Path, threads: int) -> Setting:
    """The same, without the prefill."""
    return _best(_try_settings(program, model, threads, 0, ("",)), decoding=True)


def _try_settings(
    program: Path, model: Path, threads: int, prefill: int, flags: Sequence[str]
) -> list[tuple[Setting, dict[str, Any]]]:
    counts = sorted({setting.threads for setting in settings_to_try(threads)})
    words = ["-t", ",".join(map(str, counts)), "-fa", "0,1", "-p", prefill, "-n", DECODE // 4]
    return [
        (Setting(record["n_threads"], bool(record["flash_attn"]), more), record)
        for more in flags
        for record in _bench(program, model, [*words, *shlex.split(more)])
    ]


def _best(tried: list[tuple[Setting, dict[str, Any]]], decoding: bool) -> Setting:
    of_kind = [(record["avg_ts"], setting) for setting, record in tried if bool(record["n_gen"]) == decoding]
    return max(of_kind, key=lambda pair: pair[0])[1]


def llama_bench(program: Path, model: Path, settings: tuple[Setting, Setting]) -> Speeds:
    prefill, decode = settings
    speed = _bench(program, model, [*prefill.words, "-p", PREFILL, "-n", 0])[0]["avg_ts"]
    return speed, decoding_speed(program, model, decode)


def decoding_speed(program: Path, model: Path, setting: Setting, steps: int = DECODE) -> float:
    """llama-bench's tokens a second in decoding."""
    return float(_bench(program, model, [*setting.words, "-p", 0, "-n", steps])[0]["avg_ts"])


def _bench(program: Path, model: Path, words: list[Any]) -> list[dict[str, Any]]:
    return json.loads(_run([program, "-m", model, *words, "-r", 1, "-o", "json"]).stdout)


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


def compare(
    program: Path, path: Path, threads: int, turns: int, ceiling: Ceiling, flags: Sequence[str] = ("",)
) -> dict[str, Any]:
    """Both programs on one model without Θ."""
    hardware.set_threads(threads)
    loaded = load_model(path, int8_activations=True, repack=True)
    tokens = _random_tokens(loaded)
    decoder = make_decoder(loaded.model, PREFILL + 1)
    decoder.set_gamma(None)
    ours(decoder, tokens, False)  # compiles
    settings = best_settings(program, path, threads, flags)
    pairs: list[tuple[Speeds, Speeds]] = []
    with console.bar(turns, f"{path.name}, {threads} threads", "turn") as bar:
        for _ in range(turns):
            pairs.append((ours(decoder, tokens, False), llama_bench(program, path, settings)))
            bar.update()
    record: dict[str, Any] = {"model": path.name, "bytes": path.stat().st_size, "threads": threads}
    record |= {
        name: summary([a[i] for a, _ in pairs], [b[i] for _, b in pairs]) | {"llama_cpp_setting": asdict(settings[i])}
        for i, name in enumerate(("prefill", "decode"))
    }
    needed = bytes_per_token(loaded.tensors, loaded.config.active_experts)
    held = bytes_per_token(loaded.tensors)  # the next token may go to other experts, which the cache must hold as well
    record["bytes_a_token"], record["fits_the_last_cache"] = needed, held <= last_cache_bytes()
    if not record["fits_the_last_cache"]:
        for name in ("nkat", "llama_cpp"):
            speed = needed * record["decode"][f"{name}_tokens_per_second"] / 1e9
            record["decode"][f"{name}_share"] = share_of(speed, ceiling)
    return record


def theta_cost(program: Path, model_file: ModelFile, threads: int, turns: int) -> dict[str, Any]:
    """Overhead of Θ in per cent of the time without, in three ways of computing it."""
    base_view = model_file.base
    assert model_file.theta is not None
    assert base_view is not None
    loaded = load_model(model_file, int8_activations=True, repack=True)
    thetas, gamma = model_file.theta, model_file.theta.gamma
    tokens = _text_tokens(loaded)
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
    factors = [None if one.theta is None else low_rank_form(*one.theta.factors(), *one.shape) for one in layers]

    def seconds(count: int, strength: float | None) -> float:
        started = perf_counter()
        for layer, theta in zip(layers, factors, strict=True):
            inputs = x[layer.shape[1]][:count]
            y = layer.require_compiled().rows(inputs, 0, layer.shape[0], 0.0, torch.get_num_threads())
            if strength is not None and theta is not None:
                y += reference.star_term(inputs, *theta, 0.01)
        return perf_counter() - started

    def run(strength: float | None) -> Speeds:
        steps = 16
        return PREFILL / seconds(PREFILL, strength), steps / sum(seconds(1, strength) for _ in range(steps))

    return run


def _random_tokens(loaded: LoadedModel) -> list[int]:
    """PREFILL tokens of the whole vocabulary, as llama-bench draws them: those of a text come again and again, and so
    would the experts that they go to."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(loaded.config.vocab_size, (PREFILL,), generator=generator).tolist()


def _text_tokens(loaded: LoadedModel) -> list[int]:
    """PREFILL tokens of Python's documentation."""
    return loaded.tokenizer.encode(load_text(None).content[:20000], add_special=True)[:PREFILL]


def _run(command: list[Any]) -> subprocess.CompletedProcess[str]:
    try:
        words = [str(part) for part in command]
        return subprocess.run(words, capture_output=True, text=True, check=True, env=users_environment())
    except OSError as error:
        raise NKATError(f"{command[0]}: cannot be run: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
        raise NKATError(f"{command[0]}: failed: {said[-1]}") from None


def summary(a: list[float], b: list[float]) -> dict[str, float]:
    """Our speeds and llama.cpp's, and their ratio turn by turn."""
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
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"a file, or one of {', '.join(MIXES)}")
    parser.add_argument(
        "--blocks",
        type=commandline.positive_int,
        default=BLOCKS,
        metavar="N",
        help="of a 7B-shaped file (default: all)",
    )
    parser.add_argument("--llama-bench", type=Path, required=True, metavar="PATH")
    parser.add_argument("--llama-completion", type=Path, metavar="PATH", help="to compare Θ with a LoRA there")
    parser.add_argument(
        "--flags", nargs="+", metavar="WORDS", default=[""], help="to try llama-bench with, each by itself"
    )
    parser.add_argument("--threads", type=commandline.thread_count, nargs="+", metavar="N", default=[])
    parser.add_argument("--turns", type=commandline.positive_int, default=5, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the record to a file too")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    counts = options.threads or [hardware.set_threads(None)]
    record: dict[str, Any] = {"turns": options.turns, "threads": counts, "speed": [], "theta": []}
    ceilings: dict[int, Ceiling] = {}
    for path in models(options.models, options.blocks):
        model_file = open_model_file(path)
        if model_file.theta is None:
            for threads in counts:
                if threads not in ceilings:
                    ceilings[threads] = measure_ceiling(hardware.set_threads(threads))
                record["speed"].append(
                    compare(options.llama_bench, path, threads, options.turns, ceilings[threads], options.flags)
                )
                gc.collect()
        elif options.llama_completion is None:
            note(f"{path}: has a Θ; give --llama-completion to compare its cost")
        else:
            threads = hardware.set_threads(counts[-1])
            record["theta"].append(theta_cost(options.llama_completion, model_file, threads, options.turns))
        del model_file  # lets the file go
    record["ceilings"] = {str(threads): asdict(ceiling) for threads, ceiling in ceilings.items()}
    if record["speed"]:
        _print_speed(record["speed"])
    if record["theta"]:
        _print_theta(record["theta"])
    record["machine"] = hardware.describe(torch.device("cpu"))
    if options.json:
        write_json(record, options.json)
    print_record(record)


def _print_speed(records: list[dict[str, Any]]) -> None:
    rows = []
    for r in records:
        parts = {f"{part}_{key}": value for part in ("prefill", "decode") for key, value in r[part].items()}
        rows.append({**{key: r[key] for key in ("model", "threads", "fits_the_last_cache")}, **parts})

    def speeds(part: str, title: str) -> list[Column]:
        ratio = tuple(f"{part}_{key}" for key in ("ratio", "ratio_min", "ratio_max"))
        return [
            Column(title, f"{part}_nkat_tokens_per_second", ".1f"),
            Column("llama.cpp", f"{part}_llama_cpp_tokens_per_second", ".1f"),
            Column("ratio", ratio, "{:.2f} ({:.2f}-{:.2f})".format),
        ]

    columns = [
        Column("tok/s", ("model", "fits_the_last_cache"), lambda name, fits: name + (" (in cache)" if fits else "")),
        Column("threads", "threads"),
        *speeds("prefill", f"prefill {PREFILL}"),
        *speeds("decode", f"decode {DECODE}"),
        Column("share", "decode_nkat_share", ".2f"),
        Column("llama.cpp", "decode_llama_cpp_share", ".2f"),
    ]
    show(Table("speed", columns, rows))
    say()


def _print_theta(records: list[dict[str, Any]]) -> None:
    parts, keys = ("prefill", "decode"), ("median_percent", "min_percent", "max_percent")
    rows = [
        {
            **{key: r[key] for key in ("model", "rank")},
            "way": way,
            **{
                f"{part}_{key}": value
                for part, cost in zip(parts, r[way].values(), strict=True)
                for key, value in cost.items()
            },
        }
        for r in records
        for way in ("fused", "unfused", "llama.cpp --lora")
    ]
    columns = [
        Column("Θ's overhead, %", ("model", "rank", "way"), "{}, rank {}, {}".format),
        *(
            Column(part, tuple(f"{part}_{key}" for key in keys), "{:+.1f} ({:+.1f} to {:+.1f})".format)
            for part in parts
        ),
    ]
    show(Table("theta", columns, rows))
    say()
