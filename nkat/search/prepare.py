"""What all trials of a search share: the model, the texts that are judged on, and Θ of the highest rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nkat.engine.scoring import KeptScorer
from nkat.errors import NKATError
from nkat.gguf.writer import MetadataValue
from nkat.host import console
from nkat.host.console import counted, note
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.guard import Guard, guard_texts
from nkat.measure.judge import Judge, Passages, text_passages
from nkat.measure.perplexity import DEFAULT_BATCH
from nkat.measure.texts import Text, load_text
from nkat.search.learned import Learner
from nkat.search.objective import Space
from nkat.search.options import SearchOptions
from nkat.sources.fit.data import Parts, calibration_parts
from nkat.sources.make import check_options, check_reference_is_better, describe_theta_set, make_thetas
from nkat.sources.moments import input_second_moments
from nkat.sources.options import DEFAULT_GAMMA, ThetaOptions
from nkat.theta.algebra import coupling
from nkat.theta.layers import select_layers
from nkat.theta.modelfile import ModelFile, base_hash, open_model_file
from nkat.theta.set import ThetaSet

HELD_OUT_FACTOR = 2  # held-out chunks for each one that the trials see: the last word should be the surest


@dataclass(frozen=True, slots=True)
class Prepared:
    """made_as: how Θ is made;  seen, held_out: judges on the chunks that trials see, and on others for the last word

    theta_set: of the highest rank;  guard: what a learned Θ may cost elsewhere, None where nobody asks
    fit: how it was learned, None where it was not
    """

    loaded: LoadedModel
    made_as: ThetaOptions
    theta_set: ThetaSet
    seen: Judge
    held_out: Judge
    guard: Guard | None
    reference_sha256: str | None
    fit: dict[str, Any] | None

    @property
    def chunks(self) -> int:
        """How many chunks the trials see."""
        return len(self.seen.passages.chunks)

    @property
    def described(self) -> dict[str, Any]:
        """For records: what is judged, and on what."""
        passages = self.held_out.passages
        return {
            "model_sha256": self.theta_set.base_sha256,
            "text": passages.name,
            "text_sha256": passages.sha256,
            "held_out_chunks": len(passages.chunks),
        }


def prepare(options: SearchOptions, space: Space) -> Prepared:
    """Opens model and texts, cuts the chunks, and makes Θ of the highest rank once, or learns it.

    What cannot work is known before time is spent. Raises KeyboardInterrupt where the fit was interrupted.
    """
    calibrate = load_text(options.calibrate) if options.calibrate else None
    loaded = load_model(options.model, thetas={}, gamma=1.0)
    model, base = loaded.file, loaded.file.require_base()
    gamma = DEFAULT_GAMMA if options.target_gamma is None else options.target_gamma
    coupling(gamma)  # raises when out of range
    if options.learns and gamma == 1.0:
        raise NKATError("--theta-source fit needs gamma below 1: at 1 the coupling is 0, and Θ acts on nothing")
    names = select_layers(base.tensors, None)
    rank = max(space.ranks)
    check_options(base.tensors, names, ThetaOptions(rank, gamma))
    reference = None if options.reference is None else open_model_file(options.reference)
    if reference is not None:
        check_reference_is_better(base.file, reference.require_base().file, names)
    parts = None
    if options.learns and calibrate is not None:
        settings = options.fit.fit_settings(loaded.config, rank, gamma, options.study.seed, reference is not None)
        parts = calibration_parts(loaded, calibrate, options.fit.ignore, settings.context)
    make = KeptScorer(DEFAULT_BATCH)  # for all of them: each judges the same Θ in turn
    seen, held_out = _judges(options, loaded, calibrate, parts, make)
    guard = _guard(options, loaded, calibrate, parts, make)
    if parts is None or calibrate is None:
        made_as, theta_set = _made(options, loaded, names, rank, gamma, reference, calibrate)
        fit = None
    else:
        learner = Learner(
            options=options,
            model=loaded,
            base_sha256=_hashed(model, "the base"),
            names=names,
            settings=settings,
            text=calibrate,
            reference=None if reference is None else load_model(reference, thetas={}, gamma=1.0),
        )
        learned = learner.learn()
        made_as = ThetaOptions(rank, gamma, options.study.seed, source="fit")
        theta_set, fit = learned.theta_set, learned.record
    seen.check(theta_set)
    reference_sha256 = None if reference is None else _hashed(reference, "the reference")
    return Prepared(loaded, made_as, theta_set, seen, held_out, guard, reference_sha256, fit)


def _judges(
    options: SearchOptions, loaded: LoadedModel, calibrate: Text | None, parts: Parts | None, make: KeptScorer
) -> tuple[Judge, Judge]:
    """On the user's text, else on what a fit keeps back of its own, else on the one that every Python carries."""
    wanted = options.chunks * (1 + HELD_OUT_FACTOR)
    if options.text is None and parts is not None:
        passages = parts.validation.pick(slice(wanted))
    else:
        text = load_text(options.text)
        if options.learns and calibrate is not None and text.sha256 == calibrate.sha256:
            raise NKATError(
                f"{text.name}: the text to learn from and the text to judge on are the same; without --text the part "
                "that is kept back is judged on"
            )
        passages = text_passages(loaded, text, wanted)
    return _split(passages, options.chunks, make, loaded)


def _split(passages: Passages, asked: int, make: KeptScorer, loaded: LoadedModel) -> tuple[Judge, Judge]:
    """A third of the chunks for the trials, and two for the last word."""
    chunks, context = passages.chunks.shape
    seen = chunks // (1 + HELD_OUT_FACTOR)
    if seen < 2:
        raise NKATError(
            f"{passages.name}: the text is too short: it gives {counted(chunks, 'chunk')}, and a search with held-out "
            f"text needs {2 * (1 + HELD_OUT_FACTOR)}; --text names another"
        )
    if seen < asked:
        note(
            f"note: {passages.name} has {counted(chunks, 'chunk')} of {context} tokens only: trials see {seen} of them "
            f"instead of {asked}"
        )
    some, others = passages.pick(slice(seen)), passages.pick(slice(seen, None))
    return Judge(loaded, some, make=make), Judge(loaded, others, make=make, diverging=True)


def _guard(
    options: SearchOptions, loaded: LoadedModel, calibrate: Text | None, parts: Parts | None, make: KeptScorer
) -> Guard | None:
    if parts is None or options.fit.guard is None or calibrate is None:
        return None
    more = [load_text(path) for path in options.fit.guard]
    if any(text.sha256 == calibrate.sha256 for text in more):
        raise NKATError(f"{calibrate.name}: the guard's text and the text to learn from are the same text")
    texts = guard_texts(loaded, more, own=[] if parts.own is None else [parts.own])
    return Guard(
        loaded,
        [text for text in texts if text.passages.sha256 != calibrate.sha256],  # who learns Python's documentation
        make=make,
    )


def _made(
    options: SearchOptions,
    loaded: LoadedModel,
    names: list[str],
    rank: int,
    gamma: float,
    reference: ModelFile | None,
    calibrate: Text | None,
) -> tuple[ThetaOptions, ThetaSet]:
    """Θ from the weights alone, or from a better copy of the model."""
    model, base = loaded.file, loaded.file.require_base()
    moments: dict[str, torch.Tensor] | None = None
    notes: dict[str, MetadataValue] = {}
    if calibrate is not None:
        moments, notes = input_second_moments(loaded, calibrate)
    made_as = ThetaOptions(
        rank=rank,
        gamma=gamma,
        seed=options.study.seed,
        source=options.theta_source,
        reference=None if reference is None else reference.require_base().file,
        input_weights=moments,
        notes=notes,
    )
    check_options(base.tensors, names, made_as)
    with console.bar(len(names), f"making Θ of rank {rank}", "layer") as bar:
        thetas = make_thetas(base.file, names, made_as, bar.update)
    return made_as, describe_theta_set(model, thetas, made_as, _hashed(model, "the base"))


def _hashed(model: ModelFile, what: str) -> str:
    with console.bar(model.base_size, f"hashing {what}", "B") as bar:
        return base_hash(model, bar.update)
