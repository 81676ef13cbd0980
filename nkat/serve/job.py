"""What `nkat-serve` does: opens the model, then serves it."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec

import torch

from nkat.errors import NKATError
from nkat.host import console, hardware
from nkat.host.console import note
from nkat.hub.fetch import local_model
from nkat.lm.load import DTYPES, LoadedModel, load_model, read_config
from nkat.serve.api import Api
from nkat.serve.arms import LARGEST_WEIGHT, Arms, theta_names
from nkat.serve.model import Served
from nkat.serve.options import USUAL_CONTEXT, ServeOptions, keys, parse_arguments
from nkat.serve.server import address, bind, serve
from nkat.serve.web import Settings, is_this_machine, make_app
from nkat.serve.worker import Worker
from nkat.theta.modelfile import ModelFile, open_model_file, thetas_for
from nkat.theta.set import ThetaSet

OWN_THETA = "theta"  # the name of the one in the model's own file


def main() -> None:
    options = parse_arguments()
    absent = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if absent:
        raise NKATError(f"the server needs {' and '.join(absent)}: pip install {' '.join(absent)}, or nkat[serve]")
    accepted = keys(options)
    bound = bind(options.host, options.port)  # before time is spent
    try:
        run(replace(options, model=local_model(options.model)), accepted, bound)
    except torch.OutOfMemoryError:
        raise NKATError(
            f"{options.model}: does not fit into the GPU's memory; --no-cuda runs it on the processor"
        ) from None
    finally:
        bound.close()
    note("stopped")


def run(options: ServeOptions, accepted: tuple[str, ...], bound: socket.socket) -> None:
    """Serves at that address, to whoever shows one of these keys."""
    model_file = open_model_file(options.model)
    if model_file.unfinished:
        note(f"warning: the Θ behind {options.model} is incomplete or damaged; serving the base model alone")
    thetas = open_thetas(options, model_file)
    arms = make_arms(options, thetas)
    context = context_of(options, model_file)
    with console.bar(1, "loading", "model"):
        loaded = load(options, model_file)
        served = Served(loaded, thetas, context)
    worker = Worker(served, options.queue + 1)
    api = Api(worker, loaded, arms, context)
    settings = Settings(
        keys=accepted,
        hosts=(options.host.lower(),) if is_this_machine(options.host) and not accepted else None,
        origins=tuple(options.cors),
        created=int(options.model.stat().st_mtime),
        say=note,
    )
    app = make_app(api, settings)
    url = address(bound)
    note(f"{options.model}: {context} tokens at most, as {', '.join(arm.name for arm in arms.all())}")
    if api.chat_problem is not None:
        note(f"warning: {api.chat_problem}")
    listening = f"listening at {url} (chat), {url}/v1 (API){'' if accepted else ', no key asked'}; Ctrl-C stops"

    def tell() -> None:
        print(listening, flush=True)  # on stdout, for whoever started this to read where

    serve(app, bound, worker, options.grace, tell)


def load(options: ServeOptions, model_file: ModelFile) -> LoadedModel:
    """The model without Θ, in the precision in which the engine's --generate runs it."""
    hardware.set_threads(options.threads)
    device = hardware.pick_device(allow_cuda=not options.no_cuda)
    on_processor = device.type == "cpu"
    kernel_dtypes = ("float32",) if on_processor else ("bfloat16", "float16")
    activations = options.activations or ("int8" if on_processor else "float")
    return load_model(
        model_file,
        thetas={},
        gamma=1.0,
        device=device,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        int8_activations=activations == "int8",
        repack=options.dtype in (None, *kernel_dtypes),
    )


def context_of(options: ServeOptions, model_file: ModelFile) -> int:
    """Tokens of a prompt and its answer. Raises NKATError for more than the model was made for."""
    made_for = read_config(model_file).context_length
    if options.context is not None and options.context > made_for:
        raise NKATError(f"--context: {options.context} tokens are more than the {made_for} that the model was made for")
    return options.context or min(USUAL_CONTEXT, made_for)


def open_thetas(options: ServeOptions, model_file: ModelFile) -> dict[str, ThetaSet]:
    """Those of --theta, or the model's own, by the names that clients know. Raises NKATError for another model's."""
    paths = [file.path for file in options.thetas]
    if not paths:
        return {} if model_file.theta is None else {OWN_THETA: model_file.theta}
    return dict(zip(theta_names([path.stem for path in paths]), thetas_for(model_file, paths), strict=True))


def make_arms(options: ServeOptions, thetas: Mapping[str, ThetaSet]) -> Arms:
    """What clients can choose. Raises NKATError for strengths that are impossible, or of no Θ."""
    given = {"--gammas": options.gammas, "--theta-gamma": [] if options.theta_gamma is None else [options.theta_gamma]}
    for flag, gammas in given.items():
        if gammas and not thetas:
            raise NKATError(f"{options.model}: has no Θ, so {flag} has no meaning")
        for gamma in gammas:
            if not 0 < gamma <= 1:
                raise NKATError(f"{flag} must lie in 0 < gamma <= 1, got {gamma}")
    weights = [file.weight for file in options.thetas] or [1.0] * len(thetas)
    for file in options.thetas:
        if not abs(file.weight) <= LARGEST_WEIGHT:
            raise NKATError(f"{file.path}: its weight must be from -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}")
    return Arms(
        name=options.alias or re.sub(r"[:,]", "-", options.model.stem),
        own={name: theta.gamma for name, theta in thetas.items()},
        usual=dict(zip(thetas, weights, strict=True)),
        gamma=options.theta_gamma,
        listed=tuple(options.gammas),
    )
