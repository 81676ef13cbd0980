"""What `nkat-serve` does: opens the model, then serves it."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from nkat.errors import NKATError
from nkat.host import console, hardware
from nkat.host.console import note
from nkat.lm.config import ModelConfig
from nkat.lm.load import LoadedModel
from nkat.lm.request import Request
from nkat.serve.api import Api
from nkat.serve.arms import Arms
from nkat.serve.model import Served
from nkat.serve.options import USUAL_CONTEXT, ServeOptions, keys, parse_arguments
from nkat.serve.server import address, bind, serve
from nkat.serve.web import Settings, is_this_machine, make_app
from nkat.serve.worker import Worker
from nkat.theta.combine import WeightedFile


def main() -> None:
    options = parse_arguments()
    absent = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if absent:
        raise NKATError(f"the server needs {' and '.join(absent)}: pip install {' '.join(absent)}, or nkat[serve]")
    accepted = keys(options)
    bound = bind(options.host, options.port)  # before time is spent
    try:
        loaded, context = load(options)
        arms = make_arms(options, loaded)
        worker = Worker(Served(loaded, context), options.queue + 1)
        api = Api(worker, loaded, arms, context)
        settings = Settings(
            keys=accepted,
            hosts=(options.host.lower(),) if is_this_machine(options.host) and not accepted else None,
            origins=tuple(options.cors),
            created=int(options.model.stat().st_mtime),
            say=None if options.quiet else note,
        )
        app = make_app(api, settings)
        url = address(bound)
        note(f"{options.model}: {context} tokens at most, as {', '.join(arm.name for arm in arms.all())}")
        if api.chat_problem is not None:
            note(f"warning: {api.chat_problem}")
        listening = f"listening at {url} (chat), {url}/v1 (API){'' if accepted else ', no key asked'}; Ctrl-C stops"
        serve(app, bound, worker, options.grace, lambda: note(listening))
    finally:
        bound.close()
    note("stopped")


def load(options: ServeOptions) -> tuple[LoadedModel, int]:
    """The model as the engine's --generate runs it, and how many tokens a prompt and its answer may have."""
    hardware.set_threads(options.threads)
    device = hardware.pick_device(allow_cuda=not options.no_cuda)
    on_processor = device.type == "cpu"
    kernel_dtypes = ("float32",) if on_processor else ("bfloat16", "float16")
    activations = options.activations or ("int8" if on_processor else "float")
    request = Request(
        options.model,
        () if options.theta is None else (WeightedFile(options.theta),),
        options.theta_gamma,
        str(device),
        options.dtype,
        int8_activations=activations == "int8",
        repack=options.dtype in (None, *kernel_dtypes),
    )
    model_file, theta = request.open()
    if model_file.unfinished:
        note(f"warning: the Θ behind {options.model} is incomplete or damaged; serving the base model alone")
    base = model_file.require_base()
    made_for = ModelConfig.from_gguf(base.file.metadata, base.tensors).context_length
    if options.context is not None and options.context > made_for:
        raise NKATError(f"--context: {options.context} tokens are more than the {made_for} that the model was made for")
    with console.bar(1, "loading", "model"):
        try:
            loaded = request.load(model_file, theta)
        except torch.OutOfMemoryError:
            raise NKATError(
                f"{options.model}: does not fit into the GPU's memory; --no-cuda runs it on the processor"
            ) from None
    return loaded, options.context or min(USUAL_CONTEXT, made_for)


def make_arms(options: ServeOptions, loaded: LoadedModel) -> Arms:
    """What clients can choose. Raises NKATError for strengths that are impossible, or of no Θ."""
    if options.gammas and loaded.gamma is None:
        raise NKATError(f"{options.model}: has no Θ, so --gammas has no meaning")
    for gamma in options.gammas:
        if not 0 < gamma <= 1:
            raise NKATError(f"--gammas must lie in 0 < gamma <= 1, got {gamma}")
    name = options.alias or options.model.stem.replace(":", "-")
    return Arms(name, loaded.gamma, tuple(options.gammas))
