"""The toolkit as a library: what `import nkat` gives.

A model is opened once; Θ is a value of its own, made, loaded or fitted for a model, and put on it where it is measured
or run. Everything runs on the processor, and says what is wrong with a NKATError.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nkat.engine.decoder import make_decoder
from nkat.engine.generate import Sampler, Sampling
from nkat.engine.generate import generate as generate_tokens
from nkat.errors import NKATError
from nkat.gguf.split import open_gguf
from nkat.gguf.writer import MetadataValue, Part, write_gguf
from nkat.hub.fetch import local_model
from nkat.lm.adapters import open_adapter
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.mix import ThetaMix
from nkat.lm.peft import peft_files, write_files
from nkat.measure.judge import Judge, Score
from nkat.measure.texts import Text, load_text
from nkat.sources.fit.descent import FitSettings
from nkat.sources.fit.job import FitRequest, run_fit
from nkat.sources.fit.options import choice_space, lower_ranks
from nkat.sources.importance import moments_from_file
from nkat.sources.make import describe_theta_set, make_thetas
from nkat.sources.moments import input_second_moments
from nkat.sources.options import DEFAULT_GAMMA, DEFAULT_RANK, ThetaOptions
from nkat.theta.layers import select_layers
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import base_hash, layout_parts, open_model_file, theta_for, theta_only_parts
from nkat.theta.set import ThetaSet

_FIT, _SAMPLING = FitSettings(DEFAULT_RANK, DEFAULT_GAMMA), Sampling()
LAYOUTS = ("tensors", "appended", "theta-only", "lora", "peft")


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A GGUF language model, opened by `open_model`.

    exact: as it is measured: float32, no rounding of activations
    theta: the Θ that its file holds; None for a plain GGUF
    """

    exact: LoadedModel
    theta: ThetaSet | None

    @property
    def path(self) -> Path:
        return self.exact.file.path

    def __repr__(self) -> str:
        own = "no Θ" if self.theta is None else f"Θ of rank {self.theta.rank}, gamma {self.theta.gamma:g}"
        return f"<nkat.Model {self.path}, {self.exact.config.architecture.name}, {own}>"

    @cached_property
    def sha256(self) -> str:
        """Of the base model's bytes; reads the whole file once."""
        return base_hash(self.exact.file)

    @cached_property
    def fast(self) -> LoadedModel:
        """As it is run: by the compiled kernels, with activations rounded to 8 bits. Made when first asked for."""
        return load_model(self.exact, thetas={}, gamma=1.0, int8_activations=True, repack=True)

    def mix(self, thetas: Mapping[str, ThetaSet]) -> ThetaMix:
        """Several Θ by name on this model as it is run, all of them off until `set_weights` of what this gives.

            mix = model.mix({"style": style, "facts": facts})
            mix.set_weights({"style": 1.0, "facts": 0.5})
            nkat.generate(model, "Once", mix.theta)

        `mix.theta` is their sum as one Θ, for `generate`, `perplexity` and `save`; a decoder that was made after the
        mix follows `set_weights` between its tokens. Nothing of the model is read again. Raises NKATError for a Θ of
        another model.
        """
        for name, theta in thetas.items():
            _check_own(theta, self, name)
        return ThetaMix(self.fast.model, thetas)


def open_model(path: str | Path) -> Model:
    """Opens a `.gguf` or `.nkat` of any layout, of a model in several files any one, or `hf:owner/repo[:quant]`, which
    is fetched where the cache does not have it. Weights stay on disk, memory-mapped, until they are used.

    Raises NKATError for a file that is damaged, holds only Θ, or is of an architecture or type that is not supported.
    """
    file = open_model_file(local_model(Path(path)))
    return Model(load_model(file, thetas={}, gamma=1.0), file.theta)


def make_theta(
    model: Model,
    rank: int = DEFAULT_RANK,
    gamma: float = DEFAULT_GAMMA,
    *,
    layers: list[str] | None = None,
    reference: str | Path | None = None,
    calibrate: str | Path | None = None,
    imatrix: str | Path | None = None,
    seed: int = 0,
) -> ThetaSet:
    """Θ from the weights alone, or from what `reference` (the same model at a higher precision) has and they lost.

    rank: columns of P and of Q, from 1 to the smallest side of an adapted weight
    gamma: strength, 0 < γ <= 1: lower is stronger, 1 is none
    layers: names or globs of weights (`blk.*.attn_q.weight`); None: all linear weights inside the blocks
    calibrate: with `reference`, a text whose activations weight the error (see `perplexity` for str and Path)
    imatrix: with `reference`, an importance matrix of llama-imatrix's that does so

    Raises NKATError for values that are impossible, a reference that is another model, or weights that are not finite.
    """
    if calibrate is not None and reference is None:
        raise NKATError("calibrate weights the error against a reference, and there is none; fit_theta learns a text")
    if imatrix is not None and (reference is None or calibrate is not None):
        raise NKATError("imatrix weights the error against a reference, in place of calibrate")
    base = model.exact.file.require_base()
    names = select_layers(base.tensors, layers)
    moments, notes = None, dict[str, MetadataValue]()
    if calibrate is not None:
        moments, notes = input_second_moments(model.exact, _text(calibrate), names=names)
    elif imatrix is not None:
        moments, _ = moments_from_file(Path(imatrix), base.tensors, names)
    options = ThetaOptions(
        rank=rank,
        gamma=gamma,
        seed=seed,
        source="weight" if reference is None else "residual",
        reference=None if reference is None else open_gguf(reference),
        input_weights=moments,
        notes=notes,
    )
    return describe_theta_set(model.exact.file, make_thetas(base.file, names, options), options, model.sha256)


def load_theta(path: str | Path, model: Model) -> ThetaSet:
    """Θ from a file of its own. Raises NKATError when there is none in it, or it was made for another model."""
    return theta_for(model.exact.file, Path(path))


def fit_theta(
    model: Model,
    text: str | Path,
    rank: int | None = None,
    gamma: float | None = None,
    *,
    steps: int = _FIT.steps,
    learning_rate: float | None = None,
    keep: str | Path | None = None,
    reference: str | Path | None = None,
    guard: Sequence[str | Path] | None = (),
    start_from: str | Path | None = None,
    layers: list[str] | None = None,
    seed: int = 0,
) -> ThetaSet:
    """Θ learned from a text by gradient descent, the last tenth of which decides which rank, γ and step are kept.

    text, keep: see `perplexity` for str and Path; on `keep` the model is to stay as it is
    rank, gamma: None: 4 or fewer columns, and the strongest γ, that gain most within the guard
    guard: texts, beside Python's documentation, sixteen kinds of English and the first tenth of `text`, on none of
        which perplexity may rise by more than 0.5 %; None: no guard
    steps: of gradient descent, 4 sequences of 256 tokens each
    learning_rate: of AdamW; None: 0.003, less for models of small weights
    reference: the same model at a higher precision, whose predictions are learned instead of the text itself
    start_from: a LoRA, a folder of PEFT's or a GGUF of llama.cpp's, whose nearest Θ is where to begin

    Ctrl-C ends the fit with the best Θ so far. Raises NKATError for a text that is too short, a loss that is not a
    finite number, and where no step beats the model without Θ on the text that was kept back.
    """
    most, made_for = DEFAULT_RANK if rank is None else rank, DEFAULT_GAMMA if gamma is None else gamma
    request = FitRequest(
        model=model.exact,
        base_sha256=model.sha256,
        names=select_layers(model.exact.tensors, layers),
        settings=FitSettings(
            rank=most,
            gamma=made_for,
            seed=seed,
            steps=steps,
            learning_rate=_FIT.learning_rate if learning_rate is None else learning_rate,
            scaled=learning_rate is None,
            context=min(_FIT.context, model.exact.config.context_length),
            nested=most > 1,
            reference_share=0.0 if reference is None else 1.0,
        ),
        calibrate=_text(text),
        reference=None if reference is None else load_model(reference, thetas={}, gamma=1.0),
        keep=None if keep is None else _text(keep),
        ignore=(),
        start="auto",
        precision="auto",
        fast=None,
        state=None,
        resume=False,
        allow_cuda=False,
        space=choice_space(lower_ranks(most) if rank is None else [most], gamma, guarded=guard is not None),
        guard=None if guard is None else [_text(one) for one in guard],
        start_from=None if start_from is None else open_adapter(Path(start_from), model.exact.file),
    )
    fitted = run_fit(request)
    options = ThetaOptions(most, fitted.gamma, seed, source="fit", notes=fitted.notes)
    return describe_theta_set(model.exact.file, fitted.thetas, options, model.sha256)


def perplexity(
    model: Model, text: str | Path | None = None, theta: ThetaSet | None = None, *, chunks: int | None = 16
) -> Score:
    """Perplexity by llama.cpp's convention (chunks of 512 tokens, the last 255 predictions of each scored).

    text: a Path is a UTF-8 file, a str the text itself; None: Python's own documentation
    theta: put on the model for this; None: the model without any
    chunks: at most so many; None: all

    The result's `perplexity` has `ppl` ± `stderr`; its `change` compares with the model without Θ on the same tokens,
    in per cent with its standard error. Raises NKATError for a text that is too short, or that Θ was made from.
    """
    judge = Judge.open(model.exact, _text(text), chunks, diverging=theta is not None)
    return judge.base() if theta is None else judge.score(theta)


def generate(
    model: Model,
    prompt: str,
    theta: ThetaSet | None = None,
    *,
    max_tokens: int = 256,
    temperature: float = _SAMPLING.temperature,
    top_k: int = _SAMPLING.top_k,
    top_p: float = _SAMPLING.top_p,
    min_p: float = _SAMPLING.min_p,
    seed: int = 0,
    on_text: Callable[[str], object] | None = None,
) -> str:
    """Continues a text: what follows the prompt, up to the model's end of text or `max_tokens` tokens.

    Samplers, their order and their defaults are llama.cpp's; temperature 0 takes the best token each time. The same
    seed gives the same text. on_text: is given each piece as soon as it is there. Raises NKATError for settings that
    make no sense.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    loaded = model.fast
    ids = loaded.tokenizer.encode(prompt, add_special=True, parse_special=True)
    loaded.model.set_thetas({} if theta is None else theta.layers)
    decoder = make_decoder(loaded.model, len(ids) + max_tokens)
    decoder.set_gamma(None if theta is None else theta.gamma)
    show = (lambda piece: None) if on_text is None else on_text
    sampler = Sampler(sampling, seed)
    return generate_tokens(decoder, loaded.tokenizer, ids, sampler, max_tokens=max_tokens, on_text=show).text


def save(
    theta: ThetaSet, path: str | Path, model: Model | None = None, *, layout: str = "tensors", force: bool = False
) -> None:
    """Writes Θ, with its model where the layout has it; the file appears whole or not at all.

    layout: "tensors": a GGUF with Θ among the model's tensors; "appended": behind the unchanged model, which every
        program then still loads; "theta-only": a small GGUF with Θ alone; "lora": an adapter for llama.cpp, KoboldCpp;
        "peft": a folder with an adapter for PEFT
    model: the one Θ was made for; not needed for "theta-only"
    force: replace a file that is there

    Raises NKATError when the file exists, the disk is full, or Θ belongs to another model.
    """
    path = Path(path)
    if layout == "peft" and model is not None:
        _check_own(theta, model)
        write_files(path, peft_files(theta, theta.gamma, model.exact.file), force)
        return
    write_gguf(path, _parts(theta, model, layout), force, [] if model is None else model.exact.file.files)


def _parts(theta: ThetaSet, model: Model | None, layout: str) -> list[Part]:
    if layout not in LAYOUTS:
        raise NKATError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    if layout == "theta-only":
        return theta_only_parts(theta)
    if model is None:
        raise NKATError(f"layout {layout!r} needs the model that Θ was made for")
    _check_own(theta, model)
    file = model.exact.file
    if layout == "lora":
        return lora_parts(theta, file.require_base())
    return layout_parts(theta, file, layout)


def _check_own(theta: ThetaSet, model: Model, name: str | None = None) -> None:
    if theta.base_sha256 != model.sha256:
        which = "Θ" if name is None else f"Θ {name!r}"
        raise NKATError(f"{which} was made for another model ({theta.base_name}), not for {model.path}")


def _text(text: str | Path | None) -> Text:
    if not isinstance(text, str):
        return load_text(text)
    return Text("the given text", text, hashlib.sha256(text.encode()).hexdigest())
