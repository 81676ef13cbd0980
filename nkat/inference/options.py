"""The inference engine's command line: its flags, and which commands take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.engine.generate import Sampling
from nkat.host import commandline
from nkat.inference.prompts import template_argument
from nkat.lm.load import DTYPES
from nkat.measure.perplexity import DEFAULT_BATCH
from nkat.theta.combine import WeightedFile
from nkat.theta.options import add_lora_arguments, add_theta_arguments

EXAMPLES = """\
  python nkat_inference_engine.py --model models/llama-7b-q4_k_m.nkat --benchmark --seq-len 512 --iterations 100
  python nkat_inference_engine.py --model models/llama-7b-q4_k_m.nkat --benchmark --theta-gamma 0.95
  python nkat_inference_engine.py --model models/llama-7b-q4_k_m.nkat --compare --seq-len 512
  python nkat_inference_engine.py --model model.nkat --perplexity --text wiki.test.raw --chunks 40
  python nkat_inference_engine.py --model model.gguf --theta theta_rank4.bin --perplexity --json result.json
  python nkat_inference_engine.py --model model.gguf --theta style.bin --theta facts.bin:0.5 --perplexity
  python nkat_inference_engine.py --model model-Q4_K_M.gguf --perplexity --reference model-F16.gguf
  python nkat_inference_engine.py --model model.nkat --hellaswag hellaswag_val_full.txt --tasks 400
  python nkat_inference_engine.py --model model.nkat --generate "Once upon a time" --max-tokens 100 --seed 1
  python nkat_inference_engine.py --model model.nkat --generate "Name three rivers." --chat --temperature 0
  python nkat_inference_engine.py --model model.gguf --lora peft-folder --perplexity
  python nkat_inference_engine.py --model model.nkat --generate=--- --max-tokens 20     a prompt that begins with a dash
  python nkat_inference_engine.py --model model.nkat --prompt-file letter.txt --context-shift --max-tokens 5000
  python nkat_inference_engine.py --model model.nkat --chat                             a conversation
  python nkat_inference_engine.py --model model.nkat --gemm
"""


TASKS = ("hellaswag", "winogrande", "multiple_choice")
COMMANDS = ("benchmark", "compare", "perplexity", *TASKS, "generate", "gemm")
CHAT = "chat"  # --chat alone
WRITING = ("generate", CHAT)


# Flags that only some commands take, and what they default to there.
TAKEN_BY: dict[str, dict[str, Any]] = {
    "text": dict.fromkeys(("benchmark", "compare", "perplexity")),
    "seq_len": dict.fromkeys(("benchmark", "compare")),
    "iterations": dict.fromkeys(("benchmark", "compare")),
    "context": dict.fromkeys(("perplexity", *WRITING)),
    "context_shift": {"generate": None},
    "beyond_context": dict.fromkeys(("benchmark", "compare", "perplexity", *TASKS, *WRITING), False),
    "repetitions": {"benchmark": 6, "compare": 6, "gemm": 20},
    "chunks": {"compare": 4, "perplexity": 16},
    "batch": dict.fromkeys(("compare", "perplexity"), DEFAULT_BATCH) | dict.fromkeys(TASKS, 0),
    "reference": {"perplexity": None},
    "kl_base": {"perplexity": None},
    "save_kl_base": {"perplexity": None},
    "tasks": dict.fromkeys(TASKS, 0) | {"hellaswag": 400},
    "output_dir": dict.fromkeys(("benchmark", "compare")),
    "output_format": dict.fromkeys(("benchmark", "compare", "perplexity", *TASKS, "gemm")),
    "max_tokens": {"generate": 256, CHAT: 1024},
    "temperature": dict.fromkeys(WRITING, Sampling().temperature),
    "top_k": dict.fromkeys(WRITING, Sampling().top_k),
    "top_p": dict.fromkeys(WRITING, Sampling().top_p),
    "min_p": dict.fromkeys(WRITING, Sampling().min_p),
    "seed": dict.fromkeys(WRITING),
    "chat": dict.fromkeys(WRITING, False),
    "system": dict.fromkeys(WRITING),
    "template_file": dict.fromkeys(WRITING),
    "template_arg": dict.fromkeys(WRITING),
}
_OPTIONAL = (
    *("text", "seq_len", "iterations", "context", "beyond_context", "output_dir", "output_format", "seed", "chat"),
    *("system", "reference", "kl_base", "save_kl_base", "context_shift", "template_file", "template_arg"),
)
_NUMBERS = TAKEN_BY.keys() - set(_OPTIONAL)
_ALL = 1 << 31  # chunks that no base file has
USUAL_LENGTHS = 512, 100  # of --seq-len and --iterations, where the model was made for as many


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What is asked of the engine: `command`, one of COMMANDS or CHAT, and the flags of their names.

    generate: the prompt, "" for another command, and where it is in prompt_file. Numbers that the command does not take
    are 0.
    task_file: of a command in TASKS;  tasks: at most so many, 0: all
    seq_len, iterations, context: None where the user named none
    context_shift: tokens of the beginning that stay when a text goes on beyond the context; None: it ends there
    template_arg: names and values, in the order of the flags
    """

    command: str
    model: Path
    thetas: tuple[WeightedFile, ...]
    theta_gamma: float | None
    loras: tuple[WeightedFile, ...]
    generate: str
    prompt_file: Path | None
    text: Path | None
    seq_len: int | None
    iterations: int | None
    repetitions: int
    chunks: int
    context: int | None
    context_shift: int | None
    beyond_context: bool | None
    batch: int
    reference: Path | None
    kl_base: Path | None
    save_kl_base: Path | None
    task_file: Path | None
    tasks: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    chat: bool
    system: str | None
    template_file: Path | None
    template_arg: list[tuple[str, Any]] | None
    dtype: str | None
    activations: str | None
    no_cuda: bool
    threads: int | None
    json: str | None
    output_dir: Path | None
    output_format: str | None
    force: bool


CONFLICTS: tuple[tuple[Callable[[EngineOptions], object], str], ...] = (
    (
        lambda o: o.loras and (o.thetas or o.theta_gamma is not None),
        "--lora runs in place of a Θ: --theta and --theta-gamma have no meaning with it (--lora-scaled FILE:SCALE)",
    ),
    (lambda o: o.command == "perplexity" and o.chunks == 0, "--perplexity needs at least one chunk"),
    (lambda o: o.system is not None and not o.chat, "--system goes with --chat"),
    (
        lambda o: not o.chat and (o.template_file or o.template_arg),
        "--template-file and --template-arg go with --chat",
    ),
    (
        lambda o: o.context_shift is not None and o.beyond_context,
        "--context-shift keeps a text within the context, --beyond-context lets it out: only one of them",
    ),
    (lambda o: o.kl_base and o.reference, "--kl-base and --reference are both what is compared with; give one"),
    (lambda o: o.kl_base and (o.text or o.context), "--kl-base has its own text and context"),
    (lambda o: o.kl_base and o.save_kl_base, "--save-kl-base writes what --kl-base would read; give one"),
)


def parse_arguments(argv: Sequence[str] | None = None) -> EngineOptions:
    parser = commandline.parser(
        "Run a language model with and without its Θ, and measure what Θ costs and buys.", EXAMPLES
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FILE", help="a .nkat or .gguf, or hf:OWNER/REPO[:QUANT]")
    add_theta_arguments(
        parser,
        "a Θ made for this model (--theta-only of the converter), in place of the model's own; again: several, added "
        "up, each times its weight (default 1); the model's own file among them stands for its own",
    )
    add("--theta-gamma", type=float, metavar="G", help="strength of Θ in place of the recorded one: lower is stronger")
    add_lora_arguments(parser)
    what = parser.add_argument_group("what to do, one of")
    what.add_argument("--benchmark", action="store_true", help="speed of prefill and decoding, and what Θ costs")
    what.add_argument("--compare", action="store_true", help="without Θ against with Θ: speed, memory, perplexity, TPE")
    what.add_argument(
        "--perplexity",
        action="store_true",
        help="perplexity without and with Θ on the same chunks, and how far Θ takes the predictions (KL divergence)",
    )
    what.add_argument("--hellaswag", type=Path, metavar="FILE", help="score on tasks in llama-perplexity's text form")
    what.add_argument("--winogrande", type=Path, metavar="FILE", help="the same, of its .csv")
    what.add_argument("--multiple-choice", type=Path, metavar="FILE", help="the same, of its .bin (ARC, MMLU, ...)")
    what.add_argument(
        "--generate",
        type=commandline.any_text,
        metavar="PROMPT",
        help="continue a text, streaming; Ctrl-C stops (one that is the name of a flag: --generate=--model)",
    )
    what.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help='the same with the text of a file; "-" for stdin'
    )
    what.add_argument("--gemm", action="store_true", help="each shape of layer alone, with and without the star term")
    measure = parser.add_argument_group("measuring").add_argument
    measure("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on (default: Python's documentation)")
    measure("--seq-len", type=commandline.positive_int, metavar="N", help="tokens to prefill (default 512)")
    measure("--iterations", type=commandline.positive_int, metavar="N", help="decode steps behind them (default 100)")
    measure("--repetitions", type=commandline.positive_int, metavar="N", help="times over (default 6; --gemm 20)")
    measure(
        "--chunks",
        type=commandline.non_negative_int,
        metavar="N",
        help="chunks for perplexity, at most (default 16, of --kl-base all; --compare 4, and 0 leaves perplexity out)",
    )
    measure(
        "--context",
        type=commandline.positive_int,
        metavar="N",
        help="tokens of a chunk of --perplexity (default 512), or of a prompt and its text together (default: as many "
        "as the model was made for; a conversation: 8192 at most)",
    )
    measure(
        "--beyond-context",
        action="store_true",
        default=None,
        help="run more tokens than the model was made for; otherwise they are refused",
    )
    measure(
        "--batch",
        type=commandline.positive_int,
        metavar="N",
        help="chunks in one forward pass (default 4); of tasks, texts (default: as many as are worth it)",
    )
    measure(
        "--reference",
        type=Path,
        metavar="FILE",
        help="a model with the same vocabulary (its Θ left out) that --perplexity measures the divergence from",
    )
    measure(
        "--kl-base",
        "--kl-divergence-base",
        type=Path,
        metavar="FILE",
        help="the same by what llama-perplexity or --save-kl-base wrote, on its text (default: all chunks)",
    )
    measure(
        "--save-kl-base",
        "--save-all-logits",
        type=Path,
        metavar="FILE",
        help="write what the divergence is measured from (the model without Θ, or --reference) in that form",
    )
    measure(
        "--tasks",
        type=commandline.non_negative_int,
        metavar="N",
        help="at most so many, the same that llama-perplexity takes (default: HellaSwag 400, else all; 0 all)",
    )
    text = parser.add_argument_group("generating").add_argument
    text("--max-tokens", type=commandline.positive_int, metavar="N", help="at most so many (default 256)")
    text("--temperature", type=float, metavar="T", help="0 takes the best token each time (default 0.8)")
    text(
        "--top-k",
        type=commandline.non_negative_int,
        metavar="K",
        help="draw from the K likeliest tokens (default 40; 0 off)",
    )
    text("--top-p", type=float, metavar="P", help="draw from the likeliest that sum to P (default 0.95; 1 off)")
    text("--min-p", type=float, metavar="P", help="draw from those P times as likely as the best (default 0.05; 0 off)")
    text(
        "--seed",
        type=commandline.seed,
        metavar="N",
        help="the same seed gives the same text (default: a new one)",
    )
    text(
        "--context-shift",
        nargs="?",
        type=commandline.non_negative_int,
        const=0,
        metavar="KEEP",
        help="go on when the context is full, without the older half of what is behind the first KEEP tokens "
        "(default 0; without this flag the text ends there)",
    )
    text(
        "--chat",
        action="store_true",
        default=None,
        help="put the prompt into the model's own chat template; without a prompt: a conversation, line by line from "
        "the terminal or stdin",
    )
    text("--system", type=commandline.any_text, metavar="TEXT", help="instructions for the model, with --chat")
    text("--template-file", type=Path, metavar="FILE", help="a chat template (Jinja) in place of the model's own")
    text(
        "--template-arg",
        type=template_argument,
        action="append",
        metavar="NAME=VALUE",
        help="a variable for the chat template, such as enable_thinking=false: JSON, or else text; may be repeated",
    )
    add("--dtype", choices=DTYPES, help="of the computation (default: float32 on the processor, bfloat16 on CUDA)")
    add(
        "--activations",
        choices=("float", "int8"),
        help="int8: round the layers' inputs as llama.cpp does (default: int8 on the processor, but exact for "
        "--perplexity and on CUDA)",
    )
    add("--no-cuda", action="store_true", help="use the processor even if there is a GPU")
    add("--threads", type=commandline.thread_count, metavar="N", help="processor threads (default: torch's choice)")
    add("--json", metavar="FILE", help='write a machine-readable record; "-" for stdout')
    add(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="where --benchmark and --compare leave their records (default: a new folder in output/benchmark or "
        "output/compare; none for --benchmark with --json)",
    )
    commandline.add_output_format(parser)
    add("--force", action="store_true", help="replace existing files")
    parsed = parser.parse_args(argv)
    chosen = [name for name in (*COMMANDS, "prompt_file") if getattr(parsed, name) not in (None, False)]
    if not chosen and parsed.chat:
        chosen = [CHAT]
    if len(chosen) != 1:
        problem = "say what to do, one of" if not chosen else "one thing at a time, give only one of"
        flags = (*COMMANDS, "prompt_file", *([] if chosen else [CHAT]))
        parser.error(f"{problem} {', '.join(_flag(name) for name in flags)}")
    command = "generate" if chosen[0] == "prompt_file" else chosen[0]
    values = {}
    for name, defaults in TAKEN_BY.items():
        values[name] = getattr(parsed, name)
        if values[name] is None:
            values[name] = defaults.get(command, 0 if name in _NUMBERS else None)
        elif command not in defaults:
            parser.error(f"{_flag(name)} has no meaning with {_flag(command)}")
    if parsed.kl_base is not None and parsed.chunks is None:
        values["chunks"] = _ALL
    task_file = getattr(parsed, command) if command in TASKS else None
    values |= {"generate": parsed.generate or "", "task_file": task_file}
    options = commandline.taken(EngineOptions, parsed, command=command, **values)
    commandline.check_conflicts(parser, options, CONFLICTS)
    return options


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
