"""lm-evaluation-harness by the model `nkat` beside its own `hf`, on the same weights and a task made of a text.

    python -m benchmarks.harness models/smollm2.gguf --text wiki.test.raw --hf-python ~/hf/bin/python
    python -m benchmarks.harness models/smollm2.gguf --text wiki.test.raw --items 15 --shots 5

A question is thirty words of a paragraph; the answers are the next ones, and those of three other paragraphs. `hf` runs
in a Python of its own (`pip install "lm_eval[hf]" gguf`), where transformers unpacks the same GGUF to float32; its
batch is the fastest of those that --hf-batch names. Each way is a process of its own. Speeds are requests per second of
processor time, so that other programs on the machine count less; loading is left out. Without the other Python only
this toolkit is measured. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.harness")

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.host import commandline, hardware
from nkat.host.console import format_bytes, say
from nkat.host.environment import users_environment
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat.measure.texts import load_text

TASK = "benchmark_choice"
_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {data}, cache_dir: {cache}}}
test_split: train
fewshot_split: train
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

# What either Python runs; the other one has nothing of this toolkit.
_RUN = """
import json, os, resource, sys, time
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
job = json.loads(sys.argv[1])
import torch
torch.set_num_threads(job["threads"])
import lm_eval
from lm_eval.tasks import TaskManager
if job["way"] == "hf":
    from lm_eval.models.huggingface import HFLM
    lm = HFLM(pretrained=job["folder"], gguf_file=job["file"], dtype="float32", device="cpu", batch_size=job["batch"])
else:
    from nkat.harness.plugin import NkatLM
    path = os.path.join(job["folder"], job["file"])
    lm = NkatLM(path=path, activations=job["activations"], threads=job["threads"])
usual, spent = lm.loglikelihood, []
def timed(requests, **more):
    before = time.process_time()
    found = usual(requests, **more)
    spent.append(time.process_time() - before)
    return found
lm.loglikelihood = timed
tasks = TaskManager(include_path=job["tasks"], include_defaults=False)
found = lm_eval.simple_evaluate(
    model=lm, tasks=[job["task"]], num_fewshot=job["shots"], task_manager=tasks, bootstrap_iters=0
)
samples = sorted(found["samples"][job["task"]], key=lambda sample: sample["doc_id"])
lines = [float(one[0]) for sample in samples for one in sample["filtered_resps"]]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
accuracy = found["results"][job["task"]]["acc,none"]
print(json.dumps({"logp": lines, "seconds": sum(spent), "peak_bytes": peak, "accuracy": accuracy}))
"""


def write_task(folder: Path, text: str, count: int, seed: int = 0) -> None:
    """A task of so many questions, in files. Raises NKATError for a text with fewer paragraphs that are long enough."""
    paragraphs = [words for line in text.split("\n") if len(words := line.split()) > 60]
    if len(paragraphs) < max(count, 4):
        raise NKATError(f"the text has {len(paragraphs)} paragraphs of 60 words, and {max(count, 4)} are needed")
    rng = random.Random(seed)
    endings = [" ".join(words[45 : 45 + rng.randint(6, 14)]) for words in paragraphs]
    lines = []
    for number, words in enumerate(paragraphs[:count]):
        choices = rng.sample(endings[:number] + endings[number + 1 :], 3)
        label = rng.randrange(4)
        choices.insert(label, endings[number])
        lines.append(json.dumps({"question": " ".join(words[15:45]), "choices": choices, "label": label}))
    data = folder / "items.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    yaml = _YAML.format(task=TASK, data=json.dumps(str(data)), cache=json.dumps(str(folder / "cache")))
    (folder / f"{TASK}.yaml").write_text(yaml, encoding="utf-8")


def run(python: str, job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-c", _RUN, json.dumps(job)], capture_output=True, text=True, env=users_environment(), check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise NKATError(f"{python}: {said[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(options: Any, threads: int) -> dict[str, dict[str, Any]]:
    """What each way found, of `hf` with the fastest of its batches."""
    with tempfile.TemporaryDirectory() as name:
        write_task(Path(name), load_text(options.text).content, options.items)
        model = options.model.resolve()
        job = {"task": TASK, "tasks": name, "shots": options.shots, "threads": threads}
        job |= {"folder": str(model.parent), "file": model.name}
        found = {
            "nkat": run(sys.executable, {**job, "way": "nkat", "activations": "float"}),
            "nkat, int8": run(sys.executable, {**job, "way": "nkat", "activations": "int8"}),
        }
        if options.hf_python is not None:
            tried = {
                f"hf, batch {batch}": run(options.hf_python, {**job, "way": "hf", "batch": batch})
                for batch in options.hf_batch
            }
            best = min(tried, key=lambda way: float(tried[way]["seconds"]))
            found[best] = tried[best]
    return found


def rows(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way; differences are from the last one, which is `hf` where it was run."""
    *_, peer = found.values()
    made = []
    for way, one in found.items():
        apart = max(abs(a - b) for a, b in zip(one["logp"], peer["logp"], strict=True))
        speed = len(one["logp"]) / one["seconds"]
        over = one["seconds"] and peer["seconds"] / one["seconds"]
        made.append({**one, "way": way, "requests_per_second": speed, "over_peer": over, "apart": apart})
    return made


def main() -> None:
    parser = commandline.parser(
        "lm-evaluation-harness here and by transformers.", "  python -m benchmarks.harness a.gguf --text wiki.txt"
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--text", metavar="FILE", help="to make questions of; paragraphs are lines")
    parser.add_argument("--items", type=commandline.positive_int, default=50, metavar="N", help="questions")
    parser.add_argument(
        "--shots", type=commandline.non_negative_int, default=0, metavar="N", help="examples before each"
    )
    parser.add_argument("--threads", type=commandline.thread_count, default=1, metavar="N")
    parser.add_argument("--hf-python", metavar="PATH", help="a Python with lm_eval[hf] and gguf")
    parser.add_argument("--hf-batch", type=commandline.positive_int, nargs="+", default=[1, 8], metavar="N")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    found = measure(options, hardware.set_threads(options.threads))
    made = rows(found)
    columns: Sequence[Column] = [
        Column(f"{options.shots} examples", "way"),
        Column("requests/s of a processor", "requests_per_second", ".1f"),
        Column("over the last", "over_peer", ".2f"),
        Column("largest difference of ln p from it", "apart", ".1e"),
        Column("accuracy", "accuracy", ".3f"),
        Column("peak memory", "peak_bytes", format_bytes),
    ]
    show(Table("harness", columns, made, conditions={"model": options.model.name, "shots": options.shots}))
    say()
    machine = hardware.describe(torch.device("cpu"))
    print_record({"model": options.model.name, "shots": options.shots, "ways": made, "machine": machine})
