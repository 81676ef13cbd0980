"""What a quantisation lost, and who wins it back at which price: scales, Θ, both, QERA, and the next larger file.

    python -m benchmarks.repair --llama-bin FOLDER --data FOLDER --output-dir repair --list
    python -m benchmarks.repair --llama-bin FOLDER --data FOLDER --output-dir repair --only 'IQ4_XS-*'
    python -m benchmarks.repair --llama-bin FOLDER --data FOLDER --output-dir repair       what is missing, the table

The bases are SmolLM2's Q4_1 file as llama-quantize makes it smaller, with an importance matrix of llama-imatrix (64
chunks of the calibration text); `plain-` ones are without. The Q4_1 file is the reference of every arm. Arms, each in
40 chunks of wiki.test.raw and 16 of Shakespeare: the base as it is; `scales`, the converter's --repair, 0 bytes more;
`theta`, a fit of rank 4 on the base; `both`, the same on the repaired file; `qera`, the unrestricted optimum at the
bytes of `theta`, on the base; `qera-scales` on the repaired file. KL is that of the next token from the Q4_1 file's, on
16 chunks of wiki.test.raw, ± over chunks. On a GPU where there is one, unless --no-cuda.

FOLDER of --data as in `benchmarks.quality`; of --llama-bin: llama-imatrix and llama-quantize. Cases that are there are
not run again, and an interrupted fit or repair goes on. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.repair")

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.low_rank import apply_terms, qera_terms
from benchmarks.quality import CALIBRATION, ROOT, Bench
from nkat.errors import NKATError
from nkat.host import commandline, hardware
from nkat.host.console import format_bytes, note, say
from nkat.host.environment import users_environment
from nkat.host.files import atomic_output
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat.lm.transformer import Transformer
from nkat.measure.perplexity import CONTEXT, Perplexity, scored_tokens, text_chunks
from nkat.measure.texts import load_text
from nkat.sources.fit.loss import Head, Teacher, vocabulary_loss

ORIGINAL = "smollm2"
TYPES = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ3_S", "IQ4_XS", "Q4_K_M")
BASES = ("plain-Q3_K_S", "plain-IQ4_XS", *TYPES)
ARMS = ("base", "scales", "theta", "both", "qera", "qera-scales")
TEXTS = ("wiki.test.raw", "tinyshakespeare.txt")
KL_CHUNKS = 16
RANK = 4
REPAIRED = "-repaired"


@dataclass
class RepairBench(Bench):
    """llama: the folder of llama.cpp's programs."""

    llama: Path = Path()
    repair_steps: int = 60

    def path(self, model: str) -> Path:
        """The original, a base that llama-quantize makes of it, or a base with learned scales."""
        if model == ORIGINAL:
            return super().path(model)
        path = self.out / f"{model}.gguf"
        if model.endswith(REPAIRED):
            return self.repaired(model.removesuffix(REPAIRED), path)
        if not path.exists():
            weighted = [] if model.startswith("plain-") else ["--imatrix", self.importances]
            kind = model.removeprefix("plain-")
            self.run("llama-quantize", *weighted, "--allow-requantize", self.path(ORIGINAL), path, kind, made=path)
        return path

    @cached_property
    def importances(self) -> Path:
        """What llama-imatrix finds on the calibration text."""
        path = self.out / "imatrix.gguf"
        text = self.text(CALIBRATION)
        if not path.exists():
            model = self.path(ORIGINAL)
            self.run("llama-imatrix", "-m", model, "-f", text, "-o", path, "--chunks", 64, "-c", CONTEXT, made=path)
        return path

    def repaired(self, base: str, path: Path) -> Path:
        """The base with scales learned from the original by the converter."""
        interrupted = path.with_name(path.name + ".fit").exists()
        if interrupted or not path.exists():
            command = [sys.executable, ROOT / "nkat_gguf_converter.py", "--input", self.path(base), "--repair", path]
            command += ["--reference", self.path(ORIGINAL), "--calibrate", self.text(CALIBRATION)]
            command += ["--calibrate-ignore", "<unk>", "--repair-steps", self.repair_steps, "--fit-fast"]
            command += ["--json", path.with_suffix(".converter.json"), "--force"] + ["--resume"] * interrupted
            command += self.no_cuda
            done = subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL, check=False)
            if done.returncode != 0:
                raise NKATError(f"{base}: the converter ended with status {done.returncode}")
        return path

    def run(self, program: str, *arguments: object, made: Path) -> None:
        """One of llama.cpp's programs, in the environment of the user's shell; what it did not finish is not kept."""
        command = [str(self.llama / program), *map(str, arguments)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=users_environment(), check=False)
        except OSError as error:
            raise NKATError(f"{command[0]}: cannot be run: {error.strerror}") from None
        if done.returncode != 0 or not made.exists():
            made.unlink(missing_ok=True)
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise NKATError(f"{program} {made.stem}: {said[-1]}")

    def base(self, model: str) -> dict[str, Perplexity]:
        """The model as its file is, on this page's texts, measured once and kept."""
        path = self.out / f"base-{model}.pt"
        if path.exists():
            return {name: Perplexity(nll) for name, nll in torch.load(path, weights_only=True).items()}
        self.load(model)
        measured = self.judge(model, model, TEXTS)
        torch.save({name: result.nll for name, result in measured.items()}, path)
        return measured

    def fitted(self, model: str) -> Any:
        """Θ for a model's file, learned from the original."""
        flags = self.fit_flags(RANK, "--reference", self.path(ORIGINAL), "--no-nested")
        return self.thetas(f"{model}-theta", model, *flags)

    @cached_property
    def original(self) -> tuple[torch.Tensor, list[Teacher]]:
        """The chunks of KL [C, T], and what the original predicts there."""
        loaded = self.open(self.path(ORIGINAL))
        content = load_text(self.text(TEXTS[0])).content
        chunks = text_chunks(loaded.tokenizer, content, KL_CHUNKS).to(self.device)
        head = Head.of(loaded.model)
        with torch.inference_mode():
            return chunks, [Teacher(_scored(loaded.model, chunk), head) for chunk in chunks]

    def divergence(self, model: Transformer) -> dict[str, float]:
        """KL from the original of a model as it stands, nats a token."""
        chunks, teachers = self.original
        head, found = Head.of(model), []
        with torch.inference_mode():
            for chunk, teacher in zip(chunks, teachers, strict=True):
                hidden = _scored(model, chunk)
                found.append(float(vocabulary_loss(hidden, head, None, teacher)) / len(hidden))
        return {"kl": mean(found), "kl_stderr": stdev(found) / len(found) ** 0.5}


def _scored(model: Transformer, chunk: torch.Tensor) -> torch.Tensor:
    """Hidden states [N, d] before a chunk's scored tokens."""
    return model.hidden(chunk[None])[0, :-1][-scored_tokens(CONTEXT) :]


def measure(bench: RepairBench, base: str, arm: str) -> dict[str, Any]:
    """One arm on one base: perplexities beside the original's, KL, bytes."""
    model = base + REPAIRED if arm in ("scales", "both", "qera-scales") else base
    original = bench.base(ORIGINAL)
    extra, put_on = _added(bench, model, arm)
    loaded = bench.load(model)
    put_on(loaded.model)
    now, divergence = bench.judge(model, f"{base}-{arm}", TEXTS), bench.divergence(loaded.model)
    return {"base": base, "arm": arm, **bench.record(model, original, now, extra), **divergence}


def _added(bench: RepairBench, model: str, arm: str) -> tuple[int, Callable[[Transformer], None]]:
    """The bytes that an arm adds to a model's file, and what puts them on the model."""
    if arm in ("base", "scales"):
        return 0, lambda _: None
    if arm in ("theta", "both"):
        theta_set = bench.fitted(model)

        def put_on(transformer: Transformer) -> None:
            transformer.set_thetas(theta_set.layers)
            transformer.set_gamma(theta_set.gamma)

        return theta_set.nbytes, put_on
    terms = qera_terms(bench.load(model), bench.path(ORIGINAL), bench.text(CALIBRATION), RANK)
    return terms.nbytes, lambda transformer: apply_terms(transformer, terms)


def table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a case, the smallest file first; won back: of what the base has above the original."""
    rows = []
    for result in sorted(results.values(), key=lambda r: r["model_bytes"] + r["theta_bytes"]):
        wiki, other = (result["texts"][name] for name in TEXTS)
        base = results.get(f"{result['base']}-base")
        won = (None, None) if base is None or result["arm"] == "base" else _won_back(base, result)
        rows.append(
            {
                **{key: result[key] for key in ("base", "arm", "kl", "kl_stderr")},
                "bytes": result["model_bytes"] + result["theta_bytes"],
                **{key: wiki[key] for key in ("perplexity", "change_percent", "change_percent_stderr")},
                "other_change_percent": other["change_percent"],
                "other_change_percent_stderr": other["change_percent_stderr"],
                "won_back_percent": won[0],
                "kl_won_back_percent": won[1],
            }
        )
    change = "{:+.2f} ± {:.2f}".format
    columns = [
        Column("case", ("base", "arm"), "{}, {}".format),
        Column("bytes", "bytes", format_bytes),
        Column("perplexity", "perplexity", ".3f"),
        Column("against Q4_1, %", ("change_percent", "change_percent_stderr"), change),
        Column("Shakespeare %", ("other_change_percent", "other_change_percent_stderr"), change),
        Column("KL", ("kl", "kl_stderr"), "{:.4f} ± {:.4f}".format),
        Column("won back %", "won_back_percent", ".0f"),
        Column("of KL %", "kl_won_back_percent", ".0f"),
    ]
    return Table("repair", columns, rows)


def _won_back(base: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[float | None, float]:
    """Per cent of the perplexity and of the divergence; None: the base has lost nothing."""
    first, second = (result["texts"][TEXTS[0]] for result in (base, now))
    lost = first["perplexity"] - first["base_perplexity"]
    share = None if lost <= 0 else 100 * (first["perplexity"] - second["perplexity"]) / lost
    return share, 100 * (1 - now["kl"] / base["kl"])


def main() -> None:
    example = "  python -m benchmarks.repair --llama-bin llama.cpp/build/bin --data texts --output-dir repair"
    parser = commandline.parser(__doc__.splitlines()[0], example)
    parser.add_argument("--llama-bin", type=Path, required=True, metavar="FOLDER", help="llama.cpp's programs")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with the texts")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="FOLDER", help="where cases are kept")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="cases whose names match")
    parser.add_argument("--list", action="store_true", help="name the cases, and which are there")
    parser.add_argument("--steps", type=commandline.positive_int, default=40, help="of a fit of Θ (default 40)")
    parser.add_argument("--repair-steps", type=commandline.positive_int, default=60, help="of a repair (default 60)")
    parser.add_argument("--threads", type=commandline.thread_count, metavar="N")
    parser.add_argument("--no-cuda", action="store_true", help="use the processor even if there is a GPU")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    hardware.set_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    device = hardware.pick_device(allow_cuda=not options.no_cuda)
    bench = RepairBench(
        options.data,
        options.output_dir,
        options.steps,
        device,
        llama=options.llama_bin,
        repair_steps=options.repair_steps,
    )
    results = run(bench, _wanted(options.only), options.list)
    if options.list:
        return
    show(table(results))
    say()
    record = {"dtype": str(bench.dtype), "steps": options.steps, "repair_steps": options.repair_steps, "cases": results}
    print_record({"machine": hardware.describe(device), **record})


def _wanted(patterns: list[str] | None) -> list[tuple[str, str]]:
    cases = [(base, arm) for base in BASES for arm in ARMS]
    return [c for c in cases if patterns is None or any(fnmatchcase("-".join(c), p) for p in patterns)]


def run(bench: RepairBench, cases: Iterable[tuple[str, str]], only_list: bool) -> dict[str, dict[str, Any]]:
    """The records of the cases, those made that are missing."""
    results = {}
    for base, arm in cases:
        name = f"{base}-{arm}"
        path = bench.out / f"{name}.json"
        if only_list:
            print(f"{'done   ' if path.exists() else 'missing'}  {name}")
            continue
        if not path.exists():
            note(f"{name} …")
            data = json.dumps(measure(bench, base, arm), indent=2).encode()
            with atomic_output(path, len(data)) as file:
                file.write(data)
        results[name] = json.loads(path.read_text(encoding="utf-8"))
    return results
