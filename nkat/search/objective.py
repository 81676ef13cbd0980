"""The search over a language model's Θ: rank, γ, adapted layers and decay by depth, scored by measured TPE.

One Θ of the highest rank is made once. A trial takes its first columns, scales them and leaves layers out, so it costs
a perplexity run and nothing else. Chunks are scored in a shuffled order and reported one by one: a trial that is worse
than the best on the same chunks beyond doubt (Wilcoxon's signed-rank test) ends early.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import optuna
import torch

from nkat.engine.decoder import make_decoder
from nkat.lm.load import LoadedModel
from nkat.lm.transformer import Transformer
from nkat.measure.perplexity import DEFAULT_BATCH, PairedChange, Perplexity, paired, score_chunks
from nkat.measure.speed import PairedOverhead, paired_overhead
from nkat.measure.tpe import byte_ratio, tpe
from nkat.theta.algebra import Theta
from nkat.theta.set import ThetaSet, scale_by_depth, truncate_rank

RANKS = (2, 4, 6, 8)
GAMMA_RANGE = (0.90, 0.99)
GAMMA_STEP = 0.01
# Layer groups as patterns of weight names, which `--selective-layers` of the converter takes too.
GROUPS = {
    "attention": ("blk.*.attn_*.weight",),
    "ffn": ("blk.*.ffn_*.weight",),
    "both": ("blk.*.attn_*.weight", "blk.*.ffn_*.weight"),
}
GUIDE_DEFAULT = {"rank": 4, "gamma": 0.97, "layers": "both", "depth_decay": False}
BASE = "base"  # the user attribute that marks the trial of the model without Θ
_OVERHEAD_STEPS = 8  # decoded tokens of one block when the overhead is measured
_GROUP = DEFAULT_BATCH  # chunks scored between two looks at the evidence: one forward pass


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of the space. None of it: the model without Θ."""

    rank: int
    gamma: float
    layers: str
    depth_decay: bool

    def parameters(self) -> dict[str, Any]:
        return {"rank": self.rank, "gamma": self.gamma, "layers": self.layers, "depth_decay": self.depth_decay}


@dataclass(frozen=True, slots=True)
class Space:
    """What may vary: everything, or all but a fixed rank or γ."""

    ranks: tuple[int, ...] = RANKS
    gamma: float | None = None

    def suggest(self, trial: optuna.Trial) -> Setting:
        rank = trial.suggest_categorical("rank", self.ranks)
        low, high = GAMMA_RANGE if self.gamma is None else (self.gamma, self.gamma)
        gamma = trial.suggest_float("gamma", low, high, step=GAMMA_STEP)
        layers = trial.suggest_categorical("layers", tuple(GROUPS))
        depth_decay = trial.suggest_categorical("depth_decay", (False, True))
        return Setting(rank, round(gamma, 6), layers, depth_decay)

    def guide_default(self) -> dict[str, Any]:
        """The guide's default, as far as the fixed values allow it."""
        default = dict(GUIDE_DEFAULT)
        if default["rank"] not in self.ranks:
            default["rank"] = self.ranks[0]
        if self.gamma is not None:
            default["gamma"] = self.gamma
        return default


def apply_setting(theta_set: ThetaSet, setting: Setting) -> ThetaSet:
    """Θ of the highest rank → the Θ of one setting, as it would be written."""
    patterns = GROUPS[setting.layers]
    kept = {n: theta for n, theta in theta_set.layers.items() if any(fnmatchcase(n, p) for p in patterns)}
    cut = truncate_rank(replace(theta_set, layers=kept, gamma=setting.gamma), setting.rank)
    return scale_by_depth(cut, setting.gamma) if setting.depth_decay else cut


@dataclass(slots=True)
class Judge:
    """Scores settings on one set of chunks, against the model without Θ on the same chunks.

    chunks: int64 [C, context]; the order of scoring is shuffled by `seed`
    """

    loaded: LoadedModel
    theta_set: ThetaSet
    chunks: torch.Tensor
    seed: int = 0
    base_nll: torch.Tensor | None = field(default=None, init=False)
    measured: dict[Setting, Perplexity] = field(default_factory=dict, init=False)  # samplers do repeat themselves

    def order(self) -> list[int]:
        order = list(range(len(self.chunks)))
        random.Random(self.seed).shuffle(order)
        return order

    def base(self) -> Perplexity:
        """The model without Θ, measured once."""
        if self.base_nll is None:
            self.loaded.model.set_gamma(None)
            self.base_nll = score_chunks(self.loaded.model, self.chunks[self.order()])
        return Perplexity(self.base_nll)

    def measure(self, setting: Setting, on_chunk: Callable[[int, float], bool] | None = None) -> Perplexity | None:
        """A setting's perplexity on the chunks in `order`; None when `on_chunk` said to stop.

        on_chunk: called with each chunk's number and its ln TPE; True ends the measurement
        """
        known = self.measured.get(setting)
        chosen = self.apply(setting)
        ratio = self.ratio(chosen)
        model = self.loaded.model
        model.set_thetas(chosen.layers)
        model.set_gamma(setting.gamma)
        order, parts = self.order(), []
        for start in range(0, len(order), _GROUP):
            group = order[start : start + _GROUP]
            if known is None:
                nll = score_chunks(model, self.chunks[group], batch=_GROUP)
            else:
                nll = known.nll[start : start + _GROUP]
            parts.append(nll)
            if on_chunk is None:
                continue
            stop = [on_chunk(chunk, log_tpe(float(row.mean()), ratio)) for chunk, row in zip(group, nll, strict=True)]
            if stop[-1] and start + _GROUP < len(order):
                return None
        self.measured[setting] = Perplexity(torch.cat(parts))
        return self.measured[setting]

    def apply(self, setting: Setting) -> ThetaSet:
        return apply_setting(self.theta_set, setting)

    def ratio(self, chosen: ThetaSet) -> float:
        """c: bytes read per token with Θ over without."""
        return byte_ratio(self.loaded.tensors, chosen.nbytes)

    def change(self, measured: Perplexity) -> PairedChange:
        return paired(self.base(), measured)


def make_pruner() -> optuna.pruners.BasePruner:
    """Stops a trial that is worse than the best on the same chunks at p < 0.1 (Wilcoxon's signed-rank test)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # so marked since version 3.6
        return optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=3)


def log_tpe(nll: float, ratio: float) -> float:
    """ln TPE from a mean NLL: what averages over chunks to the score of them all."""
    return -nll - math.log(math.log10(10.0 * ratio))


@dataclass(slots=True)
class OverheadLimit:
    """A constraint of the trials: what Θ may cost in decoding, in per cent of the time without.

    model: loaded to decode as fast as it can, so that Θ's share of the time is what users will see
    prompt: decoding is timed behind it, int64 [T]
    """

    percent: float
    model: Transformer
    prompt: torch.Tensor
    measured: dict[tuple[int, str], PairedOverhead] = field(default_factory=dict, init=False)

    def cost(self, setting: Setting, thetas: Mapping[str, Theta]) -> PairedOverhead:
        """Measured once for each rank and choice of layers: γ and the decay do not change the work."""
        key = setting.rank, setting.layers
        if key not in self.measured:
            self.model.set_thetas(thetas)
            decoder = make_decoder(self.model, len(self.prompt) + _OVERHEAD_STEPS)
            prompt = self.prompt.tolist()
            self.measured[key] = paired_overhead(decoder, prompt, setting.gamma, blocks=12, steps=_OVERHEAD_STEPS)
        return self.measured[key]


def make_objective(judge: Judge, space: Space, limit: OverheadLimit | None = None) -> Callable[[optuna.Trial], float]:
    """TPE of a trial's setting on the judge's chunks."""

    def objective(trial: optuna.Trial) -> float:
        base = judge.base()
        if trial.user_attrs.get(BASE):
            for chunk, nll in zip(judge.order(), base.chunk_nll.tolist(), strict=True):
                trial.report(log_tpe(nll, 1.0), chunk)
            return _record(trial, base, None, None, judge)
        setting = space.suggest(trial)
        if limit is not None:
            cost = limit.cost(setting, judge.apply(setting).layers)
            trial.set_user_attr("overhead_percent", cost.percent)
            trial.set_user_attr("overhead_range", cost.spread)
            trial.set_constraint("overhead", cost.percent - limit.percent)

        def on_chunk(chunk: int, value: float) -> bool:
            trial.report(value, chunk)
            return trial.should_prune()

        measured = judge.measure(setting, on_chunk)
        if measured is None:
            raise optuna.TrialPruned
        return _record(trial, measured, setting, judge.apply(setting), judge)

    return objective


def _record(
    trial: optuna.Trial, measured: Perplexity, setting: Setting | None, chosen: ThetaSet | None, judge: Judge
) -> float:
    row = summary(judge, measured, setting, chosen)
    for key, value in row.items():
        trial.set_user_attr(key, value)
    return row["tpe"]


def summary(judge: Judge, measured: Perplexity, setting: Setting | None, chosen: ThetaSet | None) -> dict[str, Any]:
    """What is reported of a measurement: perplexity ±, paired change ±, bytes and TPE."""
    change = judge.change(measured)
    ratio = 1.0 if chosen is None else judge.ratio(chosen)
    return {
        "perplexity": measured.ppl,
        "perplexity_stderr": measured.stderr,
        "change_percent": change.percent,
        "change_percent_stderr": change.percent_stderr,
        "chunks": measured.chunks,
        "theta_bytes": 0 if chosen is None else chosen.nbytes,
        "byte_ratio": ratio,
        "tpe": tpe(measured.ppl, ratio),
        **({} if setting is None else {"setting": setting.parameters()}),
    }
