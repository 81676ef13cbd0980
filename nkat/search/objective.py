"""The search over a language model's Θ: rank, γ, adapted layers and decay by depth, scored by measured TPE.

One Θ of the highest rank is made once. A trial takes its first columns, scales them and leaves layers out, so it costs
a perplexity run and nothing else. Chunks are scored in a shuffled order and reported one by one: a trial that is worse
than the best on the same chunks beyond doubt (Wilcoxon's signed-rank test) ends early. A learned Θ is also judged on
the guard's texts: a trial that is worse there than allowed breaks a constraint, and the best is one that breaks none.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import optuna
import torch

from nkat.engine.decoder import make_decoder
from nkat.lm.transformer import Transformer
from nkat.measure.guard import Guard
from nkat.measure.judge import Judge, Score
from nkat.measure.perplexity import DEFAULT_BATCH, paired
from nkat.measure.speed import PairedOverhead, paired_overhead
from nkat.theta.algebra import Theta
from nkat.theta.set import ThetaSet, part_of

RANKS = (2, 4, 6, 8)
GAMMAS = (0.90, 0.99, 0.01)  # lowest, highest, step
# A learned Θ has the strength it was learned for at one γ. Stronger is ruin soon, and weaker costs less elsewhere.
LEARNED_GAMMAS = (0.95, 0.995, 0.005)
# Layer groups as patterns of weight names, which `--selective-layers` of the converter takes too.
GROUPS = {
    "attention": ("blk.*.attn_*.weight", "blk.*.ssm_*.weight"),  # or what stands in its place
    "ffn": ("blk.*.ffn_*.weight",),
    "both": ("blk.*.attn_*.weight", "blk.*.ssm_*.weight", "blk.*.ffn_*.weight"),
}
GUIDE_DEFAULT = {"rank": 4, "gamma": 0.97, "layers": "both", "depth_decay": False}
BASE = "base"  # the user attribute that marks the trial of the model without Θ
GUARD = "guard"  # the constraint, and the user attribute with the prices
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
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Space:
    """What may vary: everything, or all but a fixed rank or γ.

    gammas: lowest, highest and step of γ;  learned: first tried is what is known to be good of a Θ that was learned
    """

    ranks: tuple[int, ...] = RANKS
    gamma: float | None = None
    gammas: tuple[float, float, float] = GAMMAS
    learned: bool = False

    @classmethod
    def of_learned(cls, ranks: tuple[int, ...], gamma: float | None) -> Space:
        return cls(ranks, gamma, LEARNED_GAMMAS, learned=True)

    def suggest(self, trial: optuna.Trial) -> Setting:
        rank = trial.suggest_categorical("rank", self.ranks)
        low, high, step = self.gammas if self.gamma is None else (self.gamma, self.gamma, self.gammas[2])
        gamma = trial.suggest_float("gamma", low, high, step=step)
        layers = trial.suggest_categorical("layers", tuple(GROUPS))
        depth_decay = trial.suggest_categorical("depth_decay", (False, True))
        return Setting(rank, round(gamma, 6), layers, depth_decay)

    def points(self) -> Iterator[dict[str, Any]]:
        """The parameters of every setting."""
        low, high, step = self.gammas
        count = round((high - low) / step) + 1
        gammas = [round(low + i * step, 6) for i in range(count)] if self.gamma is None else [self.gamma]
        for rank, gamma, layers, decay in itertools.product(self.ranks, gammas, GROUPS, (False, True)):
            yield Setting(rank, gamma, layers, decay).parameters()

    def edge(self, gamma: float) -> str | None:
        """Which end of γ's range this is, "lowest" or "highest", where γ is searched."""
        if self.gamma is not None:
            return None
        return {self.gammas[0]: "lowest", self.gammas[1]: "highest"}.get(gamma)

    def guide_default(self) -> dict[str, Any]:
        """The guide's default, as far as the fixed values allow it."""
        return self._allowed(GUIDE_DEFAULT)

    def first(self) -> list[dict[str, Any]]:
        """The parameters to try before the sampler's own: the guide's default, and of a learned Θ what is weaker.

        A notch or two weaker, or with fewer columns, most of a learned Θ's gain is left and little of its price.
        """
        more = [{"gamma": 0.98}, {"gamma": 0.99}, {"rank": 2, "gamma": 0.98}] if self.learned else []
        points = [self._allowed({**GUIDE_DEFAULT, **changes}) for changes in ({}, *more)]
        return [point for i, point in enumerate(points) if point not in points[:i]]

    def _allowed(self, point: Mapping[str, Any]) -> dict[str, Any]:
        rank = point["rank"] if point["rank"] in self.ranks else self.ranks[0]
        return {**point, "rank": rank, "gamma": point["gamma"] if self.gamma is None else self.gamma}


def patterns_of(layers: str, names: Iterable[str]) -> list[str]:
    """Those of a group that some of a model's layers match: the converter refuses others."""
    known = list(names)
    return [pattern for pattern in GROUPS[layers] if any(fnmatchcase(name, pattern) for name in known)]


def apply_setting(theta_set: ThetaSet, setting: Setting) -> ThetaSet:
    """Θ of the highest rank → the Θ of one setting, as it would be written."""
    names = [n for n in theta_set.layers if any(fnmatchcase(n, p) for p in GROUPS[setting.layers])]
    return part_of(theta_set, rank=setting.rank, gamma=setting.gamma, names=names, depth_decay=setting.depth_decay)


class SettingJudge:
    """Scores settings on a judge's chunks in an order shuffled by `seed`, each beside the model without Θ.

    theta_set: Θ of the highest rank, which settings cut and scale
    """

    def __init__(self, judge: Judge, theta_set: ThetaSet, seed: int = 0) -> None:
        self.order = list(range(len(judge.passages.chunks)))
        random.Random(seed).shuffle(self.order)
        self.judge = Judge(judge.loaded, judge.passages.pick(self.order), batch=_GROUP, make=judge.make)
        self.theta_set = theta_set
        self._layers: dict[tuple[int, str, float], dict[str, Theta]] = {}

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
            rows = self.judge.rows(group)
            parts += rows
            if on_chunk is None:
                continue
            pairs = [(chunk, row) for chunk, row in zip(self.order[group], rows, strict=True) if len(row)]
            stop = [on_chunk(chunk, log_tpe(float(row.mean()), ratio)) for chunk, row in pairs]
            if stop and stop[-1] and start + _GROUP < len(self.order):
                return None
        measured = self.judge.whole(parts)
        return Score(measured, paired(base.perplexity, measured), ratio)

    def score(self, setting: Setting) -> Score:
        """The same to the end, whatever it shows."""
        found = self.measure(setting)
        assert found is not None  # nothing asked to stop
        return found

    def apply(self, setting: Setting) -> ThetaSet:
        """The setting's Θ: at another strength the very same one, so that what was made for it is not made again."""
        chosen = apply_setting(self.theta_set, setting)
        key = setting.rank, setting.layers, setting.gamma if setting.depth_decay else 1.0
        return replace(chosen, layers=self._layers.setdefault(key, chosen.layers))


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
    judge: SettingJudge, space: Space, limit: OverheadLimit | None = None, guard: Guard | None = None
) -> Callable[[optuna.Trial], float]:
    """TPE of a trial's setting on the judge's chunks. guard: asked about a setting that is better there than no Θ"""

    def objective(trial: optuna.Trial) -> float:
        base = judge.base()
        if trial.user_attrs.get(BASE):
            for chunk, row in zip(judge.order, judge.judge.passages.by_chunk(base.perplexity.nll), strict=True):
                if len(row):
                    trial.report(log_tpe(float(row.mean()), 1.0), chunk)
            return _record(trial, summary(base, len(judge.order)))
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
        chosen = judge.apply(setting)
        if guard is not None and measured.tpe > base.tpe:
            verdict = guard.judge(chosen, progress=None)
            trial.set_user_attr(GUARD, verdict.record())
            trial.set_constraint(GUARD, verdict.worst.bound - math.log1p(verdict.limit))
        return _record(trial, summary(measured, len(judge.order), setting, chosen))

    return objective


def _record(trial: optuna.Trial, row: Mapping[str, Any]) -> float:
    for key, value in row.items():
        trial.set_user_attr(key, value)
    return row["tpe"]


def summary(
    score: Score, chunks: int, setting: Setting | None = None, chosen: ThetaSet | None = None
) -> dict[str, Any]:
    """What is reported of a measurement on so many chunks: perplexity ±, paired change ±, bytes and TPE."""
    return {
        **score.record(),
        "chunks": chunks,
        "theta_bytes": 0 if chosen is None else chosen.nbytes,
        **({} if setting is None else {"setting": setting.parameters()}),
    }
