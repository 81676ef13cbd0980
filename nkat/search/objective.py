"""The search over a language model's Θ: rank, γ, adapted layers and decay by depth, scored by measured TPE.

One Θ of the highest rank is made once. A trial takes its first columns, scales them and leaves layers out, so it costs
a perplexity run and nothing else. Chunks are scored in a shuffled order and reported one by one: a trial that is worse
than the best on the same chunks beyond doubt (Wilcoxon's signed-rank test) ends early.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import optuna
import torch

from nkat.engine.decoder import make_decoder
from nkat.lm.transformer import Transformer
from nkat.measure.judge import Judge, Score
from nkat.measure.perplexity import DEFAULT_BATCH, Perplexity, paired
from nkat.measure.speed import PairedOverhead, paired_overhead
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

    def points(self) -> Iterator[dict[str, Any]]:
        """The parameters of every setting."""
        low, high = GAMMA_RANGE
        steps = round((high - low) / GAMMA_STEP)
        gammas = [round(low + i * GAMMA_STEP, 6) for i in range(steps + 1)] if self.gamma is None else [self.gamma]
        for rank, gamma, layers, decay in itertools.product(self.ranks, gammas, GROUPS, (False, True)):
            yield Setting(rank, gamma, layers, decay).parameters()

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


class SettingJudge:
    """Scores settings on a judge's chunks in an order shuffled by `seed`, each beside the model without Θ.

    theta_set: Θ of the highest rank, which settings cut and scale
    """

    def __init__(self, judge: Judge, theta_set: ThetaSet, seed: int = 0) -> None:
        self.order = list(range(len(judge.passages.chunks)))
        random.Random(seed).shuffle(self.order)
        self.judge = Judge(judge.loaded, judge.passages.pick(self.order), batch=_GROUP)
        self.theta_set = theta_set

    def base(self) -> Score:
        """The model without Θ, measured once."""
        self.judge.without(progress=None)
        return self.judge.base()

    def measure(self, setting: Setting, on_chunk: Callable[[int, float], bool] | None = None) -> Score | None:
        """A setting's score on the chunks in `order`; None when `on_chunk` said to stop.

        on_chunk: called with each chunk's number and its ln TPE; True ends the measurement
        """
        base = self.base()
        chosen = self.apply(setting)
        ratio = self.judge.ratio(chosen)
        self.judge.put_on(chosen)
        parts = []
        for start in range(0, len(self.order), _GROUP):
            group = slice(start, start + _GROUP)
            nll = self.judge.passages.pick(group).score(self.judge.loaded.model, batch=_GROUP)
            parts.append(nll)
            if on_chunk is None:
                continue
            values = [log_tpe(float(row.mean()), ratio) for row in nll]
            stop = [on_chunk(chunk, value) for chunk, value in zip(self.order[group], values, strict=True)]
            if stop[-1] and start + _GROUP < len(self.order):
                return None
        measured = Perplexity(torch.cat(parts), self.judge.passages.chunks.shape[1])
        return Score(measured, paired(base.perplexity, measured), ratio)

    def score(self, setting: Setting) -> Score:
        """The same to the end, whatever it shows."""
        found = self.measure(setting)
        assert found is not None  # nothing asked to stop
        return found

    def apply(self, setting: Setting) -> ThetaSet:
        return apply_setting(self.theta_set, setting)


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


def make_objective(
    judge: SettingJudge, space: Space, limit: OverheadLimit | None = None
) -> Callable[[optuna.Trial], float]:
    """TPE of a trial's setting on the judge's chunks."""

    def objective(trial: optuna.Trial) -> float:
        base = judge.base()
        if trial.user_attrs.get(BASE):
            for chunk, nll in zip(judge.order, base.perplexity.chunk_nll.tolist(), strict=True):
                trial.report(log_tpe(nll, 1.0), chunk)
            return _record(trial, summary(base))
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
        return _record(trial, summary(measured, setting, judge.apply(setting)))

    return objective


def _record(trial: optuna.Trial, row: Mapping[str, Any]) -> float:
    for key, value in row.items():
        trial.set_user_attr(key, value)
    return row["tpe"]


def summary(score: Score, setting: Setting | None = None, chosen: ThetaSet | None = None) -> dict[str, Any]:
    """What is reported of a measurement: perplexity ±, paired change ±, bytes and TPE."""
    return {
        **score.record(),
        "chunks": score.perplexity.chunks,
        "theta_bytes": 0 if chosen is None else chosen.nbytes,
        **({} if setting is None else {"setting": setting.parameters()}),
    }
