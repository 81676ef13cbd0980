#!/usr/bin/env python3
"""Measures a model with and without its Θ on real text."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nkat import cli, hardware
from nkat.errors import NKATError
from nkat.load import DTYPES, LoadedModel, load_model
from nkat.perplexity import Perplexity, paired, score_chunks, text_chunks
from nkat.report import check_record, format_table, git_commit, note, write_json
from nkat.texts import Text, load_text
from nkat.theta_io import ModelFile, ThetaSet, check_judging_text, open_model_file, theta_for
from nkat.tpe import byte_ratio, tpe

EXAMPLES = """\
  python nkat_inference_engine.py --model model.nkat --perplexity
  python nkat_inference_engine.py --model model.nkat --perplexity --text wiki.test.raw --chunks 40
  python nkat_inference_engine.py --model model.nkat --perplexity --theta-gamma 0.90
  python nkat_inference_engine.py --model model.gguf --theta theta_rank4.bin --perplexity --json result.json
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser("Measure a language model with and without its Θ.", EXAMPLES)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FILE", help="a .nkat or .gguf")
    add("--theta", type=Path, metavar="FILE", help="a Θ file made for this model (--theta-only of the converter)")
    add("--theta-gamma", type=float, metavar="G", help="strength of Θ in place of the recorded one: lower is stronger")
    add("--perplexity", action="store_true", help="perplexity without and with Θ, on the same chunks of 512 tokens")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on (default: Python's own documentation)")
    add(
        "--chunks",
        type=cli.positive_int,
        default=16,
        metavar="N",
        help="at most so many chunks of the text (default 16)",
    )
    add("--batch", type=cli.positive_int, default=4, metavar="N", help="chunks in one forward pass (default 4)")
    add("--dtype", choices=DTYPES, help="of the computation (default: float32 on the processor, bfloat16 on CUDA)")
    add(
        "--activations",
        choices=("float", "int8"),
        default="float",
        help="int8: round the layers' inputs as llama.cpp does, to compare with its figures (default float: exact)",
    )
    add("--no-cuda", action="store_true", help="use the processor even if there is a GPU")
    add("--threads", type=cli.positive_int, metavar="N", help="processor threads (default: torch's choice)")
    add("--json", metavar="FILE", help='write a machine-readable record; "-" for stdout')
    add("--force", action="store_true", help="replace an existing JSON file")
    options = parser.parse_args(argv)
    if not options.perplexity:
        parser.error("say what to do: --perplexity")
    return options


def main() -> None:
    options = parse_arguments()
    check_record(options.json, options.force)
    hardware.set_threads(options.threads)
    device = hardware.pick_device(allow_cuda=not options.no_cuda)
    text = load_text(options.text)
    model_file = open_model_file(options.model)
    if model_file.unfinished:
        note(f"warning: the Θ behind {options.model} is incomplete or damaged; measuring the base model alone")
    theta_set = _theta_set(options, model_file)
    if theta_set is not None:
        check_judging_text(theta_set, text.sha256, options.theta or options.model)
    gamma = options.theta_gamma
    if theta_set is not None and gamma is None:
        gamma = theta_set.gamma
    loaded = load_model(
        model_file,
        thetas=theta_set.thetas if theta_set else None,
        gamma=gamma,
        device=device,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        int8_activations=options.activations == "int8",
    )
    record = measure_perplexity(options, theta_set, loaded, text)
    record["machine"] = hardware.describe(device)
    record["git_commit"] = git_commit()
    if options.json:
        write_json(record, options.json, options.force)


def measure_perplexity(
    options: argparse.Namespace, theta_set: ThetaSet | None, loaded: LoadedModel, text: Text
) -> dict[str, Any]:
    """Scores the same chunks without Θ and, where there is one, with it; prints the table."""
    chunks = text_chunks(loaded.tokenizer, text.content, options.chunks)
    started = time.perf_counter()
    loaded.model.set_gamma(None)
    base = Perplexity(score_chunks(loaded.model, chunks, batch=options.batch, progress="without Θ"))
    base_seconds = time.perf_counter() - started
    record: dict[str, Any] = {
        "model": str(options.model),
        "theta": str(options.theta) if options.theta else None,
        "text": text.name,
        "text_sha256": text.sha256,
        "chunks": base.chunks,
        "context": base.context,
        "scored_tokens": base.tokens,
        "dtype": str(loaded.model.output.dtype).removeprefix("torch."),
        "activations": options.activations,
        "baseline_perplexity": base.ppl,
        "baseline_perplexity_stderr": base.stderr,
        "baseline_tpe": tpe(base.ppl),
        "baseline_seconds": base_seconds,
        "theta_enabled": theta_set is not None,
    }
    rows = [["without Θ", str(base), "", f"{tpe(base.ppl):.6f}"]]
    if theta_set is not None:
        loaded.model.set_gamma(loaded.gamma)
        started = time.perf_counter()
        with_theta = Perplexity(score_chunks(loaded.model, chunks, batch=options.batch, progress="with Θ"))
        seconds = time.perf_counter() - started
        change = paired(base, with_theta)
        ratio = byte_ratio(loaded.tensors, theta_set.nbytes)
        record |= {
            "theta_rank": theta_set.rank,
            "theta_gamma": loaded.gamma,
            "theta_source": theta_set.source,
            "theta_layers": len(theta_set.thetas),
            "theta_bytes": theta_set.nbytes,
            "nkat_perplexity": with_theta.ppl,
            "nkat_perplexity_stderr": with_theta.stderr,
            "perplexity_change_percent": change.percent,
            "perplexity_change_stderr": change.percent_stderr,
            "byte_ratio": ratio,
            "nkat_tpe": tpe(with_theta.ppl, ratio),
            "nkat_seconds": seconds,
        }
        label = f"with Θ (rank {theta_set.rank}, gamma {loaded.gamma:g})"
        rows.append(
            [label, f"{with_theta.ppl:.4f} ± {with_theta.stderr:.4f}", str(change), f"{record['nkat_tpe']:.6f}"]
        )
    print(f"\n{options.model} on {text.name}: {base.chunks} chunks of {base.context} tokens, {base.tokens} scored\n")
    print(format_table(rows, ["", "perplexity", "change", "TPE"]))
    if theta_set is not None:
        print(f"\n{_verdict(record)}")
    return record


def _theta_set(options: argparse.Namespace, model_file: ModelFile) -> ThetaSet | None:
    theta_set = theta_for(model_file, options.theta) if options.theta else model_file.thetas
    if theta_set is None and options.theta_gamma is not None:
        raise NKATError(f"{options.model}: has no Θ, so --theta-gamma has no meaning")
    return theta_set


def _verdict(record: dict[str, Any]) -> str:
    """What the paired difference says, at two standard errors."""
    change, error = record["perplexity_change_percent"], record["perplexity_change_stderr"]
    if abs(change) <= 2 * error:
        return "Θ makes no difference that this text can show (within two standard errors)."
    return f"Θ makes this model {'better' if change < 0 else 'worse'} on this text (beyond two standard errors)."


if __name__ == "__main__":
    cli.run(main)
