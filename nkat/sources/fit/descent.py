"""Θ by gradient descent: P and Q of every adapted layer learned through the frozen packed weights.

The loss is the text's next token, or another model's prediction of it (KL), or a mixture; a second text can hold the
model to its own unmodified predictions there. What is learned is the product κ(γ₀)Θ, so γ₀ only divides the result.

Each sequence of a batch may see only the first columns of P and Q (`nested`): the first r columns of the result then
are a good Θ of rank r (Kusupati et al., 2022, "Matryoshka Representation Learning", arXiv 2205.13147). In the last
steps the factors act as INT8 will have them. A validation slice says which step's factors are best; some others are
kept beside them, as what is best at home need not be what costs least elsewhere (`nkat.sources.fit.choice`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nkat.errors import NKATError
from nkat.host.distributed import World
from nkat.lm.transformer import Transformer
from nkat.measure.judge import Passages
from nkat.sources.fit.data import Batch, FitText, batch_at
from nkat.sources.fit.layers import Factors, FittedLinear, MakeLayer, ThetaMode, fitted_layers
from nkat.sources.fit.loss import Head, Teacher, vocabulary_loss
from nkat.sources.fit.state import FitState
from nkat.theta.algebra import Theta, coupling, quantise_factors

_BETAS = (0.9, 0.99)  # of AdamW: a fit has few steps, so its second moments must settle in fewer than the usual 1000
_ZERO_START = 0.02  # standard deviation of P where Q starts at zero
_SNAPSHOTS = 3  # of a whole fit, evenly spaced


def warm_cosine(step: int, steps: int, warmup: int, highest: float) -> float:
    """The learning rate of a step: it rises over `warmup` of them, then falls to zero along a cosine."""
    return highest * min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How a fit goes. Every field is a flag of the converter; the defaults were found by experiment.

    batch: sequences of `context` tokens in a step, per process
    warmup: steps in which the learning rate rises to its value; then it falls to zero along a cosine
    int8_share: share of the steps, the last ones, in which the factors act rounded
    reference_share: of the reference model's prediction in the loss's target, 0 to 1
    keep_weight: of the divergence from the unmodified model on the second text; keep_batch: sequences of it in a step
    scaled: `run_fit` scales the learning rate to the model's weights, see `nkat.sources.fit.rate`
    start_steps: with several starts, after how many steps the validation slice chooses the one that goes on
    patience: validations without a better one before the fit ends; 0: never
    """

    rank: int
    gamma: float
    seed: int = 0
    steps: int = 60
    batch: int = 4
    context: int = 256
    learning_rate: float = 3e-3
    scaled: bool = False
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float = 1.0
    int8_share: float = 0.2
    nested: bool = True
    reference_share: float = 0.0
    keep_weight: float = 4.0
    keep_batch: int = 2
    start_steps: int = 20
    validate_every: int = 20
    patience: int = 0

    def learning_rate_at(self, step: int) -> float:
        return warm_cosine(step, self.steps, self.warmup, self.learning_rate)

    def rounds_at(self, step: int) -> bool:
        return step >= self.steps * (1.0 - self.int8_share)

    def keeps_at(self, step: int) -> bool:
        """Whether the factors after so many steps are kept to choose from."""
        return step in {math.ceil(self.steps * part / _SNAPSHOTS) for part in range(1, _SNAPSHOTS + 1)}


@dataclass(frozen=True, slots=True)
class FitData:
    """text: to learn from;  validation: a part of it, kept back, to look at while learning

    keep: a text on which to change nothing
    """

    text: FitText
    validation: Passages
    keep: FitText | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What the caller is told and asked after each step.

    step: gets the state, None while the starts are tried, and the step's loss
    stop: True ends the fit as if this step were its last, in all processes
    """

    step: Callable[[FitState | None, float], None]
    stop: Callable[[], bool]


def zero_start(shapes: Sequence[tuple[int, int]], rank: int, seed: int, scale: float = 1.0) -> list[Factors]:
    """P random and Q zero for each m×n weight: Θ = 0, but no saddle of the loss as P = Q = 0 would be.

    scale: of P; what the learning rate is scaled with
    """
    generator = torch.Generator().manual_seed(seed)
    random = [scale * _ZERO_START * torch.randn(max(shape), rank, generator=generator) for shape in shapes]
    return [(p, torch.zeros_like(p)) for p in random]


def theta_start(thetas: Sequence[Theta], shapes: Sequence[tuple[int, int]], gamma: float) -> list[Factors]:
    """Factors of κ(γ)Θ from the Θ that another source made for each m×n weight."""
    root = math.sqrt(coupling(gamma))

    def padded(factor: torch.Tensor, rows: int) -> torch.Tensor:
        return root * torch.cat([factor, factor.new_zeros(rows - len(factor), factor.shape[1])])

    starts = []
    for theta, shape in zip(thetas, shapes, strict=True):
        p, q = theta.factors()
        starts.append((padded(p, max(shape)), padded(q, max(shape))))
    return starts


def by_name(names: Sequence[str], factors: Sequence[torch.Tensor]) -> dict[str, Factors]:
    """A state's list of factors (P, Q, P, Q, …) as pairs by weight name."""
    return dict(zip(names, zip(factors[::2], factors[1::2], strict=True), strict=True))


def to_thetas(factors: Mapping[str, Factors], gamma: float) -> dict[str, Theta]:
    """INT8 Θ whose κ(γ)Θ is what the factors say: their scales absorb 1/√κ."""
    root = math.sqrt(coupling(gamma))
    rounded = {name: quantise_factors(p.cpu(), q.cpu()) for name, (p, q) in factors.items()}
    return {name: Theta(theta.p, theta.q, theta.scale / root) for name, theta in rounded.items()}


def fit(
    model: Transformer,
    names: Sequence[str],
    starts: Mapping[str, Sequence[Factors]],
    data: FitData,
    settings: FitSettings,
    progress: Progress,
    *,
    reference: Transformer | None = None,
    validator: Transformer | None = None,
    state: FitState | None = None,
    world: World | None = None,
    kind: MakeLayer = FittedLinear,
    keep_activations: bool = False,
) -> FitState:
    """Learns factors for the named weights from one of `starts`, or goes on from `state`, which then needs none.

    starts: factors of each weight, in the order of `names`, under what the start is called
    validator: the same model once more, which gets the INT8 Θ where it is to be validated: on the CPU its kernels are
    several times faster than the model that is fitted, and exact; None: the model that is fitted validates itself
    kind: what is learned; benchmarks compare Θ with other low-rank terms
    keep_activations: for the backward pass, instead of computing them again (`nkat.sources.fit.room`)
    Returns the state after the last step; its best_* are the result. Raises NKATError when the loss is not finite.
    """
    teacher = None if reference is None else HeadedModel.of(reference)
    run = _Run(
        names,
        HeadedModel.of(model),
        teacher,
        data,
        settings,
        progress,
        world or World(0, 1, model.device),
        kind,
        validator,
        keep_activations,
    )
    if state is None:
        states = [FitState(name, 0, [f for pair in pairs for f in pair]) for name, pairs in starts.items()]
        state = states[0] if len(states) == 1 else run.choose(states)
    return run.advance(state, settings.steps)


@dataclass(frozen=True, slots=True)
class HeadedModel:
    """A model and its output layer, which is unpacked once for a whole descent."""

    model: Transformer
    output: Head

    @classmethod
    def of(cls, model: Transformer) -> HeadedModel:
        return cls(model, Head.of(model))

    @torch.no_grad()
    def teach(self, tokens: torch.Tensor, chosen: torch.Tensor, share: float) -> Teacher:
        """Its prediction at the chosen positions of tokens [B, T]: bool [B, T − 1]."""
        return Teacher(self.model.hidden(tokens, learning=True)[:, :-1][chosen], self.output, share)


def take_step(
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    rate: float,
    clip: float,
    world: World,
) -> bool:
    """A step along the gradients of all processes, whose losses are summed in place; False, and none, if not finite.

    rate: the learning rate;  clip: greatest norm of the gradient
    """
    world.sum_([parameter.grad for parameter in parameters if parameter.grad is not None])  # all of them have one
    world.sum_([loss])
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
        return False
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return True


def anywhere(world: World, here: bool, device: torch.device) -> bool:
    """Whether any process says so."""
    said = torch.tensor(float(here), device=device)
    world.sum_([said])
    return bool(said > 0)


@dataclass(frozen=True, slots=True)
class _Run:
    names: Sequence[str]
    student: HeadedModel
    reference: HeadedModel | None
    data: FitData
    settings: FitSettings
    progress: Progress
    world: World
    kind: MakeLayer
    validator: Transformer | None
    keep_activations: bool

    def choose(self, states: Sequence[FitState]) -> FitState:
        """The state with the lowest validation loss after the first steps, which each of them takes."""
        until = min(self.settings.start_steps, self.settings.steps)
        tried = [self.advance(state, until, trial=True) for state in states]
        return min(tried, key=lambda state: state.history[-1]["validation_nll"])

    def advance(self, state: FitState, until: int, *, trial: bool = False) -> FitState:
        """Steps from where the state is, with a validation at the end. A trial is neither saved nor stopped."""
        with fitted_layers(self.student.model, by_name(self.names, state.factors), self.kind) as (layers, mode):
            settings = self.settings
            parameters = [factor for layer in layers.values() for factor in (layer.p, layer.q)]
            optimizer = self.optimizer(parameters)
            if state.optimizer:  # the rates and the like are those of the settings
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state.optimizer["state"]})
            began = time.monotonic() - state.seconds
            without_gain = sum(row["step"] > (state.best_step or 0) for row in state.history)
            for step in range(state.step, until):
                loss = self.step(step, parameters, optimizer, mode)
                state.step = step + 1
                stopping = not trial and anywhere(self.world, self.progress.stop(), self.device)
                if stopping or state.step % settings.validate_every == 0 or state.step == until:
                    nll = self.validate(parameters, mode)
                    without_gain += 1
                    if state.best_nll is None or nll < state.best_nll:
                        state.best_step, state.best_nll, without_gain = state.step, nll, 0
                        state.best_factors = [parameter.detach().clone() for parameter in parameters]
                    state.history.append({"step": state.step, "loss": loss, "validation_nll": nll})
                state.factors = [parameter.detach() for parameter in parameters]
                if settings.keeps_at(state.step):
                    state.snapshots[state.step] = [parameter.detach().clone() for parameter in parameters]
                state.optimizer = optimizer.state_dict()
                state.seconds = time.monotonic() - began
                self.progress.step(None if trial else state, loss)
                if stopping or (settings.patience and without_gain >= settings.patience):
                    break
        return state

    def optimizer(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, betas=_BETAS, weight_decay=self.settings.weight_decay, fused=True)

    def step(
        self, step: int, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, mode: ThetaMode
    ) -> float:
        """One step of gradient descent; returns its loss in nats a token, over all processes."""
        settings, data = self.settings, self.data
        mode.rounded = settings.rounds_at(step)
        loss = self.learn(self.batch(data.text, step, settings.batch, mode), mode)
        if data.keep is not None:
            loss += self.hold(self.batch(data.keep, step, settings.keep_batch, mode), mode)
        mode.columns = None
        if not take_step(parameters, optimizer, loss, settings.learning_rate_at(step), settings.clip, self.world):
            raise self.diverged(f"at step {step + 1}")
        return float(loss)

    def batch(self, text: FitText, step: int, count: int, mode: ThetaMode) -> Batch:
        """This process's sequences of a step, on the model's device; `mode` gets the columns they see."""
        settings = self.settings
        first = (step * self.world.size + self.world.rank) * count
        if settings.nested:
            mode.columns = visible_columns(first, count, settings.rank, settings.seed).to(self.device)
        batch = batch_at(text, first, count, settings.context, settings.seed)
        return Batch(batch.tokens.to(self.device), batch.counted.to(self.device))

    def learn(self, batch: Batch, mode: ThetaMode) -> torch.Tensor:
        """Adds the gradients of the loss on the calibration text; returns this process's part of it."""
        tokens, counted = batch.tokens, batch.counted
        teacher = None
        if self.reference is not None and self.settings.reference_share > 0.0:
            teacher = self.reference.teach(tokens, counted, self.settings.reference_share)
        return self.backward(batch, tokens[:, 1:][counted], teacher, 1.0)

    def hold(self, batch: Batch, mode: ThetaMode) -> torch.Tensor:
        """Adds the gradients of the divergence from the unmodified model on the second text; returns its part."""
        mode.active = False
        unmodified = self.student.teach(batch.tokens, batch.counted, 1.0)
        mode.active = True
        return self.backward(batch, None, unmodified, self.settings.keep_weight)

    def backward(
        self, batch: Batch, targets: torch.Tensor | None, teacher: Teacher | None, factor: float
    ) -> torch.Tensor:
        count = batch.counted.sum(dtype=torch.float64)
        self.world.sum_([count])  # of all processes: the mean is over every token that counts
        hidden = self.student.model.hidden(batch.tokens, learning=True, recompute=not self.keep_activations)[:, :-1][
            batch.counted
        ]
        loss = factor * vocabulary_loss(hidden, self.student.output, targets, teacher) / count
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def validate(self, parameters: Sequence[torch.Tensor], mode: ThetaMode) -> float:
        """Mean −ln p on the validation slice with the factors as INT8 will have them."""
        rounded, mode.rounded = mode.rounded, True
        mine = slice(self.world.rank, None, self.world.size)
        part = self.data.validation.pick(mine)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        if len(part.chunks):
            nll = self.finite(part, parameters)
            total += torch.tensor([float(nll.sum()), nll.numel()], dtype=torch.float64, device=self.device)
        self.world.sum_([total])
        mode.rounded = rounded
        return float(total[0] / total[1])

    def finite(self, part: Passages, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        try:
            if self.validator is None:
                return part.score(self.student.model)
            self.validator.set_thetas(to_thetas(by_name(self.names, parameters), self.settings.gamma))
            self.validator.set_gamma(self.settings.gamma)
            return part.score(self.validator)
        except NKATError:
            raise self.diverged("on the validation slice") from None

    def diverged(self, where: str) -> NKATError:
        return NKATError(
            f"the loss is not a finite number {where}: a learning rate below {self.settings.learning_rate:g} may help; "
            "nothing was written"
        )

    @property
    def device(self) -> torch.device:
        return self.student.model.device


def visible_columns(first: int, count: int, rank: int, seed: int) -> torch.Tensor:
    """bool [count, r]: which columns sequence first + i sees. Every second one sees all, the others a random number."""
    columns = torch.empty(count, rank, dtype=torch.bool)
    for i in range(count):
        number = first + i
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        seen = rank if number % 2 == 0 else int(torch.randint(1, rank + 1, (1,), generator=generator))
        columns[i] = torch.arange(rank) < seen
    return columns
