"""The model class in lm-eval itself, on tasks from local files; nothing is fetched."""

from __future__ import annotations

import json
import os
import sys
from functools import partialmethod
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when `datasets` is loaded
pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")

import torch
from lm_eval import simple_evaluate
from lm_eval.api import registry
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import nkat
from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.harness import command, plugin
from nkat.lm.load import load_model
from nkat.lm.tokenizer import Tokenizer
from tests.harness.test_model import CHATML
from tests.support.tiny_models import write_tiny_model
from tests.test_package import PROJECT

ITEMS = [
    {"question": "where is the hen", "choices": ["in the inn", "at home", "in the rain and the inn"], "label": 0},
    {"question": "what is in the inn", "choices": ["the hen", "a hen", "the rain"], "label": 2},
    {"question": "where is the hen", "choices": ["x", "y", "in"], "label": 1},
    {"question": "is it an inn or a hen in the rain", "choices": ["an inn", "a hen", "it"], "label": 1},
]
CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
  cache_dir: {cache}
test_split: train
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ANSWER = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
  cache_dir: {cache}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with two tasks: nkat_choice, nkat_answer."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    for name, text in (("nkat_choice", CHOICE), ("nkat_answer", ANSWER)):
        content = text.format(name=name, data=data.as_posix(), cache=(tmp_path / "cache").as_posix())
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with Θ in it."""
    folder = tmp_path_factory.mktemp("model")
    base = nkat.open_model(write_tiny_model(folder / "tiny.gguf", "llama", chat_template=CHATML))
    path = folder / "tiny.nkat"
    nkat.save(nkat.make_theta(base, rank=4, gamma=0.8), path, base)
    return path


def evaluated(model: Path, tasks: Path, name: str = "nkat_choice", more: str = "", **options: Any) -> dict[str, Any]:
    found = simple_evaluate(
        model=plugin.NkatLM.create_from_arg_string(f"path={model}{more}", {"batch_size": 1, "device": "cpu"}),
        tasks=[name],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    assert found is not None
    return found


def totals(found: dict[str, Any], name: str = "nkat_choice") -> list[list[float]]:
    """ln p of each choice of each item."""
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [[float(each[0]) for each in sample["filtered_resps"]] for sample in samples]


@torch.inference_mode()
def expected(model: Path, gamma: float | None = None) -> list[list[float]]:
    """By the forward pass in float64, an answer at a time."""
    loaded = load_model(model, dtype=torch.float64, gamma=gamma)
    found = []
    for item in ITEMS:
        context = loaded.tokenizer.encode(f"Q: {item['question']}\nA:")
        row = []
        for choice in item["choices"]:
            ids = loaded.tokenizer.encode(f"Q: {item['question']}\nA: {choice}")
            assert ids[: len(context)] == context
            logp = loaded.model(torch.tensor([ids[:-1]]))[0].log_softmax(dim=1)
            row.append(sum(float(logp[i - 1, ids[i]]) for i in range(len(context), len(ids))))
        found.append(row)
    return found


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def test_multiple_choice_equals_the_oracle(model, tasks):
    found = evaluated(model, tasks)
    oracle = expected(model)
    assert flat(totals(found)) == pytest.approx(flat(oracle), abs=1e-4)
    right = [row.index(max(row)) == item["label"] for row, item in zip(oracle, ITEMS, strict=True)]
    assert found["results"]["nkat_choice"]["acc,none"] == sum(right) / len(right)
    assert found["config"]["theta_gamma"] == 0.8
    assert totals(evaluated(model, tasks)) == totals(found)


def test_the_strength_of_theta_counts(model, tasks):
    weak = evaluated(model, tasks, more=",gamma=0.99,threads=1")
    assert weak["config"]["theta_gamma"] == 0.99
    assert flat(totals(weak)) == pytest.approx(flat(expected(model, 0.99)), abs=1e-4)
    base = totals(evaluated(model.with_suffix(".gguf"), tasks))
    assert totals(evaluated(model, tasks, more=",gamma=1")) == base
    assert flat(totals(weak)) != pytest.approx(flat(base), abs=1e-4)
    assert flat(totals(weak)) != pytest.approx(flat(expected(model)), abs=1e-4)


def test_answers_and_chats(model, tasks):
    found = evaluated(model, tasks, "nkat_answer")
    texts = [sample["resps"][0][0] for sample in found["samples"]["nkat_answer"]]
    assert all("\n" not in text for text in texts)
    lm = plugin.NkatLM(path=str(model))
    ask = [
        Instance("generate_until", {}, (item["question"], {"until": ["\n"], "max_gen_toks": 6}), 0) for item in ITEMS
    ]
    assert lm.generate_until(ask, disable_tqdm=True) == texts
    chat = evaluated(model, tasks, "nkat_answer", apply_chat_template=True, system_instruction="be brief")
    prompts = [sample["arguments"][0][0] for sample in chat["samples"]["nkat_answer"]]
    assert prompts[0] == "<system>be brief</><user>where is the hen</><assistant>"


def test_a_text_in_windows_that_roll(model):
    """Every token once, the last window as far back as the others; a text by itself."""
    lm = plugin.NkatLM(path=str(model), max_length=8)
    texts = ["the hen and the inn in the rain, and a hen in an inn", "an inn", ""]
    ask = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    found = lm.loglikelihood_rolling(ask, disable_tqdm=True)
    exact = load_model(model, dtype=torch.float64)
    for text, value in zip(texts, found, strict=True):
        ids, total = exact.tokenizer.encode(text), 0.0
        starts = [*range(0, len(ids), 8)]
        for start in starts:
            end = min(start + 8, len(ids))
            first = max(0, end - 8)  # what the window reads begins a token before
            read = [exact.tokenizer.bos_id or exact.tokenizer.eos_id, *ids][first:end]
            logp = exact.model(torch.tensor([read]))[0].log_softmax(dim=1)
            total += sum(float(logp[i - first, ids[i]]) for i in range(start, end))
        assert value == pytest.approx(total, abs=1e-4)
    assert len(exact.tokenizer.encode(texts[0])) > 16
    assert found[2] == 0


def test_what_was_asked_once_is_kept(model, tasks, tmp_path, monkeypatch):
    kept = str(tmp_path / "kept")
    first = totals(evaluated(model, tasks, use_cache=kept))

    def refuse(*_: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("nkat.harness.model.predict", refuse)
    assert totals(evaluated(model, tasks, use_cache=kept)) == first
    with pytest.raises(AssertionError, match="asked again"):
        evaluated(model, tasks)


def test_lm_eval_finds_it_by_its_entry_point(monkeypatch):
    """As releases that look for plugins register it: lazily, by what the package says of itself."""
    ((name, value),) = PROJECT["entry-points"]["lm_eval.models"].items()
    assert (name, value) == (command.NAME, command.PLUGIN)
    monkeypatch.setattr(registry.model_registry, "_objs", {})
    registry.model_registry.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert registry.get_model("nkat") is plugin.NkatLM


def test_the_command(model, tasks, tmp_path, monkeypatch, capsys):
    arguments = ["--model_args", f"path={model},gamma=0.99", "--tasks", "nkat_choice", "--include_path", str(tasks)]
    for name in command._QUIET:
        monkeypatch.setenv(name, "")
    words = ["nkat-lm-eval", *arguments, "--quiet", "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    # lm-eval's own thousands of tasks, which take it several seconds to list
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager.__init__", partialmethod(TaskManager.__init__, include_defaults=False)
    )
    command.main()
    printed = capsys.readouterr().out
    assert "|nkat_choice|" in printed
    assert printed.startswith("nkat ({'path': ")
    assert os.environ["LMEVAL_LOG_LEVEL"] == "WARNING"
    (path,) = (tmp_path / "out").rglob("results_*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["config"]["theta_gamma"] == 0.99
    assert "nkat" in registry.model_registry
    for words in (["ls", "tasks"], ["run", "--help"], ["--model", "hf", "--tasks", "x"], ["--config", "run.yaml"]):
        assert command._with_model(words) == words


def test_what_cannot_be_is_one_line(model, capsys):
    with pytest.raises(NKATError, match="runs on the processor"):
        plugin.NkatLM(path=str(model), device="cuda:1")
    with pytest.raises(NKATError, match="pretrained is not known") as error:
        plugin.NkatLM(path=str(model), pretrained="x")
    sys.excepthook(error.type, error.value, error.tb)
    assert capsys.readouterr().err == f"error: {error.value}\n"
    sys.excepthook(ValueError, ValueError("another"), None)
    assert "ValueError: another" in capsys.readouterr().err


def test_a_task_that_is_not_there_is_one_line(model, monkeypatch):
    words = ["--model_args", f"path={model}", "--tasks", "no_such_task"]
    monkeypatch.setattr(sys, "argv", ["nkat-lm-eval", *words])
    with pytest.raises(NKATError, match="Tasks not found: no_such_task"):
        command.main()


def test_without_lm_eval_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nkat-lm-eval", "--tasks", "x"])
    monkeypatch.setattr("nkat.harness.command.find_spec", lambda name: None)
    with pytest.raises(NKATError, match=r'pip install "nkat\[eval\]"'):
        command.main()


def test_the_vocabulary_is_the_files(model):
    metadata = GGUFFile.open(model).metadata
    assert plugin.NkatLM(path=str(model)).model.encode("the hen") == Tokenizer.from_metadata(metadata).encode("the hen")
