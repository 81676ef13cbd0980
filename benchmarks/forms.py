"""Forms of what is learned, at equal bytes: what each gains at home, costs elsewhere, and moves there.

    python -m benchmarks.forms --data FOLDER --output-dir forms --threads 1
    python -m benchmarks.forms --data FOLDER --output-dir forms --models qwen --only additive rotation --seeds 0

`additive` is Θ as the converter fits it, `ffn` the same in the FFN alone at a higher rank, `lora` an unrestricted term,
`rotation` W·exp(Θ) with Θ = P Qᵀ − Q Pᵀ on the input side, shared by the layers that have one input (q, k, v; gate and
up), and `both` half the bytes of each. With U = [P Q] and J = [[0, I], [−I, 0]]

    exp(U J Uᵀ) = I + U F Uᵀ,   F = φ(J UᵀU) J,   φ(z) = (eᶻ − 1) / z

so W·exp(Θ) = W + (W U) F Uᵀ is a low-rank term too, and is judged as one: what an adapter for llama.cpp would hold.

FOLDER holds the texts of `benchmarks.quality` by their usual names. Learned on wikitext-2-valid.txt without `<unk>`,
from zero, not nested, INT8 in the last steps; judged with INT8 factors on other texts, in bfloat16 where the device
computes in it (a GPU where there is one, unless --no-cuda): perplexity against the same model without any, and
KL(without ‖ with) of the next token. Each case leaves MODEL-FORM-RATE-SEED.json; cases that are there are not run
again. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.forms")

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.low_rank import LowRankTerms, UnrestrictedLinear, apply_terms
from nkat.host import commandline, console, hardware
from nkat.host.console import format_bytes, note
from nkat.host.record import print_record, write_json
from nkat.host.tables import Column, Table, show
from nkat.lm.linear import StarLinear
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.transformer import Transformer
from nkat.measure.perplexity import CONTEXT, Perplexity, paired, text_chunks
from nkat.measure.texts import load_text
from nkat.models import cached, fetch
from nkat.sources.fit.data import fit_text, split_validation
from nkat.sources.fit.descent import FitData, FitSettings, Progress, by_name, fit
from nkat.sources.fit.layers import Factors, FittedLinear, FrozenProduct, MakeLayer, ThetaMode, round_straight_through
from nkat.sources.fit.loss import Head, Teacher, vocabulary_loss
from nkat.sources.fit.state import FitState
from nkat.sources.residual import equal_bytes_rank
from nkat.theta.algebra import low_rank_form, pad_rows
from nkat.theta.layers import adaptable_layers

HOME, ELSEWHERE = "wiki.test.raw", ("tinyshakespeare.txt", "plrabn12.txt", "alice29.txt")
CALIBRATION, IGNORED = "wikitext-2-valid.txt", ["<unk>"]
RANK = 4  # of `additive`: the others have as many bytes
RATES = {"additive": 3e-3, "ffn": 3e-3, "lora": 3e-3, "rotation": 3e-3, "both": 3e-3}
_START = 0.02  # standard deviation of the factor that does not start at zero
_SHARED = {"attn_q": "attn_norm", "attn_k": "attn_norm", "attn_v": "attn_norm"} | {
    "ffn_gate": "ffn_norm",
    "ffn_up": "ffn_norm",
}


def rotation_core(u: torch.Tensor) -> torch.Tensor:
    """F [2r, 2r] of U = [P Q] [n, 2r]: exp(P Qᵀ − Q Pᵀ) = I + U F Uᵀ. Differentiable; F(0) = J.

    φ(A) is the upper right part of exp([[A, I], [0, 0]]) (Al-Mohy and Higham, 2011, doi 10.1137/100788860, § 2).
    """
    width = u.shape[1]
    one = torch.eye(width, dtype=u.dtype, device=u.device)
    j = torch.cat([one[width // 2 :], -one[: width // 2]])  # [[0, I], [−I, 0]] by rows
    augmented = torch.cat([torch.cat([j @ (u.T @ u), one], dim=1), u.new_zeros(width, 2 * width)])
    # On the processor: on a GPU a matrix this small takes a hundred times as long, launch after launch.
    return torch.matrix_exp(augmented.cpu()).to(u.device)[:width, width:] @ j


def input_of(name: str) -> tuple[str, str]:
    """What a weight multiplies, by block: layers with one input share a rotation."""
    _, block, kind, _ = name.split(".")
    return block, _SHARED.get(kind, kind)


class RotatedLinear(FittedLinear):
    """y = W exp(Θ) x + Θ' x + bias: Θ' in the first `additive` columns of P and Q, Θ of the owner in its others.

    owner: the layer with the same input that holds the rotation; None: this one
    """

    def __init__(
        self, layer: StarLinear, factors: Factors, mode: ThetaMode, additive: int, owner: RotatedLinear | None
    ) -> None:
        super().__init__(layer, factors, mode)
        self.additive = additive
        self.turn = self.rotate if owner is None else owner.rotate

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        u = rotation_columns(*self.acting(), self.additive, x.shape[-1])
        z = F.linear(x, u.T.to(x.dtype))
        return x + F.linear(z, (u @ rotation_core(u)).to(x.dtype))

    def acting(self) -> Factors:
        if not self.mode.rounded:
            return self.p, self.q
        return round_straight_through(self.p), round_straight_through(self.q)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        y = FrozenProduct.apply(self.turn(x), self.layer)
        if self.additive == 0:
            return y
        p, q = (factor[:, : self.additive] for factor in self.acting())
        down, up = self.low_rank(p, q)
        return y + F.linear(F.linear(x, down.to(self.dtype)), up.to(self.dtype))


def rotation_columns(p: torch.Tensor, q: torch.Tensor, additive: int, n: int) -> torch.Tensor:
    """U [n, 2r]: the columns of P and Q behind the additive ones."""
    return torch.cat([p[:n, additive:], q[:n, additive:]], dim=1)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one form has in each layer.

    additive: columns of Θ', or of the unrestricted term;  rotation: of the rotation, 0 where another layer holds it
    """

    form: str
    shapes: Mapping[str, tuple[int, int]]
    additive: Mapping[str, int]
    rotation: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Of INT8 factors with a float32 scale for each column of P and of Q."""
        total = 0
        for name, (m, n) in self.shapes.items():
            rows = m + n if self.form == "lora" else 2 * max(m, n)
            total += self.additive[name] * (rows + 8) + self.rotation[name] * (2 * n + 8)
        return total

    def starts(self, seed: int) -> list[Factors]:
        """Nothing at first: one factor is random, the other zero."""
        generator = torch.Generator().manual_seed(seed)

        def random(rows: int, columns: int) -> torch.Tensor:
            return _START * torch.randn(rows, columns, generator=generator)

        out = []
        for name, (m, n) in self.shapes.items():
            if self.form == "lora":
                out.append((torch.zeros(m, self.additive[name]), random(n, self.additive[name])))
                continue
            added = random(max(m, n), self.additive[name])
            p = torch.cat([added, pad_rows(random(n, self.rotation[name]), max(m, n))], dim=1)
            out.append((p, torch.zeros_like(p)))
        return out

    def kind(self, names: Mapping[int, str]) -> MakeLayer:
        """What makes the layer that is fitted; names: of each StarLinear, by its id."""
        if self.form == "lora":
            return UnrestrictedLinear
        if not any(self.rotation.values()):
            return FittedLinear
        owners: dict[tuple[str, str], RotatedLinear] = {}

        def make(layer: StarLinear, factors: Factors, mode: ThetaMode) -> RotatedLinear:
            name = names[id(layer)]
            place = input_of(name)
            made = RotatedLinear(layer, factors, mode, self.additive[name], owners.get(place))
            owners.setdefault(place, made)
            return made

        return make

    def terms(self, model: Transformer, factors: Mapping[str, Factors]) -> LowRankTerms:
        """What INT8 factors add to each weight: (W U) F Uᵀ of a rotation, and what is additive."""
        layers = model.star_linears()
        owners: dict[tuple[str, str], torch.Tensor] = {}
        out = {}
        for name, (p, q) in factors.items():
            m, n = self.shapes[name]
            p, q = (round_straight_through(factor.to(layers[name].device)) for factor in (p, q))
            added = self.additive[name]
            pairs = []
            if added:
                first = p[:, :added], q[:, :added]
                pairs.append((first[1].T, first[0]) if self.form == "lora" else low_rank_form(*first, m, n))
            if self.rotation[name]:
                owners[input_of(name)] = rotation_columns(p, q, added, n)
            if any(self.rotation.values()):
                u = owners[input_of(name)]
                pairs.append((u.T, layers[name].weight().float() @ u @ rotation_core(u)))
            down, up = zip(*pairs, strict=True)
            out[name] = (torch.cat(down), torch.cat(up, dim=1))
        return LowRankTerms(out, self.nbytes)


def make_plan(form: str, shapes: Mapping[str, tuple[int, int]], rank: int = RANK) -> Plan:
    """Ranks that come nearest to the bytes of an additive Θ of `rank` in every layer."""
    if form == "ffn":
        chosen = {name: shape for name, shape in shapes.items() if ".ffn_" in name}
        ratio = sum(max(s) for s in shapes.values()) / sum(max(s) for s in chosen.values())
        return Plan(form, chosen, dict.fromkeys(chosen, max(1, round(rank * ratio))), dict.fromkeys(chosen, 0))
    owner_of: dict[tuple[str, str], str] = {}
    for name in shapes:
        owner_of.setdefault(input_of(name), name)
    owners = set(owner_of.values())
    columns = {"rotation": rank, "both": rank // 2}.get(form, 0)  # of Θ, whose bytes the rotations get
    added = rank - columns
    ratio = sum(max(s) for s in shapes.values()) / sum(n for name, (_, n) in shapes.items() if name in owners)
    turning = round(columns * ratio)
    additive = {name: equal_bytes_rank(added, *s) if form == "lora" else added for name, s in shapes.items()}
    return Plan(form, shapes, additive, {name: turning if name in owners else 0 for name in shapes})


@dataclass(slots=True)
class Bench:
    """Inputs, and the model that is open with what it predicts by itself."""

    data: Path
    out: Path
    settings: FitSettings
    chunks: Mapping[str, int]
    device: torch.device
    model: str = ""
    loaded: LoadedModel | None = None
    hidden: dict[str, torch.Tensor] | None = None  # of the scored positions without a term, by text

    def open(self, model: str) -> LoadedModel:
        if self.loaded is None or self.model != model:
            path = cached(model) or fetch(model)
            self.model, self.hidden = model, None
            dtype = torch.bfloat16 if hardware.computes_bfloat16(self.device) else torch.float32
            self.loaded = load_model(path, device=self.device, dtype=dtype, keep_dense=True)
            self.loaded.model.set_gamma(None)
        return self.loaded

    def run(self, model: str, form: str, rate: float, seed: int) -> dict[str, Any]:
        """Fits one form and judges it."""
        loaded = self.open(model)
        shapes = {name: loaded.tensors[name].shape for name in adaptable_layers(loaded.tensors)}
        plan = make_plan(form, shapes)
        state = self.fit(loaded, plan, rate, seed)
        texts = self.judge(loaded, plan.terms(loaded.model, by_name(list(plan.shapes), state.best_factors)))
        row = state.history[-1]
        settings = {"steps": self.settings.steps, "batch": self.settings.batch, "context": self.settings.context}
        return {
            "model": model,
            "form": form,
            "rate": rate,
            "seed": seed,
            "bytes": plan.nbytes,
            "columns": {"additive": max(plan.additive.values()), "rotation": max(plan.rotation.values())},
            "settings": settings,
            "validation_nll": row["validation_nll"],
            "seconds": state.seconds,
            "device": hardware.describe(self.device)["device_name"],
            "texts": texts,
        }

    def fit(self, loaded: LoadedModel, plan: Plan, rate: float, seed: int) -> FitState:
        settings = replace(self.settings, seed=seed, learning_rate=rate)
        text = load_text(self.data / CALIBRATION)
        learned, validation = split_validation(fit_text(loaded.tokenizer, text, IGNORED), text.name, settings.context)
        names = list(plan.shapes)
        layers = loaded.model.star_linears()
        kind = plan.kind({id(layers[name]): name for name in names})
        with console.bar(settings.steps, f"{self.model} {plan.form} {rate:g} seed {seed}", "step") as bar:
            progress = Progress(lambda *_: bar.update(), lambda: False)
            data = FitData(learned, validation.pick(slice(4)))
            starts = {"zero": plan.starts(seed)}
            return fit(loaded.model, names, starts, data, settings, progress, kind=kind, keep_activations=True)

    @torch.inference_mode()
    def judge(self, loaded: LoadedModel, terms: LowRankTerms) -> dict[str, Any]:
        """By text: the paired change of perplexity, and the mean divergence from the model without terms."""
        model = loaded.model
        if self.hidden is None:
            self.hidden = {name: self.predict(loaded, name) for name in self.chunks}
        head = Head.of(model)
        apply_terms(model, terms)
        try:
            changed = {name: self.predict(loaded, name) for name in self.chunks}
        finally:
            model.set_thetas({})
            model.set_gamma(None)
        results = {}
        for name, after in changed.items():
            before = self.hidden[name]
            targets = self.tokens(loaded, name)[:, CONTEXT // 2 + 1 :]
            nll = [model.nll(h.flatten(0, 1), targets.flatten()).view(targets.shape).double() for h in (before, after)]
            base, now = (Perplexity(values.cpu()) for values in nll)
            with torch.no_grad():
                teacher = Teacher(before.flatten(0, 1), head)
                divergence = float(vocabulary_loss(after.flatten(0, 1), head, None, teacher)) / targets.numel()
            results[name] = {**now.record(), **paired(base, now).record(), "kl": divergence, "tokens": now.tokens}
        return results

    def tokens(self, loaded: LoadedModel, name: str) -> torch.Tensor:
        return text_chunks(loaded.tokenizer, load_text(self.data / name).content, self.chunks[name]).to(self.device)

    def predict(self, loaded: LoadedModel, name: str) -> torch.Tensor:
        """Hidden states [chunks, scored, d] of what is scored."""
        parts = self.tokens(loaded, name).split(4)
        return torch.cat([loaded.model.hidden(part)[:, CONTEXT // 2 : -1] for part in parts])


def summaries(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record for each model, form and rate: means over seeds with their standard errors, None of one seed."""
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["model"], result["form"], result["rate"]), []).append(result)
    out = []
    for (model, form, rate), cases in groups.items():

        def over_seeds(values: list[float]) -> dict[str, float | None]:
            return {"mean": mean(values), "stderr": stdev(values) / len(values) ** 0.5 if len(values) > 1 else None}

        def figures(name: str, key: str, among: list[Mapping[str, Any]] = cases) -> list[float]:
            return [case["texts"][name][key] for case in among]

        change = "change_percent"
        elsewhere = [mean(case["texts"][name][change] for name in ELSEWHERE) for case in cases]
        drift = [mean(case["texts"][name]["kl"] for name in ELSEWHERE) for case in cases]
        record = {"model": model, "form": form, "rate": rate, "seeds": len(cases), "bytes": cases[0]["bytes"]}
        record |= {"home": over_seeds(figures(HOME, change)), "elsewhere": over_seeds(elsewhere)}
        record |= {name: over_seeds(figures(name, change)) for name in ELSEWHERE}
        record |= {"home_kl": over_seeds(figures(HOME, "kl")), "kl": over_seeds(drift)}
        out.append(record)
    return out


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Of `summary`'s rows: each figure over the seeds."""
    figures = ("home", *ELSEWHERE, "elsewhere", "home_kl", "kl")
    flat = [
        {
            **{key: value for key, value in row.items() if key not in figures},
            **{key: row[key]["mean"] for key in figures},
            **{f"{key}_stderr": row[key]["stderr"] for key in figures},
        }
        for row in rows
    ]

    def figure(title: str, key: str, digits: int = 2, sign: str = "+") -> Column:
        def text(value: float, error: float | None) -> str:
            return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

        return Column(title, (key, f"{key}_stderr"), text)

    columns = [
        Column("model", "model"),
        Column("form", "form"),
        Column("rate", "rate", "g"),
        Column("n", "seeds"),
        Column("bytes", "bytes", format_bytes),
        figure("home %", "home"),
        *(
            figure(f"{title} %", name)
            for title, name in zip(("Shakespeare", "Milton", "Alice"), ELSEWHERE, strict=True)
        ),
        figure("mean of 3 %", "elsewhere"),
        figure("KL home", "home_kl", 4, ""),
        figure("KL of 3", "kl", 4, ""),
    ]
    return Table("forms", columns, flat)


def main() -> None:
    example = "  python -m benchmarks.forms --data texts --output-dir forms"
    parser = commandline.parser(__doc__.splitlines()[0], example)
    parser.add_argument("--data", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--output-dir", type=Path, required=True, help="where cases are kept")
    parser.add_argument("--models", nargs="+", default=["smollm2", "qwen"], metavar="MODEL")
    parser.add_argument("--only", nargs="+", choices=tuple(RATES), metavar="FORM", help=f"of {', '.join(RATES)}")
    parser.add_argument("--rates", nargs="+", type=float, metavar="R", help="learning rates, instead of the form's own")
    parser.add_argument("--seeds", nargs="+", type=commandline.non_negative_int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=commandline.positive_int, default=60, help="of each fit (default 60)")
    parser.add_argument("--batch", type=commandline.positive_int, default=4, help="sequences a step (default 4)")
    parser.add_argument("--warmup", type=commandline.non_negative_int, default=10, help="steps (default 10)")
    parser.add_argument("--home-chunks", type=commandline.positive_int, default=40, metavar="N")
    parser.add_argument("--other-chunks", type=commandline.positive_int, default=16, metavar="N")
    parser.add_argument("--threads", type=commandline.thread_count)
    parser.add_argument("--no-cuda", action="store_true", help="use the processor even if there is a GPU")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    hardware.set_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    run(options)


def run(options: argparse.Namespace) -> None:
    chunks = {HOME: options.home_chunks} | dict.fromkeys(ELSEWHERE, options.other_chunks)
    device = hardware.pick_device(allow_cuda=not options.no_cuda)
    settings = FitSettings(
        RANK,
        0.97,  # without meaning here: what is learned is the product
        steps=options.steps,
        batch=options.batch,
        warmup=options.warmup,
        nested=False,
        validate_every=options.steps,
    )
    bench = Bench(options.data, options.output_dir, settings, chunks, device)
    results = []
    for model in options.models:
        for seed in options.seeds:  # all forms of one seed before the next
            for form in options.only or RATES:
                for rate in options.rates or [RATES[form]]:
                    path = options.output_dir / f"{model}-{form}-{rate:g}-{seed}.json"
                    if not path.exists():
                        note(f"{path.stem} …")
                        write_json(bench.run(model, form, rate, seed), str(path))
                    results.append(json.loads(path.read_text(encoding="utf-8")))
    rows = summaries(results)
    show(table(rows))
    print_record({"machine": hardware.describe(device), "chunks": chunks, "forms": rows, "cases": results})
