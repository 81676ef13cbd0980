"""Speed and memory of a fit of Θ beside PEFT's LoRA: same model, same tokens, same threads, taking turns.

    python -m benchmarks.fitting models/smollm2.gguf --text wiki.txt --peft-python ~/peft/bin/python
    python -m benchmarks.fitting models/smollm2.gguf --threads 2 --steps 5 --turns 3

PEFT runs in a Python of its own (`pip install transformers peft gguf accelerate`): transformers unpacks the same GGUF
to bfloat16, LoRA of rank 2r (the bytes of a Θ of rank r in 16 bits would be as many) goes on the same layers, AdamW
takes the steps. Each side is measured as it comes, where there is room for all that a fit would keep in memory, and in
its other setting: `--no-fit-fast` here, gradient checkpointing there. A turn is a process of its own with two steps to
warm up; tokens a second are the median over the steps after them, memory is the most that the process held while it
learned, loading left out. Without PEFT only this toolkit is measured, and the page says so. Run nothing else. The last
line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.fitting")

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.host import commandline, console, hardware
from nkat.host.console import format_bytes, note, say
from nkat.host.environment import users_environment
from nkat.host.record import print_record, write_json
from nkat.host.tables import Column, Table, show
from nkat.lm.load import load_model
from nkat.measure.texts import load_text
from nkat.sources.fit.data import batch_at, fit_text, split_validation
from nkat.sources.fit.descent import FitData, FitSettings, Progress, fit, zero_start
from nkat.sources.fit.room import keep

WARM_UP = 2
LAYERS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
WAYS = ("nkat", "nkat, --no-fit-fast", "PEFT", "PEFT, checkpointing")

# What the other Python runs: it has neither this toolkit nor its rules, only transformers and peft.
_PEFT = """
import json, sys, time
import torch, transformers
from peft import LoraConfig, get_peft_model

job = json.loads(sys.argv[1])
transformers.logging.set_verbosity_error()
torch.set_num_threads(job["threads"])
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], gguf_file=job["file"], dtype=torch.bfloat16)
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=job["rank"], lora_alpha=job["rank"], target_modules=names))
if job["checkpointing"]:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
model.config.use_cache = False
model.train()
learned = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=True)
open("/proc/self/clear_refs", "w").write("5")  # the peak of memory from here on
times, losses = [], []
for batch in json.load(open(job["batches"])):
    tokens = torch.tensor(batch)
    started = time.perf_counter()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(learned, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - started)
    losses.append(float(loss))
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": times, "losses": losses, "peak_bytes": peak}))
"""


def ours(model: Path, text: str | None, settings: FitSettings, fast: bool, threads: int) -> dict[str, Any]:
    """Times of the steps, losses and peak memory of a fit in this process."""
    hardware.set_threads(threads)
    device = torch.device("cpu")
    dtype = torch.bfloat16 if hardware.computes_bfloat16(device) else torch.float32
    loaded = load_model(model, thetas={}, gamma=1.0, dtype=dtype)
    learned, validation = split_validation(fit_text(loaded.tokenizer, load_text(text)), "text", settings.context)
    layers = loaded.model.star_linears()
    first = batch_at(learned, 0, 1, settings.context, settings.seed).tokens
    kept = keep(loaded.model, [*loaded.model.multipliers().values()], first, settings.batch, fast)
    names = [name for name in layers if name.startswith("blk.") and name.split(".")[2] in LAYERS]
    starts = {"zero": zero_start([layers[name].shape for name in names], settings.rank, 0)}
    times, losses, last = [], [], 0.0

    def after_step(_: object, loss: float) -> None:
        nonlocal last
        now = time.perf_counter()
        times.append(now - last)
        losses.append(loss)
        last = time.perf_counter()

    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory from here on
    last = time.perf_counter()
    progress = Progress(after_step, lambda: False)
    fit(
        loaded.model, names, starts, FitData(learned, validation), settings, progress, keep_activations=kept.activations
    )
    times.pop()  # it has the validation at the end
    return {"seconds": times, "losses": losses, "peak_bytes": _peak()}


def _peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _child(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, env=users_environment(), check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise NKATError(f"{command[0]}: {said[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def has_peft(python: str) -> bool:
    command = [python, "-c", "import transformers, peft"]
    try:
        return subprocess.run(command, capture_output=True, env=users_environment(), check=False).returncode == 0
    except OSError as error:
        raise NKATError(f"{python}: cannot be run: {error.strerror}") from None


def measure(options: Any, threads: int) -> dict[str, list[dict[str, Any]]]:
    """The runs of each way, in turns."""
    steps = WARM_UP + options.steps + 1
    loaded = load_model(options.model, thetas={}, gamma=1.0)
    text, _ = split_validation(fit_text(loaded.tokenizer, load_text(options.text)), "text", 256)
    batches = [batch_at(text, 4 * i, 4, 256, 0).tokens.tolist() for i in range(steps)]
    del loaded
    ways = WAYS if has_peft(options.peft_python) else WAYS[:2]
    if len(ways) < len(WAYS):
        note(f"{options.peft_python}: has no transformers and peft; only this toolkit is measured")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder, console.bar(options.turns * len(ways), "fitting", "run") as bar:
        tokens, program = Path(folder) / "batches.json", Path(folder) / "peft_fit.py"
        tokens.write_text(json.dumps(batches))
        program.write_text(_PEFT)
        for _ in range(options.turns):
            for way in ways:
                second = way in (WAYS[1], WAYS[3])
                if way.startswith("PEFT"):
                    job = {"threads": threads, "rank": 2 * options.rank, "checkpointing": second}
                    job |= {"folder": str(options.model.parent.resolve()), "file": options.model.name}
                    command = [options.peft_python, str(program), json.dumps(job | {"batches": str(tokens)})]
                else:
                    command = [sys.executable, "-m", "benchmarks.fitting", str(options.model), "--child"]
                    command += ["--rank", str(options.rank), "--steps", str(steps), "--threads", str(threads)]
                    command += ["--text", options.text] if options.text else []
                    command += ["--no-fit-fast"] if second else []
                runs[way].append(_child(command))
                bar.update()
    return runs


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [1024 / median(run["seconds"][WARM_UP:]) for run in runs]
    return {
        "tokens_per_second": median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "first_loss": runs[0]["losses"][0],
    }


def main() -> None:
    parser = commandline.parser("Fits beside PEFT's LoRA.", "  python -m benchmarks.fitting a.gguf --threads 2")
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--text", metavar="FILE", help="to learn from (default: Python's documentation)")
    parser.add_argument("--rank", type=commandline.positive_int, default=4, metavar="N")
    parser.add_argument("--steps", type=commandline.positive_int, default=5, metavar="N", help="measured in a turn")
    parser.add_argument("--turns", type=commandline.positive_int, default=3, metavar="N")
    parser.add_argument("--threads", type=commandline.thread_count, metavar="N")
    parser.add_argument(
        "--peft-python", default=sys.executable, metavar="PATH", help="a Python with transformers, peft"
    )
    parser.add_argument("--no-fit-fast", action="store_true", help="with --child: as of the converter")
    parser.add_argument(
        "--child", action="store_true", help="one run of this toolkit alone, as the benchmark starts it"
    )
    commandline.add_output_format(parser)
    options = parser.parse_args()
    threads = hardware.set_threads(options.threads)
    if options.child:
        steps = options.steps
        settings = FitSettings(options.rank, 0.97, steps=steps, validate_every=steps)
        write_json(ours(options.model, options.text, settings, not options.no_fit_fast, threads), "-")
        return
    records = {way: summary(runs) for way, runs in measure(options, threads).items()}
    peer = max((r["tokens_per_second"] for way, r in records.items() if way.startswith("PEFT")), default=None)
    rows = []
    for way, r in records.items():
        rows.append({"way": way, **r, "over_peft": None if peer is None else r["tokens_per_second"] / peer})
    columns = [
        Column("batch 4 x 256", "way"),
        Column("tokens/s", ("tokens_per_second", "slowest", "fastest"), "{:.0f} ({:.0f}-{:.0f})".format),
        Column("over PEFT's best", "over_peft", ".2f"),
        Column("peak memory", "peak_bytes", format_bytes),
        Column("loss of step 1", "first_loss", ".4f"),
    ]
    show(Table("fitting", columns, rows, conditions={"model": options.model.name, "rank": options.rank}))
    say()
    machine = hardware.describe(torch.device("cpu"))
    print_record({"model": options.model.name, "rank": options.rank, "ways": records, "machine": machine})
