"""Models of architectures that are not run here: Θ is made for them all the same, and llama.cpp measures it."""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

from nkat.convert.options import ConvertOptions
from nkat.errors import NKATError
from nkat.host.console import note
from nkat.host.tools import suggest, suggest_program
from nkat.lm.architectures import ARCHITECTURES
from nkat.theta.modelfile import ModelFile, architecture_of

_CHUNKS = 16


def is_run_here(model: ModelFile) -> bool:
    """Whether its architecture is one of those that the forward pass computes."""
    return architecture_of(model.require_base().file) in ARCHITECTURES


def check_what_is_asked(options: ConvertOptions, model: ModelFile) -> None:
    """Raises NKATError, before time is spent, for what would need such a model to be run."""
    if is_run_here(model):
        return
    asked = {
        "--theta-source fit": options.theta_source == "fit",
        "--calibrate": options.calibrate is not None,
        "--save-imatrix": options.save_imatrix is not None,
        "--optimize-rank": options.optimize_rank,
        "--strengths": bool(options.strengths),
        "--repair": options.repair is not None,
        "--merge": options.merge is not None,
        "--export-peft": options.export_peft is not None,
    }
    if needed := [flag for flag, is_asked in asked.items() if is_asked]:
        raise NKATError(
            f"{model.path}: {architecture_of(model.require_base().file)} models are not run here, which "
            f"{' and '.join(needed)} would need; Θ can be made from the weights (--theta-source weight), or from "
            "--reference (residual), and --export-lora writes it for llama.cpp"
        )


def suggest_measuring(options: ConvertOptions, model: ModelFile, output: Path | None) -> None:
    """How llama.cpp measures the Θ that was written; output: where, unless only as an adapter."""
    architecture = architecture_of(model.require_base().file)
    note(f"note: {architecture} models are not run here; what their Θ does is measured with llama.cpp")
    if options.export_lora is None:
        adapter = (output or model.path).with_suffix(".lora.gguf")
        source: tuple[object, ...] = ("--input", output)
        if options.theta_only and output is not None:
            source = ("--input", options.input, "--theta", output, "--output", output.with_suffix(".nkat"))
        suggest("convert", *source, "--export-lora", adapter, why="an adapter for llama.cpp")
        return
    if model.require_base().file.metadata.get(f"{architecture}.attention.causal") is False:
        words = ["llama-embedding", "-m", options.input, "--lora", options.export_lora, "-p", "a text"]
        suggest_program(words, "the vectors of an encoder, and once more without --lora")
        return
    text, chunks = (options.text, ()) if options.text is not None else (topics.__file__, ("--chunks", _CHUNKS))
    words = ["llama-perplexity", "-m", options.input, "--lora", options.export_lora, "-f", text, *chunks]
    suggest_program(words, "and once more without --lora")
