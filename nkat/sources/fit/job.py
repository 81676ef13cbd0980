"""`--theta-source fit` from files to Θ: opens and checks the inputs, runs the fit, keeps its state, judges it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nkat.engine.scoring import KeptScorer
from nkat.errors import NKATError
from nkat.gguf.writer import MetadataValue
from nkat.host import console, hardware, interrupts
from nkat.host.console import counted, note
from nkat.host.distributed import World, join_world
from nkat.host.memory import memory
from nkat.lm.adapters import Adapter
from nkat.lm.load import DTYPES, LoadedModel, load_model
from nkat.measure.chats import conversations, is_chats
from nkat.measure.guard import Guard, GuardText, guard_texts
from nkat.measure.judge import Judge, Passages, Score, evenly
from nkat.measure.perplexity import DEFAULT_BATCH, PairedChange, text_bos
from nkat.measure.texts import Text
from nkat.sources.fit.choice import Choice, Judged, Panel, Space, choose
from nkat.sources.fit.data import Parts, batch_at, calibration_parts, chat_text, fit_text
from nkat.sources.fit.descent import FitData, FitSettings, Progress, by_name, fit, theta_start, to_thetas, zero_start
from nkat.sources.fit.layers import Factors, fitted_layers
from nkat.sources.fit.rate import rate_scale
from nkat.sources.fit.room import Kept, keep
from nkat.sources.fit.state import FitState, check_place, load_state, run_identity, save_state
from nkat.sources.lora import lora_starts, missed_record
from nkat.sources.make import check_reference_is_better, check_source, describe_theta_set, make_thetas
from nkat.sources.options import ThetaOptions
from nkat.theta.algebra import Theta, coupling
from nkat.theta.modelfile import base_hash
from nkat.theta.set import (
    CALIBRATION_KEY,
    GUARD_PREFIX,
    HELDOUT_PREFIX,
    KEEP_KEY,
    UNFINISHED_KEY,
    ThetaSet,
    truncate_rank,
)

_SAVE_SECONDS = 60.0
_LEARNING_CHUNKS = 6  # of the validation slice, looked at while learning: a twentieth of a fit's time


@dataclass(frozen=True, slots=True)
class FitRequest:
    """What is to be fitted, on what, and where an interrupted fit is kept.

    model: as the engine runs it, exact;  names: the weights that get a Θ
    reference: the same model at a higher precision;  keep: where to change nothing
    start_from: a LoRA whose nearest Θ is where the fit begins, in place of `start`
    start: "auto" or one of the starts;  precision: "auto", "float32" or "bfloat16"
    state: the file of a fit that is not yet written, None to keep none; `resume` goes on with it; see check_state
    fast: keep activations and unpacked weights in memory; None: what fits (`nkat.sources.fit.room`)
    space: from what rank, γ and step are chosen; None: the step is the best on validation, the rest as learned
    guard: texts beside the default ones on which the choice may cost little; None: no guard
    """

    model: LoadedModel
    base_sha256: str
    names: Sequence[str]
    settings: FitSettings
    calibrate: Text
    reference: LoadedModel | None
    keep: Text | None
    ignore: Sequence[str]
    start: str
    precision: str
    fast: bool | None
    state: Path | None
    resume: bool
    allow_cuda: bool
    space: Space | None = None
    guard: Sequence[Text] | None = None
    start_from: Adapter | None = None


@dataclass(frozen=True, slots=True)
class FitResult:
    """thetas: by weight name, and their γ;  notes: what a Θ file records;  record: for the report

    validation: the part of the calibration text that was kept back;  own: the part for the guard, if there is one
    writes: whether this process is the one to write files;  finished: False when it was interrupted
    """

    thetas: dict[str, Theta]
    gamma: float
    notes: dict[str, MetadataValue]
    record: dict[str, Any]
    validation: Passages
    own: Passages | None
    writes: bool
    finished: bool


def run_fit(request: FitRequest) -> FitResult:
    """Fits Θ. Raises NKATError for inputs that do not go together, and when no step beats Θ = 0 on validation."""
    text, keep = request.calibrate, request.keep
    if keep is not None and keep.sha256 == text.sha256:
        raise NKATError(f"{keep.name}: the text to keep and the text to learn from are the same text")
    _check_guard(request)
    check_source(request.model.tensors, request.names, "fit")
    if request.reference is not None:
        check_reference_is_better(request.model.gguf, request.reference.gguf, request.names)
    scale = rate_scale(request.model.model) if request.settings.scaled else 1.0
    rate = float(f"{scale * request.settings.learning_rate:.2g}")
    request = replace(request, settings=replace(request.settings, learning_rate=rate))
    with join_world(request.allow_cuda) as world:
        dtype = compute_dtype(request.precision, world.device)
        loaded = _working_copy(request, world.device, dtype)
        reference = None if request.reference is None else load_reference(request.reference, loaded)
        data, parts = _data(request, loaded, text, keep)
        guard = _guard(request, parts.own)  # what cannot guard is known before time is spent
        identity, hashes = _identity(request, text, keep, dtype)
        state = _interrupted_state(request, loaded, identity)
        starts, began = _starts(request, loaded, scale) if state is None else ({}, {})
        exact = _without_theta(request, world.device) if world.device.type == "cpu" else None
        kept = _keep(request, loaded, data, starts, state, world)
        state, finished = _run(request, loaded, reference, exact, data, starts, state, identity, world, kept)
    outcome = _best_at_home(request, state)
    if world.first:
        exact = exact or _without_theta(request, world.device)
        if request.space is None:
            outcome = replace(outcome, score=_judge(exact, _theta_set(request, outcome.thetas), parts.validation))
        else:
            outcome = _choose(request, exact, _judging(request, loaded), state, parts.validation, guard, finished)
    record = {
        "settings": asdict(request.settings),
        "start": state.start,
        "steps": state.step,
        "kept_step": outcome.step,
        "finished": finished,
        "precision": str(dtype).removeprefix("torch."),
        "processes": world.size,
        "kept_in_memory": asdict(kept),
        "seconds": state.seconds,
        "seconds_per_step": state.seconds / max(1, state.step),
        "peak_memory_bytes": memory().peak,
        "validation_tokens": parts.validation.tokens,
        "history": state.history,
        "choice": outcome.choice,
        **hashes,
        **began,
    }
    notes: dict[str, MetadataValue] = {
        CALIBRATION_KEY: text.sha256,
        "nkat.calibration.tokens": len(data.text.tokens),
        "nkat.fit.start": state.start,
        "nkat.fit.learning_rate": request.settings.learning_rate,
        "nkat.fit.steps": state.step,
        "nkat.fit.kept_step": outcome.step,
        UNFINISHED_KEY: not finished,
    }
    if keep is not None:
        notes[KEEP_KEY] = keep.sha256
    for what in ("reference", "start_from"):
        if f"{what}_sha256" in hashes:
            notes[f"nkat.{what}.sha256"] = hashes[f"{what}_sha256"]
    if outcome.score is not None:
        change, divergence = outcome.score.change, outcome.score.divergence
        assert divergence is not None
        record |= {**change.record("heldout_"), "heldout_divergence": divergence.record()}
        notes |= change.record(HELDOUT_PREFIX)
        notes[f"{HELDOUT_PREFIX}tokens"] = parts.validation.tokens
    notes |= outcome.notes
    return FitResult(outcome.thetas, outcome.gamma, notes, record, parts.validation, parts.own, world.first, finished)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What of a fit is kept. choice: its record;  notes: what a Θ file says of it"""

    step: int
    thetas: dict[str, Theta]
    gamma: float
    score: Score | None = None
    choice: dict[str, Any] | None = None
    notes: dict[str, MetadataValue] = field(default_factory=dict)


def _best_at_home(request: FitRequest, state: FitState) -> _Outcome:
    return _Outcome(state.best_step or 0, _thetas(request, state.best_factors), request.settings.gamma)


def _choose(
    request: FitRequest,
    exact: LoadedModel,
    models: Iterable[LoadedModel],
    state: FitState,
    validation: Passages,
    guard: Sequence[GuardText],
    finished: bool,
) -> _Outcome:
    """The best candidate within the guard. Of a fit that was interrupted one state alone is judged, and on less text.

    models: what candidates are judged by (`_judging`);  exact: by which what is kept is judged at home

    Raises NKATError where none is to be kept.
    """
    assert request.space is not None
    candidates, space = state.candidates(), request.space
    if not finished:
        assert state.best_step is not None  # an interruption validates
        candidates = {state.best_step: state.best_factors}
        space = replace(space, ranks=(max(space.ranks),))
    whole = cache(lambda step: _theta_set(request, _thetas(request, candidates[step])))
    columns = cache(lambda step, rank: truncate_rank(whole(step), rank))  # the same one at every strength
    for judging in models:
        make = KeptScorer(DEFAULT_BATCH)  # for home and guard: each judges the same Θ
        elsewhere = Guard(judging, guard, make=make) if guard else None
        panel = Panel(Judge(judging, validation, make=make), elsewhere)
        choice = choose(lambda c: columns(c.step, c.rank), list(candidates), space, panel if finished else panel.part())
        if choice.kept is not None:
            break
    kept = choice.kept
    if kept is None:
        raise NKATError(_nothing_kept(request, choice))
    if not kept.admitted:
        note(f"warning: {_breaks(kept)}; with gamma left open a weaker one is chosen that the guard admits")
    theta = replace(columns(kept.candidate.step, kept.candidate.rank), gamma=kept.candidate.gamma)
    score = _judge(exact, theta, validation)
    notes: dict[str, MetadataValue] = {}
    if kept.verdict is not None:
        worst = kept.verdict.worst
        notes = {f"{GUARD_PREFIX}text": worst.name, **worst.change.record(GUARD_PREFIX)}
    return _Outcome(kept.candidate.step, theta.layers, kept.candidate.gamma, score, choice.record(), notes)


def _nothing_kept(request: FitRequest, choice: Choice) -> str:
    """Why; the state of a fit from which nothing can come is removed."""
    best = min(choice.judged, key=lambda row: row.home.change.log_ratio)
    if best.home.change.log_ratio < 0.0:
        weakest = min(choice.judged, key=lambda row: coupling(row.candidate.gamma))
        return (
            f"{_breaks(weakest)}, weak as it is; nothing was written (the same command with --resume --no-guard writes "
            "what is best at home)"
        )
    if request.state is not None:
        request.state.unlink(missing_ok=True)
    return _no_gain(best.home.change)


def _no_gain(change: PairedChange) -> str:
    return (
        f"no step of the fit beats the model without Θ on the validation slice: the best changes its perplexity by "
        f"{change}; nothing was written"
    )


def _breaks(row: Judged) -> str:
    candidate, verdict = row.candidate, row.verdict
    assert verdict is not None
    return (
        f"rank {candidate.rank}, gamma {candidate.gamma:g} breaks the guard: {verdict}, and {100 * verdict.limit:g} % "
        "are allowed"
    )


def _thetas(request: FitRequest, factors: Sequence[torch.Tensor]) -> dict[str, Theta]:
    return to_thetas(by_name(request.names, factors), request.settings.gamma)


def _theta_set(request: FitRequest, thetas: dict[str, Theta]) -> ThetaSet:
    settings = request.settings
    options = ThetaOptions(settings.rank, settings.gamma, settings.seed, source="fit")
    return describe_theta_set(request.model.file, thetas, options, request.base_sha256)


def _check_guard(request: FitRequest) -> None:
    used = {text.sha256: what for text, what in ((request.calibrate, "learn from"), (request.keep, "keep")) if text}
    for text in request.guard or ():
        if text.sha256 in used:
            raise NKATError(f"{text.name}: the guard's text and the text to {used[text.sha256]} are the same text")


def _guard(request: FitRequest, own: Passages | None) -> list[GuardText]:
    if request.guard is None or request.space is None:
        return []
    return guard_texts(request.model, request.guard, own=[] if own is None else [own])


def check_state(path: Path, resume: bool, force: bool, what: str = "fit") -> None:
    """Raises NKATError when an interrupted fit would be lost, or there is none to resume. what: its name for people."""
    if resume and not path.exists():
        raise NKATError(f"{path}: there is no interrupted {what} to resume")
    if path.exists() and not resume and not force:
        raise NKATError(f"{path}: is an interrupted {what}; --resume goes on with it, --force starts anew")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What a fit's products are made in: "float32", "bfloat16", or "auto" for the faster on this device."""
    if precision != "auto":
        return DTYPES[precision]
    return torch.bfloat16 if hardware.computes_bfloat16(device) else torch.float32


def _working_copy(request: FitRequest, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """The model that is fitted, without Θ: the exact one itself where it computes as the fit does."""
    exact = request.model
    if device.type == "cpu" and dtype == exact.model.output.dtype and request.fast is False:
        exact.model.set_gamma(None)
        return exact
    return load_model(exact, thetas={}, gamma=1.0, device=device, dtype=dtype)


def load_reference(exact: LoadedModel, loaded: LoadedModel) -> LoadedModel:
    """The reference as `loaded` computes. Raises NKATError where it is another model."""
    reference = load_model(exact, thetas={}, gamma=1.0, device=loaded.model.device, dtype=loaded.model.output.dtype)
    if reference.config != loaded.config:
        names = [f.name for f in fields(loaded.config)]
        name = next(n for n in names if getattr(reference.config, n) != getattr(loaded.config, n))
        raise NKATError(
            f"{exact.file.path}: is not the same model: {name} is {getattr(reference.config, name)}, "
            f"in the input it is {getattr(loaded.config, name)}"
        )
    return reference


def _data(request: FitRequest, loaded: LoadedModel, text: Text, keep: Text | None) -> tuple[FitData, Parts]:
    """What is learned from, with some of the validation chunks to look at meanwhile; and all that is kept back."""
    context = request.settings.context
    parts = calibration_parts(loaded, text, request.ignore, context)
    if request.guard is not None and parts.own is None:
        note(f"note: {text.name} is too short for a part of it to guard what is left")
    looked_at = parts.validation.pick(evenly(len(parts.validation.chunks), _LEARNING_CHUNKS))
    validation = looked_at if looked_at.tokens else parts.validation
    if keep is None:
        return FitData(parts.learned, validation), parts
    if is_chats(keep):
        chats = conversations(keep, loaded.gguf.metadata, loaded.tokenizer)
        kept = chat_text(chats, text_bos(loaded.tokenizer), context)
    else:
        kept = fit_text(loaded.tokenizer, keep)
    if len(kept.tokens) < context:
        raise NKATError(
            f"{keep.name}: the text is too short: it has {counted(len(kept.tokens), 'token')}, one sequence needs "
            f"{context}"
        )
    return FitData(parts.learned, validation, kept), parts


def _identity(
    request: FitRequest, text: Text, keep: Text | None, dtype: torch.dtype
) -> tuple[str, dict[str, MetadataValue]]:
    """The fit's name, and the hashes of its inputs."""
    hashes: dict[str, MetadataValue] = {"calibration_sha256": text.sha256}
    if keep is not None:
        hashes["keep_sha256"] = keep.sha256
    if request.reference is not None:
        with console.bar(request.reference.file.base_size, "hashing the reference", "B") as bar:
            hashes["reference_sha256"] = base_hash(request.reference.file, bar.update)
    if request.start_from is not None:
        hashes["start_from_sha256"] = request.start_from.sha256
    settings = {**asdict(request.settings), "names": list(request.names), "ignore": list(request.ignore)}
    settings |= {"start": request.start, "precision": str(dtype)}
    return run_identity({**hashes, **settings, "base_sha256": request.base_sha256}), hashes


def _interrupted_state(request: FitRequest, loaded: LoadedModel, identity: str) -> FitState | None:
    if not request.resume:
        return None
    if request.state is None:
        raise NKATError("a fit that keeps no state cannot be resumed")
    state = load_state(request.state, identity)
    layers = loaded.model.star_linears()
    shapes = [(max(layers[name].shape), request.settings.rank) for name in request.names]
    check_place(state, shapes, request.settings.steps, request.state)
    note(f"resuming {request.state} at step {state.step} of {request.settings.steps}")
    return state


def _starts(request: FitRequest, loaded: LoadedModel, scale: float) -> tuple[dict[str, list[Factors]], dict[str, Any]]:
    """Where to begin, by name; and what of it is for the record."""
    settings = request.settings
    layers = loaded.model.star_linears()
    shapes = [layers[name].shape for name in request.names]
    if request.start_from is not None:
        zero = zero_start(shapes, settings.rank, settings.seed, scale)
        with console.bar(len(request.names), "start from the LoRA", "layer") as bar:
            terms = request.start_from.terms
            found, missed = lora_starts(terms, request.names, zero, settings.rank, settings.seed, bar.update)
        errors = missed_record(missed)
        note(f"the Θ nearest to {request.start_from.path} misses {100 * errors['all']:.2f} % of it (Frobenius norm)")
        return {"lora": found}, {"start_from": {**request.start_from.record(), "errors": errors}}
    wanted = [request.start]
    if request.start == "auto":
        wanted = ["zero"] + ["residual"] * (request.reference is not None)
    starts = {}
    for source in wanted:
        if source == "zero":
            starts[source] = zero_start(shapes, settings.rank, settings.seed, scale)
            continue
        reference = request.reference.gguf if request.reference and source == "residual" else None
        options = ThetaOptions(settings.rank, settings.gamma, settings.seed, source=source, reference=reference)
        with console.bar(len(request.names), f"start {source}", "layer") as bar:
            thetas = make_thetas(loaded.gguf, request.names, options, bar.update)
        starts[source] = theta_start([thetas[name] for name in request.names], shapes, settings.gamma)
    return starts, {}


def _keep(
    request: FitRequest,
    loaded: LoadedModel,
    data: FitData,
    starts: Mapping[str, Sequence[Factors]],
    state: FitState | None,
    world: World,
) -> Kept:
    """What there is room to keep in memory, found with the layers as they will be fitted."""
    settings = request.settings
    tokens = batch_at(data.text, 0, 1, settings.context, settings.seed).tokens.to(world.device)
    sequences = settings.batch if data.keep is None else max(settings.batch, settings.keep_batch)
    if state is None:
        factors = dict(zip(request.names, next(iter(starts.values())), strict=True))
    else:
        factors = by_name(request.names, state.factors)
    frozen = [*loaded.model.multipliers().values()]
    with fitted_layers(loaded.model, factors):
        return keep(loaded.model, frozen, tokens, sequences, request.fast, processes=world.size)


def _run(
    request: FitRequest,
    loaded: LoadedModel,
    reference: LoadedModel | None,
    validator: LoadedModel | None,
    data: FitData,
    starts: Mapping[str, Sequence[Factors]],
    state: FitState | None,
    identity: str,
    world: World,
    kept: Kept,
) -> tuple[FitState, bool]:
    """The fit with its bar, its saved states and Ctrl-C; returns the last state and whether it came to its end."""
    settings = request.settings
    unmodified = float(data.validation.score((validator or loaded).model, "without Θ").mean())
    trials = max(0, len(starts) - 1) * min(settings.start_steps, settings.steps)
    saved = time.monotonic()
    bar = console.bar(trials + settings.steps, "fitting", "step", enabled=world.first)
    with bar, interrupts.interrupts("the running step, and the trials of the starts") as interrupted:
        bar.update(0 if state is None else state.step)

        def after_step(now: FitState | None, loss: float) -> None:
            nonlocal saved
            best = "" if now is None or now.best_nll is None else _validation(now.best_nll, unmodified)
            bar.set_postfix_str(f"loss {loss:.3f}{best}", refresh=False)
            bar.update()
            if world.first and request.state and now is not None and time.monotonic() - saved > _SAVE_SECONDS:
                save_state(request.state, now, identity)
                saved = time.monotonic()

        progress = Progress(after_step, lambda: bool(interrupted))
        state = fit(
            loaded.model,
            request.names,
            starts,
            data,
            settings,
            progress,
            reference=None if reference is None else reference.model,
            validator=None if validator is None else validator.model,
            state=state,
            world=world,
            keep_activations=kept.activations,
        )
        stopped = bool(interrupted) and state.step < settings.steps
        if world.first and request.state:  # what is chosen from it takes time, too
            save_state(request.state, state, identity)
    return state, not stopped


def _validation(nll: float, unmodified: float) -> str:
    return f", validation perplexity {math.exp(nll):.2f} ({100.0 * math.expm1(nll - unmodified):+.2f} %)"


def _without_theta(request: FitRequest, device: torch.device) -> LoadedModel:
    """The model once more, in the engine's own precision, over the same open file."""
    return load_model(request.model, thetas={}, gamma=1.0, device=device)


def _judging(request: FitRequest, loaded: LoadedModel) -> Iterator[LoadedModel]:
    """What the candidates of a fit are judged by, and what by if that keeps none of them.

    On a processor that fits in bfloat16 first the compiled kernels, with inputs rounded to 8 bits: twice as fast as its
    products in bfloat16, and no further from the exact figures, but that rounding blurs what a very weak Θ does. Then,
    or else, the model as it was fitted.
    """
    if loaded.model.device.type == "cpu" and loaded.model.output.dtype == torch.bfloat16:
        yield load_model(request.model, thetas={}, gamma=1.0, int8_activations=True)
    yield loaded


def _judge(exact: LoadedModel, theta: ThetaSet, validation: Passages) -> Score:
    """The INT8 Θ against none on the validation slice."""
    score = Judge(exact, validation, diverging=True).score(theta, progress="validating")
    if score.change.log_ratio >= 0.0:
        raise NKATError(_no_gain(score.change))
    return score
