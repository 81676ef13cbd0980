"""Makes a model's Θ: one INT8 Θ for each chosen weight, from the weight itself or from a better copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile, TensorInfo
from nkat.gguf.weights import read_scaled_weight, same_weights
from nkat.gguf.writer import MetadataValue
from nkat.sources.options import SOURCES, ThetaOptions
from nkat.sources.residual import ErrorsLeft, errors_left, factors_from_residual
from nkat.sources.weight import factors_from_weight
from nkat.theta.algebra import Theta, ThetaError, coupling, of_experts, quantise_factors
from nkat.theta.modelfile import ModelFile, base_name
from nkat.theta.set import ThetaSet

_Result = TypeVar("_Result")
_MOST_WORKERS = 2  # bounds the memory: each holds a weight in float32


def check_source(tensors: Mapping[str, TensorInfo], names: Sequence[str], source: str) -> None:
    """Raises ThetaError for a mixture's experts among the names where the source makes no Θ for them."""
    for name in names:
        if len(tensors[name].shape) == 3 and source != "weight":
            raise ThetaError(
                f"{name}: Θ of a mixture's experts comes of their weights alone, not of {source}: give "
                "--theta-source weight"
            )


def check_options(tensors: Mapping[str, TensorInfo], names: Sequence[str], options: ThetaOptions) -> None:
    """Raises NKATError for what cannot work, before any time is spent."""
    coupling(options.gamma)
    check_source(tensors, names, options.source)
    for name in names:
        shape = tensors[name].shape
        limit = min(*shape[-2:], options.target_size or max(shape[-2:]))
        if not 1 <= options.rank <= limit:
            rows, columns = shape[-2:]
            corner = f" (its leading {limit}x{limit} corner)" if options.target_size else ""
            raise ThetaError(
                f"Θ rank {options.rank} is impossible for {name} ({rows}x{columns}){corner}: "
                f"it must be from 1 to {limit}"
            )
    if options.source == "residual":
        _check_reference(tensors, names, options)


def check_reference_is_better(file: GGUFFile, reference: GGUFFile, names: Sequence[str]) -> None:
    """Raises NKATError for a reference with the very weights of the input, from which there is nothing to win back."""
    if same_weights(file, reference, names):
        raise NKATError(
            f"{reference.path}: has the same weights as the input, so that nothing is to be won back from it; "
            "--reference is the same model at a higher precision"
        )


def make_thetas(
    file: GGUFFile, names: Sequence[str], options: ThetaOptions, on_layer: Callable[[], object] | None = None
) -> dict[str, Theta]:
    """Θ for each named weight, two at a time: most products are too small to share out among threads.

    Peak memory is about three times the largest weight in float32 for each of the two. `on_layer` is called after each
    layer. Raises ThetaError naming the layer whose weight is not finite.
    """
    check_options(file.tensors, names, options)
    if options.source == "residual" and options.reference is not None:
        check_reference_is_better(file, options.reference, names)

    def make(name: str) -> Theta:
        weight = read_scaled_weight(file, name)
        if weight.ndim == 2:
            return quantise_factors(*_factors(weight, name, options))
        return of_experts([quantise_factors(*_factors(expert, name, options)) for expert in weight])

    return _two_at_a_time(file, names, make, on_layer)


def residual_errors(
    file: GGUFFile, thetas: Mapping[str, Theta], options: ThetaOptions, on_layer: Callable[[], object] | None = None
) -> dict[str, ErrorsLeft]:
    """For each Θ made with source `residual`: the error it leaves, and what else the same bytes could do."""

    def compare(name: str) -> ErrorsLeft:
        residual, moments = _residual(read_scaled_weight(file, name), name, options)
        return errors_left(residual, thetas[name], coupling(options.gamma), moments, options.seed, options.target_size)

    return _two_at_a_time(file, list(thetas), compare, on_layer)


def _two_at_a_time(
    file: GGUFFile, names: Sequence[str], work: Callable[[str], _Result], on_layer: Callable[[], object] | None
) -> dict[str, _Result]:
    threads = torch.get_num_threads()
    workers = min(threads, _MOST_WORKERS)

    def one(name: str) -> _Result:
        torch.set_num_threads(threads // workers)  # each thread has a setting of its own
        try:
            result = work(name)
        except ThetaError as error:
            raise ThetaError(f"{file.path}: {name}: {error}") from None
        file.release(name)
        if on_layer:
            on_layer()
        return result

    pool = ThreadPoolExecutor(workers)
    try:
        return dict(zip(names, pool.map(one, names), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def describe_theta_set(model: ModelFile, thetas: dict[str, Theta], options: ThetaOptions, base_sha256: str) -> ThetaSet:
    """Θ with what its file records: settings, and the base's name, size and hash."""
    notes: dict[str, MetadataValue] = dict(options.notes)
    if options.target_size is not None:
        notes["nkat.theta.target_size"] = options.target_size
    return ThetaSet(
        layers=thetas,
        gamma=options.gamma,
        source=options.source,
        seed=options.seed,
        base_sha256=base_sha256,
        base_name=base_name(model),
        base_size=model.base_size,
        base_gguf_version=model.require_base().version,
        notes=notes,
    )


def _factors(weight: torch.Tensor, name: str, options: ThetaOptions) -> tuple[torch.Tensor, torch.Tensor]:
    if options.source == "weight":
        return factors_from_weight(weight, options.rank, options.seed, options.target_size)
    if options.source == "residual":
        residual, moments = _residual(weight, name, options)
        kappa = coupling(options.gamma)
        return factors_from_residual(residual, options.rank, kappa, moments, options.seed, options.target_size)
    raise ThetaError(f"source {options.source!r} makes no Θ from a weight; those that do are {', '.join(SOURCES)}")


def _residual(weight: torch.Tensor, name: str, options: ThetaOptions) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the reference has and the weight lost, and the second moments of the layer's inputs where they are known."""
    assert options.reference is not None
    residual = read_scaled_weight(options.reference, name) - weight
    options.reference.release(name)
    return residual, options.input_weights[name] if options.input_weights else None


def _check_reference(tensors: Mapping[str, TensorInfo], names: Sequence[str], options: ThetaOptions) -> None:
    if options.reference is None:
        raise NKATError("--theta-source residual needs --reference, the same model at a higher precision")
    if coupling(options.gamma) == 0.0:
        raise ThetaError("--theta-source residual needs gamma below 1: at 1 the coupling is 0 and Θ acts on nothing")
    for name in names:
        other = options.reference.tensors.get(name)
        if other is None or other.shape != tensors[name].shape:
            found = "no such tensor" if other is None else f"shape {other.shape}"
            raise NKATError(
                f"{options.reference.path}: is not the same model: {name} has shape {tensors[name].shape} in the "
                f"input, here there is {found}"
            )
