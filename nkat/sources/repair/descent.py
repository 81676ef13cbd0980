"""Scales by gradient descent: every stored scale of the chosen weights, on another model's predictions or on a text.

The loss is the divergence from a better copy of the model (KL), the text's next token, or a mixture, as for Θ. Every
step runs on the bytes that a file would have; so does the validation, which decides whose step's scales are kept: by
the divergence where there is a better copy, which is steadier than the text's own tokens, else by those.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.host.distributed import World
from nkat.lm.transformer import Transformer
from nkat.measure.judge import Passages
from nkat.measure.perplexity import scored_tokens
from nkat.sources.fit.data import FitText, batch_at
from nkat.sources.fit.descent import HeadedModel, Progress, anywhere, take_step, warm_cosine
from nkat.sources.fit.layers import stand_ins
from nkat.sources.fit.loss import Teacher, vocabulary_loss
from nkat.sources.fit.state import FitState
from nkat.sources.repair.layers import RepairedLinear, no_change

_BETAS = (0.9, 0.99)
_EPSILON = 1e-12  # of Adam: a block's part of the gradient is small, the smaller the larger the model
START = "file"  # the name of the start from the scales that are there


@dataclass(frozen=True, slots=True)
class RepairSettings:
    """How a repair goes; the fields are flags of the converter, the defaults were found by experiment.

    learning_rate: highest change of a scale in a step, relative to it
    batch: sequences of `context` tokens in a step, per process;  warmup: steps until the learning rate is reached
    reference_share: of the better copy's prediction in what is learned, 0 to 1; the rest is the text's own next token
    patience: validations without a better one before the repair ends; 0: never
    """

    seed: int = 0
    steps: int = 60
    batch: int = 4
    context: int = 256
    learning_rate: float = 3e-3
    warmup: int = 5
    clip: float = 1.0
    reference_share: float = 0.0
    validate_every: int = 20
    patience: int = 0

    def learning_rate_at(self, step: int) -> float:
        return warm_cosine(step, self.steps, self.warmup, self.learning_rate)


@dataclass(frozen=True, slots=True)
class Validation:
    """What the validation slice says, in nats a token: of the text itself, and of the better copy's predictions."""

    nll: float
    divergence: float | None

    @property
    def objective(self) -> float:
        """What is to be low."""
        return self.nll if self.divergence is None else self.divergence

    def row(self) -> dict[str, float]:
        """For the state's history."""
        row = {"validation_nll": self.nll}
        return row if self.divergence is None else {**row, "validation_kl": self.divergence}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Validation:
        """What `row` gave."""
        return cls(row["validation_nll"], row.get("validation_kl"))


def repair(
    model: Transformer,
    names: Sequence[str],
    text: FitText,
    validation: Passages,
    settings: RepairSettings,
    progress: Progress,
    *,
    reference: Transformer | None = None,
    starts: Mapping[str, Sequence[torch.Tensor]] | None = None,
    state: FitState | None = None,
    world: World | None = None,
    keep_activations: bool = False,
) -> tuple[Validation, FitState]:
    """Learns the scales of the named weights, from the best start or from where `state` is.

    keep_activations: for the backward pass, instead of computing them again (`nkat.sources.fit.room`)
    starts: other places to begin at than the file's own scales: c of each weight's stored scales (`RepairedLinear`)
    Returns what the validation says of the file as it is, and the state after the last step: its factors are c as
    above, its best_* those of the step with the lowest validation, 0 for the start; its history has a row for each
    validation. Raises NKATError when the loss is not finite.
    """
    world = world or World(0, 1, model.device)
    teacher = None if reference is None else HeadedModel.of(reference)
    run = _Run(names, HeadedModel.of(model), teacher, text, validation, settings, progress, world, keep_activations)
    before = run.validate()
    return before, run.advance(run.begin(before, starts or {}) if state is None else state)


@dataclass(frozen=True, slots=True)
class _Run:
    names: Sequence[str]
    student: HeadedModel
    reference: HeadedModel | None
    text: FitText
    validation: Passages
    settings: RepairSettings
    progress: Progress
    world: World
    keep_activations: bool
    taught: list[torch.Tensor] = field(default_factory=list)  # the reference's hidden states on the validation slice

    def begin(self, before: Validation, starts: Mapping[str, Sequence[torch.Tensor]]) -> FitState:
        """The state at the start with the lowest validation."""
        tried = {START: (before, no_change(self.student.model.star_linears(), self.names))}
        for name, start in starts.items():
            with self.learned(start):
                tried[name] = self.validate(), list(start)
        name = min(tried, key=lambda name: tried[name][0].objective)
        found, start = tried[name]
        row = {"step": 0, "loss": found.objective, **found.row()}
        kept = [change.clone() for change in start]
        return FitState(name, 0, start, best_step=0, best_nll=found.nll, best_factors=kept, history=[row])

    @contextlib.contextmanager
    def learned(self, changes: Sequence[torch.Tensor]) -> Iterator[list[RepairedLinear]]:
        """The model with layers whose scales are changed and can be learned."""
        layers = self.student.model.star_linears()
        learned = {n: RepairedLinear(layers[n], c) for n, c in zip(self.names, changes, strict=True)}
        with stand_ins(self.student.model, learned):
            yield list(learned.values())

    def advance(self, state: FitState) -> FitState:
        """Steps from where the state is to the end."""
        settings = self.settings
        with self.learned(state.factors) as layers:
            parameters = [layer.change for layer in layers]
            optimizer = torch.optim.Adam(parameters, betas=_BETAS, eps=_EPSILON, fused=True)
            if state.optimizer:  # the rates and the like are those of the settings
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state.optimizer["state"]})
            began = time.monotonic() - state.seconds
            rows = {row["step"]: Validation.of(row).objective for row in state.history}
            best_step = state.best_step or 0
            best, without_gain = rows[best_step], sum(step > best_step for step in rows)
            for step in range(state.step, settings.steps):
                loss = self.step(step, parameters, optimizer)
                for layer in layers:
                    layer.put()
                state.step = step + 1
                stopping = anywhere(self.world, self.progress.stop(), self.student.model.device)
                if stopping or state.step % settings.validate_every == 0 or state.step == settings.steps:
                    found = self.validate()
                    without_gain += 1
                    if found.objective < best:
                        best, without_gain = found.objective, 0
                        state.best_step, state.best_nll = state.step, found.nll
                        state.best_factors = [parameter.detach().clone() for parameter in parameters]
                    state.history.append({"step": state.step, "loss": loss, **found.row()})
                state.factors = [parameter.detach() for parameter in parameters]
                state.optimizer = optimizer.state_dict()
                state.seconds = time.monotonic() - began
                self.progress.step(state, loss)
                if stopping or (settings.patience and without_gain >= settings.patience):
                    break
        return state

    def step(self, step: int, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
        """One step of gradient descent; returns its loss in nats a token, over all processes."""
        loss = self.learn(step)
        rate = self.settings.learning_rate_at(step)
        if not take_step(parameters, optimizer, loss, rate, self.settings.clip, self.world):
            raise self.not_finite(f"the loss at step {step + 1}")
        return float(loss)

    def learn(self, step: int) -> torch.Tensor:
        """Adds the gradients of a step's loss; returns this process's part of it."""
        settings = self.settings
        first = (step * self.world.size + self.world.rank) * settings.batch
        batch = batch_at(self.text, first, settings.batch, settings.context, settings.seed)
        tokens, counted = batch.tokens.to(self.student.model.device), batch.counted.to(self.student.model.device)
        teacher = None
        if self.reference is not None and settings.reference_share > 0.0:
            teacher = self.reference.teach(tokens, counted, settings.reference_share)
        count = counted.sum(dtype=torch.float64)
        self.world.sum_([count])  # of all processes: the mean is over every token that counts
        hidden = self.student.model.hidden(tokens, learning=True, recompute=not self.keep_activations)[:, :-1][counted]
        loss = vocabulary_loss(hidden, self.student.output, tokens[:, 1:][counted], teacher) / count
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> Validation:
        """Of the model as it stands, over all processes."""
        mine = self.validation.pick(slice(self.world.rank, None, self.world.size))
        total = torch.zeros(3, dtype=torch.float64, device=self.student.model.device)
        student, reference = self.student, self.reference
        for place, (chunk, counted) in enumerate(_chunks(mine)):
            hidden, targets = _scored(student.model, chunk, counted)
            total[0] += vocabulary_loss(hidden, student.output, targets)
            total[1] += len(targets)
            if reference is not None:
                if place == len(self.taught):
                    self.taught.append(_scored(reference.model, chunk, counted)[0])
                teacher = Teacher(self.taught[place], reference.output)
                total[2] += vocabulary_loss(hidden, student.output, None, teacher)
        self.world.sum_([total])
        if not bool(torch.isfinite(total).all()):
            raise self.not_finite("the loss on the part of the text that is kept back")
        nll, divergence = float(total[0] / total[1]), float(total[2] / total[1])
        return Validation(nll, None if reference is None else divergence)

    def not_finite(self, what: str) -> NKATError:
        return NKATError(
            f"{what} is not a finite number: the file is damaged, or a learning rate below "
            f"{self.settings.learning_rate:g} helps; nothing was written"
        )


def _chunks(passages: Passages) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four chunks [4, context] and which of their scored tokens count, at a time."""
    counted = passages.counted
    if not len(passages.chunks):  # of one process among more than there are chunks
        return []
    if counted is None:
        counted = torch.ones(len(passages.chunks), scored_tokens(passages.chunks.shape[1]), dtype=torch.bool)
    return list(zip(passages.chunks.split(4), counted.split(4), strict=True))


def _scored(model: Transformer, chunk: torch.Tensor, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [N, d] before the tokens that count, and those tokens [N]."""
    chunk, counted = chunk.to(model.device), counted.to(model.device)
    scored = counted.shape[1]
    return model.hidden(chunk)[:, :-1][:, -scored:][counted], chunk[:, -scored:][counted]


def divergence_won_back(before: Validation, after: Validation) -> float | None:
    """The share of the divergence from the better copy that is gone; None without one, or where there was none."""
    if before.divergence is None or after.divergence is None or before.divergence <= 0.0:
        return None
    return 1.0 - after.divergence / before.divergence
