"""`--repair` from files to bytes: checks inputs, learns scales, keeps its state, judges what a file will hold."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nkat.errors import NKATError
from nkat.gguf.scales import has_scales, put_scales, stored_scales
from nkat.gguf.weights import read_weight, scale_beside
from nkat.gguf.writer import FileRange, sha256_of_parts
from nkat.host import console, interrupts
from nkat.host.console import note
from nkat.host.distributed import World, join_world
from nkat.host.memory import memory
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.judge import Judge, Passages
from nkat.measure.perplexity import Perplexity, paired
from nkat.measure.texts import Text
from nkat.sources.fit.data import FitText, batch_at, calibration_parts
from nkat.sources.fit.descent import Progress
from nkat.sources.fit.job import compute_dtype, load_reference
from nkat.sources.fit.layers import stand_ins
from nkat.sources.fit.room import Kept, keep
from nkat.sources.fit.state import FitState, load_state, run_identity, save_state
from nkat.sources.importance import moments_from_file
from nkat.sources.make import check_reference_is_better
from nkat.sources.moments import input_second_moments
from nkat.sources.repair.descent import RepairSettings, Validation, repair
from nkat.sources.repair.layers import RepairedLinear, no_change
from nkat.sources.repair.start import closed_form
from nkat.sources.residual import regularised_moments
from nkat.theta.modelfile import base_hash

_SAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class RepairRequest:
    """What is to be repaired, on what, and where an interrupted repair is kept.

    model: as the engine runs it, exact;  names: the weights whose scales are learned, see `repairable`
    reference: the same model at a higher precision;  ignore: parts of the text that are not to be learned
    precision: "auto", "float32" or "bfloat16"
    fast: keep activations and the other layers' unpacked weights in memory; None: what fits
    imatrix: a file that says how the inputs weigh for the start, in place of the text
    state: the file of an interrupted repair, None to keep none; `resume` goes on with it
    """

    model: LoadedModel
    base_sha256: str
    names: Sequence[str]
    settings: RepairSettings
    calibrate: Text
    reference: LoadedModel | None
    ignore: Sequence[str]
    precision: str
    fast: bool | None
    state: Path | None
    resume: bool
    allow_cuda: bool
    imatrix: Path | None = None


@dataclass(frozen=True, slots=True)
class RepairResult:
    """packed: new bytes by weight name, uint8 [nbytes], which differ from the file's in scales only

    record: for people
    writes: whether this process is the one to write files;  finished: False when it was interrupted
    """

    packed: dict[str, np.ndarray]
    record: dict[str, Any]
    writes: bool
    finished: bool


def repairable(loaded: LoadedModel, names: Sequence[str]) -> list[str]:
    """Those of the weights whose type stores scales. Raises NKATError where there is none."""
    beside = {name for name in names if scale_beside(loaded.gguf, name) != 1.0}  # which the learned ones do not know
    found = [name for name in names if has_scales(loaded.tensors[name].type) and name not in beside]
    if not found:
        types = ", ".join(sorted({loaded.tensors[name].type_name for name in names}))
        raise NKATError(
            f"{loaded.file.path}: has no scales to learn: its weights are {types}, and a repair needs a block format "
            "with float16 scales"
        )
    return found


def run_repair(request: RepairRequest) -> RepairResult:
    """Learns scales. Raises NKATError for inputs that do not go together, and when no step beats the file as it is."""
    if request.reference is not None:
        check_reference_is_better(request.model.gguf, request.reference.gguf, request.names)
    with join_world(request.allow_cuda) as world:
        dtype = compute_dtype(request.precision, world.device)
        loaded = load_model(request.model, thetas={}, gamma=1.0, device=world.device, dtype=dtype)
        reference = None if request.reference is None else load_reference(request.reference, loaded)
        parts = calibration_parts(loaded, request.calibrate, request.ignore, request.settings.context)
        learned, validation = parts.learned, parts.validation
        identity, hashes = _identity(request, dtype)
        state = _interrupted_state(request, loaded, identity)
        starts = _starts(request, loaded) if state is None else {}
        kept = _keep(request, loaded, learned, world)
        before, state, finished = _run(
            request, loaded, reference, learned, validation, starts, state, identity, world, kept
        )
    found = Validation.of(next(row for row in state.history if row["step"] == state.best_step))
    if found.objective >= before.objective:
        raise NKATError(
            "no step of the repair beats the file as it is on the part of the text that was kept back; nothing was "
            "written"
        )
    packed = _packed(request.model, dict(zip(request.names, state.best_factors, strict=True)))
    record = {
        "settings": asdict(request.settings),
        "start": state.start,
        "weights": len(request.names),
        "scales": sum(change.numel() for change in state.factors),
        "steps": state.step,
        "kept_step": state.best_step,
        "finished": finished,
        "precision": str(dtype).removeprefix("torch."),
        "processes": world.size,
        "kept_in_memory": asdict(kept),
        "seconds": state.seconds,
        "seconds_per_step": state.seconds / max(1, state.step),
        "peak_memory_bytes": memory().peak,
        "validation_tokens": validation.tokens,
        "before": before.row(),
        "after": found.row(),
        "history": state.history,
        **hashes,
    }
    if world.first:
        record |= _judge(request, packed, validation)
    return RepairResult(packed, record, world.first, finished)


def _identity(request: RepairRequest, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The repair's name, and the hashes of its inputs."""
    hashes = {"calibration_sha256": request.calibrate.sha256, "input_sha256": request.base_sha256}
    if request.reference is not None:
        with console.bar(request.reference.file.base_size, "hashing the reference", "B") as bar:
            hashes["reference_sha256"] = base_hash(request.reference.file, bar.update)
    if request.imatrix is not None:
        hashes["imatrix_sha256"] = sha256_of_parts([FileRange(request.imatrix, 0, request.imatrix.stat().st_size)])
    settings = {**asdict(request.settings), "names": list(request.names), "ignore": list(request.ignore)}
    return run_identity({"kind": "repair", **hashes, **settings, "precision": str(dtype)}), hashes


def _interrupted_state(request: RepairRequest, loaded: LoadedModel, identity: str) -> FitState | None:
    if not request.resume:
        return None
    if request.state is None:
        raise NKATError("a repair that keeps no state cannot be resumed")
    state = load_state(request.state, identity)
    shapes = [change.shape for change in no_change(loaded.model.star_linears(), request.names)]
    if [change.shape for change in state.factors] != shapes or state.step > request.settings.steps:
        raise NKATError(f"{request.state}: the state of the repair is damaged; --force starts anew")
    note(f"resuming {request.state} at step {state.step} of {request.settings.steps}")
    return state


def _starts(request: RepairRequest, loaded: LoadedModel) -> dict[str, list[torch.Tensor]]:
    """Where to begin beside the file's own scales: with a better copy, at those that are best layer by layer."""
    if request.reference is None:
        return {}
    names = request.names
    if request.imatrix is not None:
        moments, _ = moments_from_file(request.imatrix, request.model.tensors, names)
    else:
        model = loaded if loaded.model.device.type == "cpu" else request.model  # they are gathered on the processor
        moments, _ = input_second_moments(model, request.calibrate, names=names)
    layers, changes = request.model.model.star_linears(), []
    with console.bar(len(names), "scales in closed form", "weight") as bar:
        for name in names:
            layer, wanted = layers[name], read_weight(request.reference.gguf, name)
            regular = regularised_moments(moments[name], layer.shape[1])
            changes.append(closed_form(layer.file_bytes, layer.qtype, wanted, regular))
            request.reference.gguf.release(name)
            bar.update()
    return {"closed form": changes}


def _keep(request: RepairRequest, loaded: LoadedModel, text: FitText, world: World) -> Kept:
    """What there is room to keep in memory, found with the layers as they will be learned."""
    settings, layers = request.settings, loaded.model.star_linears()
    tokens = batch_at(text, 0, 1, settings.context, settings.seed).tokens.to(world.device)
    changes = no_change(layers, request.names)
    learned = {name: RepairedLinear(layers[name], c) for name, c in zip(request.names, changes, strict=True)}
    frozen = [layer for name, layer in loaded.model.multipliers().items() if name not in learned]
    with stand_ins(loaded.model, learned):
        return keep(loaded.model, frozen, tokens, settings.batch, request.fast, processes=world.size)


def _run(
    request: RepairRequest,
    loaded: LoadedModel,
    reference: LoadedModel | None,
    text: FitText,
    validation: Passages,
    starts: Mapping[str, Sequence[torch.Tensor]],
    state: FitState | None,
    identity: str,
    world: World,
    kept: Kept,
) -> tuple[Validation, FitState, bool]:
    """The repair with its bar, its saved states and Ctrl-C; whether it came to its end is returned last."""
    saved = time.monotonic()
    bar = console.bar(request.settings.steps, "repairing", "step", enabled=world.first)
    with bar, interrupts.interrupts("the running step") as interrupted:
        bar.update(0 if state is None else state.step)

        def after_step(now: FitState | None, loss: float) -> None:
            nonlocal saved
            assert now is not None
            bar.set_postfix_str(f"loss {loss:.3f}{_latest(now)}", refresh=False)
            bar.update()
            if world.first and request.state and time.monotonic() - saved > _SAVE_SECONDS:
                save_state(request.state, now, identity)
                saved = time.monotonic()

        before, state = repair(
            loaded.model,
            request.names,
            text,
            validation,
            request.settings,
            Progress(after_step, lambda: bool(interrupted)),
            reference=None if reference is None else reference.model,
            starts=starts,
            state=state,
            world=world,
            keep_activations=kept.activations,
        )
        stopped = bool(interrupted) and state.step < request.settings.steps
        if world.first and stopped and request.state:
            save_state(request.state, state, identity)
    return before, state, not stopped


def _latest(state: FitState) -> str:
    if not state.history:
        return ""
    found = Validation.of(state.history[-1])
    divergence = "" if found.divergence is None else f", KL {found.divergence:.4f}"
    return f", validation perplexity {math.exp(found.nll):.2f}{divergence}"


def _packed(model: LoadedModel, changes: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The bytes of each weight with its scales times eᶜ, rounded to float16."""
    layers = model.model.star_linears()
    result = {}
    for name, change in changes.items():
        layer = layers[name]
        packed = layer.file_bytes.clone()
        put_scales(packed, layer.qtype, stored_scales(packed, layer.qtype) * change.cpu().exp())
        result[name] = packed.numpy()
    return result


def _judge(request: RepairRequest, packed: Mapping[str, np.ndarray], validation: Passages) -> dict[str, Any]:
    """Perplexity on the validation slice of the file, of the repaired bytes, and of the reference: exact, as any other.

    won_back_percent: the share of the perplexity that the file has above the reference's
    """
    judge = Judge(request.model, validation)
    base = judge.without(progress="before")
    repaired = judge.other(with_bytes(request.model, packed)).without(progress="repaired")
    record: dict[str, Any] = {
        "base": base.record(),
        "repaired": {**repaired.record(), **paired(base, repaired).record()},
    }
    if request.reference is not None:
        better = judge.other(request.reference).without(progress="reference")
        record |= {"reference": better.record(), "won_back_percent": won_back(base, repaired, better)}
    return record


def won_back(base: Perplexity, repaired: Perplexity, better: Perplexity) -> float | None:
    """Per cent of base's excess over the better copy's perplexity that is gone; None where it has none."""
    lost = base.ppl - better.ppl
    return None if lost <= 0.0 else 100.0 * (base.ppl - repaired.ppl) / lost


def with_bytes(model: LoadedModel, packed: Mapping[str, np.ndarray]) -> LoadedModel:
    """The model once more, exact, with other bytes in some weights of the same types and shapes."""
    other = load_model(model, thetas={}, gamma=1.0)
    layers = other.model.star_linears()
    for name, data in packed.items():
        layers[name].packed = torch.from_numpy(data)
    return other
