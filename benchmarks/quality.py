"""What Θ buys, on text it was not made from: every source, its controls, its rivals and its price out of domain.

    python -m benchmarks.quality --data FOLDER --output-dir quality --list
    python -m benchmarks.quality --data FOLDER --output-dir quality --only 'fit-*' 'keep-*'
    python -m benchmarks.quality --data FOLDER --output-dir quality          all that is missing, then the tables

FOLDER holds the texts by their usual names: wiki.test.raw, wikitext-2-valid.txt, tinyshakespeare.txt, plrabn12.txt and
alice29.txt. The models are fetched (`python -m nkat.models`). Each case leaves FOLDER/CASE.json and what it made; cases
that are there are not run again, and a fit that was interrupted goes on. All of it takes hours on two cores.

Judged in chunks of 512 tokens (wiki.test.raw 40, the others 16), in bfloat16 where the device computes in it (a GPU
where there is one, unless --no-cuda), with paired differences from the same model without Θ. The last line of stdout is
JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.quality")

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import torch

from benchmarks import quality_report
from benchmarks.low_rank import LowRankTerms, apply_terms, fit_unrestricted, qera_terms, weight_controls
from nkat.errors import NKATError
from nkat.gguf.file import TensorInfo
from nkat.gguf.quantise import requantise
from nkat.host import commandline, hardware
from nkat.host.console import note, say
from nkat.host.files import atomic_output
from nkat.host.record import print_record
from nkat.host.tables import show
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.transformer import Transformer
from nkat.measure.perplexity import Perplexity, paired, score_chunks, text_chunks
from nkat.measure.texts import load_text
from nkat.measure.tpe import byte_ratio, tpe
from nkat.models import cached, fetch
from nkat.theta.layers import adaptable_layers
from nkat.theta.modelfile import open_model_file
from nkat.theta.set import ThetaSet, truncate_rank

ROOT = Path(__file__).resolve().parent.parent
JUDGED = {"wiki.test.raw": 40, "tinyshakespeare.txt": 16, "plrabn12.txt": 16, "alice29.txt": 16}
CALIBRATION = "wikitext-2-valid.txt"
GAMMA = 0.97
STRONGEST = 0.90
RANKS = (2, 4, 6, 8)
REPAIR_RANKS = (4, 8, 16, 32)
GAMMAS = (0.90, 0.93, 0.96, 0.97, 0.98, 0.99)
WEAKER = (0.98, 0.99)  # at run time, than a fit was made for
STEPS = 60  # of every fit
COARSE = ("smollm2-q4_0", "smollm2-q3_k_s")

Q3_K_S = gguf.GGMLQuantizationType.Q3_K  # rows of 576 are no multiple of its 256: those tensors become Q4_0
Q4_0 = gguf.GGMLQuantizationType.Q4_0


@dataclass
class Bench:
    """Where the inputs are and the results go, and the models that are open."""

    data: Path
    out: Path
    steps: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    models: dict[str, LoadedModel] = field(default_factory=dict)
    chunks: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    def text(self, name: str) -> Path:
        return self.data / name

    def path(self, model: str) -> Path:
        """A model's file: fetched, or re-quantised from SmolLM2."""
        if model in COARSE:
            path = self.out / f"{model}.gguf"
            if not path.exists():
                requantise(self.path("smollm2"), path, _q4_0 if model.endswith("q4_0") else _q3_k_s)
            return path
        return cached(model) or fetch(model)

    def load(self, model: str) -> LoadedModel:
        """One model at a time stays open; whatever Θ it had is taken off."""
        if model not in self.models:
            self.models.clear()
            self.models[model] = self.open(self.path(model))
        loaded = self.models[model]
        loaded.model.set_thetas({})
        loaded.model.set_gamma(None)
        return loaded

    def open(self, path: Path) -> LoadedModel:
        """A file as everything is judged."""
        return load_model(path, device=self.device, dtype=self.dtype, keep_dense=True)  # dense: faster

    @cached_property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if hardware.computes_bfloat16(self.device) else torch.float32

    @property
    def no_cuda(self) -> list[str]:
        """What keeps the converter's fits on the processor too."""
        return ["--no-cuda"] if self.device.type == "cpu" and torch.cuda.is_available() else []

    def judge(self, model: str, label: str, texts: Iterable[str] | None = None) -> dict[str, Perplexity]:
        """Perplexity as the open model now stands; texts: None for all."""
        loaded = self.models[model]
        results = {}
        for name in JUDGED if texts is None else texts:
            if (model, name) not in self.chunks:
                content = load_text(self.text(name)).content
                self.chunks[model, name] = text_chunks(loaded.tokenizer, content, JUDGED[name])
            measured = score_chunks(loaded.model, self.chunks[model, name], progress=f"{label}, {name}")
            results[name] = Perplexity(measured)
        return results

    def base(self, model: str) -> dict[str, Perplexity]:
        """The same without Θ, measured once for a model and kept."""
        path = self.out / f"base-{model}.pt"
        if path.exists():
            return {name: Perplexity(nll) for name, nll in torch.load(path, weights_only=True).items()}
        self.load(model)
        measured = self.judge(model, f"{model} without Θ")
        torch.save({name: result.nll for name, result in measured.items()}, path)
        return measured

    def compare(
        self,
        model: str,
        label: str,
        theta_bytes: int,
        apply: Callable[[Transformer], None],
        texts: Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """The model with what `apply` puts on it against the one without, by text."""
        base = self.base(model)  # first: it takes off what is on the model
        loaded = self.load(model)
        apply(loaded.model)
        return self.record(model, base, self.judge(model, label, texts), theta_bytes)

    def record(
        self, model: str, base: Mapping[str, Perplexity], now: Mapping[str, Perplexity], theta_bytes: int
    ) -> dict[str, Any]:
        loaded = self.load(model)
        ratio = byte_ratio(loaded.tensors, theta_bytes, loaded.config.active_experts)
        texts = {}
        for name, measured in now.items():
            change = paired(base[name], measured)
            texts[name] = {
                "perplexity": measured.ppl,
                "perplexity_stderr": measured.stderr,
                "base_perplexity": base[name].ppl,
                "change_percent": change.percent,
                "change_percent_stderr": change.percent_stderr,
                "tpe": tpe(measured.ppl, ratio),
                "base_tpe": tpe(base[name].ppl),
            }
        model_bytes = self.path(model).stat().st_size
        return {"model": model, "model_bytes": model_bytes, "theta_bytes": theta_bytes, "ratio": ratio, "texts": texts}

    def thetas(self, name: str, model: str, *flags: object, gamma: float | None = GAMMA) -> ThetaSet:
        """What the converter makes with these flags, kept as NAME.theta; an interrupted fit goes on.

        gamma: None: the converter's choice
        """
        path = self.out / f"{name}.theta"
        interrupted = path.with_name(path.name + ".fit").exists()  # then a Θ that is there is an unfinished one
        if interrupted or not path.exists():
            command = [sys.executable, ROOT / "nkat_gguf_converter.py", "--input", self.path(model), "--theta-only"]
            command += ["--output", path, "--json", path.with_suffix(".converter.json"), *flags]
            command += [] if gamma is None else ["--theta-gamma", gamma]
            command += ["--resume"] if interrupted else []
            command += self.no_cuda if "fit" in flags else []
            done = subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL, check=False)
            if done.returncode != 0:
                raise NKATError(f"{name}: the converter ended with status {done.returncode}")
        return open_model_file(path).theta

    def fit_flags(self, rank: int, *more: object, calibrate: Path | None = None) -> list[object]:
        """Of a fit. Its start is named because the trials of `auto` take time."""
        start = "residual" if "--reference" in more else "weight"
        flags = ["--theta-source", "fit", "--theta-rank", rank, "--fit-steps", self.steps, "--fit-fast", "--no-guard"]
        flags += [] if "--fit-start" in more else ["--fit-start", start]
        text = self.text(CALIBRATION) if calibrate is None else calibrate
        ignore = ["--calibrate-ignore", "<unk>"] if text.name == CALIBRATION else []
        return [*flags, "--calibrate", text, *ignore, *more]

    def second_half(self, name: str) -> Path:
        """The half of a text that is not judged on."""
        path = self.out / f"second-half-of-{name}"
        content = load_text(self.text(name)).content
        path.write_text(content[content.index("\n", len(content) // 2) :], encoding="utf-8")
        return path


Case = Callable[[Bench, str], dict[str, Any]]


def theta_case(
    model: str, make: Callable[[Bench], ThetaSet], gamma: float | None = GAMMA, texts: Iterable[str] | None = None
) -> Case:
    """A Θ that the converter made, at one γ; None: at its own."""

    def run(bench: Bench, name: str) -> dict[str, Any]:
        theta_set = make(bench)
        strength = theta_set.gamma if gamma is None else gamma

        def apply(transformer: Transformer) -> None:
            transformer.set_thetas(theta_set.layers)
            transformer.set_gamma(strength)

        record = bench.compare(model, name, theta_set.nbytes, apply, texts)
        return {**record, "rank": theta_set.rank, "gamma": strength, "source": theta_set.source}

    return run


def terms_case(
    model: str, make: Callable[[Bench, LoadedModel], LowRankTerms], texts: Iterable[str] | None = None
) -> Case:
    """A low-rank term that is no Θ: a control or a rival."""

    def run(bench: Bench, name: str) -> dict[str, Any]:
        terms = make(bench, bench.load(model))
        return bench.compare(model, name, terms.nbytes, lambda transformer: apply_terms(transformer, terms), texts)

    return run


def lost_case(model: str) -> Case:
    """What a coarser quantisation loses: against SmolLM2 as it comes, not against itself."""

    def run(bench: Bench, name: str) -> dict[str, Any]:
        return bench.record(model, bench.base("smollm2"), bench.base(model), 0)

    return run


def all_cases() -> dict[str, Case]:
    """Every case by name, in the order of the report."""

    def nested(bench: Bench) -> ThetaSet:
        return bench.thetas("fit-r8", "smollm2", *bench.fit_flags(8))

    cases: dict[str, Case] = {}
    for rank in RANKS:
        cases[f"fit-r{rank}-of-r8"] = theta_case("smollm2", lambda b, r=rank: truncate_rank(nested(b), r))
    alone = {"fit-r4-alone": ["--no-nested"], "fit-r4-zero": ["--no-nested", "--fit-start", "zero"]}
    for name, flags in alone.items():
        cases[name] = theta_case("smollm2", lambda b, n=name, f=flags: b.thetas(n, "smollm2", *b.fit_flags(4, *f)))
    for gamma in GAMMAS:
        if gamma != GAMMA:
            cases[f"fit-r4-at-{gamma}"] = theta_case("smollm2", lambda b: truncate_rank(nested(b), 4), gamma)
    for model in ("gemma3", "qwen"):

        def fitted(bench: Bench, m: str = model) -> ThetaSet:
            return bench.thetas(f"fit-r4-{m}", m, *bench.fit_flags(4))

        cases[f"fit-r4-{model}"] = theta_case(model, fitted)
        for gamma in WEAKER:
            cases[f"fit-r4-{model}-at-{gamma}"] = theta_case(model, fitted, gamma)
    cases |= _default_cases() | _domain_cases() | _weight_cases() | _repair_cases()
    cases["unrestricted-same-bytes"] = terms_case("smollm2", _unrestricted)
    return cases


def _default_cases() -> dict[str, Case]:
    """What a user gets who gives one text and nothing else: rank, γ and step as the converter chooses them."""
    cases: dict[str, Case] = {}
    for model in ("smollm2", "gemma3", "qwen"):
        for kind, flags in (("guarded", []), ("unguarded", ["--no-guard"])):

            def fitted(bench: Bench, m: str = model, k: str = kind, f: list[str] = flags) -> ThetaSet:
                text = ["--calibrate", bench.text(CALIBRATION), "--calibrate-ignore", "<unk>"]
                learned = ["--theta-source", "fit", "--fit-steps", bench.steps, "--fit-fast", *text]
                return bench.thetas(f"{k}-{m}", m, *learned, *f, gamma=None)

            cases[f"{kind}-{model}"] = theta_case(model, fitted, None)
    return cases


def _domain_cases() -> dict[str, Case]:
    """The price elsewhere: held by a text of another kind, by the other texts' own halves, and the reverse."""

    def keep_python(bench: Bench) -> ThetaSet:
        text = bench.out / "python-documentation.txt"
        text.write_text(load_text(None).content, encoding="utf-8")
        return bench.thetas("keep-python", "smollm2", *bench.fit_flags(4, "--keep", text))

    def keep_halves(bench: Bench) -> ThetaSet:
        text = bench.out / "second-halves.txt"
        halves = [bench.second_half(name).read_text(encoding="utf-8") for name in list(JUDGED)[1:]]
        text.write_text("".join(halves), encoding="utf-8")
        firmly = ["--fit-keep-weight", 8, "--fit-keep-batch", 4]
        return bench.thetas("keep-halves", "smollm2", *bench.fit_flags(4, "--keep", text, *firmly))

    def reverse(bench: Bench) -> ThetaSet:
        text = bench.second_half("tinyshakespeare.txt")
        return bench.thetas("fit-shakespeare", "smollm2", *bench.fit_flags(4, calibrate=text))

    made = {"keep-python": keep_python, "keep-halves": keep_halves, "fit-shakespeare": reverse}
    return {name: theta_case("smollm2", make) for name, make in made.items()}


def _weight_cases() -> dict[str, Case]:
    """The data-free source: rank, γ, and what really acts."""

    def weight(bench: Bench) -> ThetaSet:
        return bench.thetas("weight-r8", "smollm2", "--theta-rank", max(RANKS))

    cases: dict[str, Case] = {}
    for rank in RANKS:
        cases[f"weight-r{rank}"] = theta_case("smollm2", lambda b, r=rank: truncate_rank(weight(b), r))
    for gamma in GAMMAS:
        if gamma != GAMMA:
            cases[f"weight-r4-at-{gamma}"] = theta_case("smollm2", lambda b: truncate_rank(weight(b), 4), gamma)
    for control in ("negated", "random", "straight-half", "transposed-half"):
        cases[f"weight-r4-{control}"] = terms_case(
            "smollm2", lambda b, loaded, c=control: weight_controls(loaded, weight(b), 4, STRONGEST)[c]
        )
    return cases


def _repair_cases() -> dict[str, Case]:
    """What a coarser quantisation lost, won back by residual, by fit and by the unrestricted optimum."""
    cases: dict[str, Case] = {}
    for model in COARSE:
        cases[f"{model}-lost"] = lost_case(model)

        def reference(bench: Bench) -> list[object]:
            return ["--reference", bench.path("smollm2"), "--calibrate", bench.text(CALIBRATION)]

        def residual(bench: Bench, m: str = model) -> ThetaSet:
            flags = ["--theta-source", "residual", "--theta-rank", max(REPAIR_RANKS), *reference(bench)]
            return bench.thetas(f"{m}-residual-r32", m, *flags)

        def fitted(bench: Bench, m: str = model) -> ThetaSet:
            flags = bench.fit_flags(max(REPAIR_RANKS), "--reference", bench.path("smollm2"))
            return bench.thetas(f"{m}-fit-r32", m, *flags)

        for rank in REPAIR_RANKS:
            texts = None if rank == REPAIR_RANKS[0] else list(JUDGED)[:1]
            sources = {"residual": residual, "fit": fitted}
            for source, make in sources.items():
                cases[f"{model}-{source}-r{rank}"] = theta_case(
                    model, lambda b, r=rank, f=make: truncate_rank(f(b), r), texts=texts
                )
            cases[f"{model}-qera-r{rank}"] = terms_case(
                model,
                lambda b, loaded, r=rank: qera_terms(loaded, b.path("smollm2"), b.text(CALIBRATION), r),
                texts,
            )
    return cases


def _unrestricted(bench: Bench, loaded: LoadedModel) -> LowRankTerms:
    return fit_unrestricted(
        bench.open(bench.path("smollm2")), bench.text(CALIBRATION), ["<unk>"], 4, bench.steps, bench.out / "lora-r4.pt"
    )


def _q4_0(info: TensorInfo) -> gguf.GGMLQuantizationType:
    return Q4_0 if info.name in adaptable_layers({info.name: info}) else info.type


def _q3_k_s(info: TensorInfo) -> gguf.GGMLQuantizationType:
    if info.name not in adaptable_layers({info.name: info}):
        return info.type
    return Q3_K_S if info.shape[1] % 256 == 0 else Q4_0


def main() -> None:
    parser = commandline.parser(
        __doc__.splitlines()[0], "  python -m benchmarks.quality --data texts --output-dir quality"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--output-dir", type=Path, required=True, help="where cases are kept")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="cases whose names match")
    parser.add_argument("--list", action="store_true", help="name the cases, and which are there")
    parser.add_argument("--steps", type=commandline.positive_int, default=STEPS, help=f"of each fit (default {STEPS})")
    parser.add_argument("--threads", type=commandline.thread_count)
    parser.add_argument("--no-cuda", action="store_true", help="use the processor even if there is a GPU")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    hardware.set_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    run(options)


def run(options: argparse.Namespace) -> None:
    device = hardware.pick_device(allow_cuda=not options.no_cuda)
    bench = Bench(options.data, options.output_dir, options.steps, device)
    cases = all_cases()
    wanted = [n for n in cases if options.only is None or any(fnmatchcase(n, p) for p in options.only)]
    results: dict[str, Any] = {}
    for name in wanted:
        path = bench.out / f"{name}.json"
        if options.list:
            print(f"{'done   ' if path.exists() else 'missing'}  {name}")
            continue
        if not path.exists():
            note(f"{name} …")
            data = json.dumps(cases[name](bench, name), indent=2).encode()
            with atomic_output(path, len(data)) as file:
                file.write(data)
        results[name] = json.loads(path.read_text(encoding="utf-8"))
    if options.list:
        return
    for table in quality_report.tables(results):
        show(table)
        say()
    quality_report.plot_ranks(bench.out / "quality_ranks.png", results)
    record = {"machine": hardware.describe(device), "dtype": str(bench.dtype), "steps": options.steps, "cases": results}
    print_record(record)
