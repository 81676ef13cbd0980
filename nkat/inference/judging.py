"""`--perplexity` and the tasks: what is measured of a loaded model, as records and the text that is made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

from nkat.host.console import counted, format_table, note
from nkat.host.files import check_apart, check_output
from nkat.inference.options import EngineOptions
from nkat.lm.load import LoadedModel
from nkat.measure.base_file import BaseFile
from nkat.measure.compare import Base, save_base
from nkat.measure.divergence import divergence_table
from nkat.measure.judge import Beside, Judge, Passages, Score
from nkat.measure.perplexity import PairedChange, change_text, paired, perplexity_text
from nkat.measure.task_scores import Solved, solve
from nkat.measure.tasks import Blank, Choice
from nkat.measure.tpe import tpe
from nkat.theta.set import ThetaSet

Record = dict[str, Any]
ARMS = ("baseline", "nkat")  # as records name them
_TITLES = {"hellaswag": "HellaSwag", "winogrande": "Winogrande", "multiple_choice": "multiple-choice"}


def check_judging(options: EngineOptions) -> None:
    """Raises NKATError where the base file cannot be written: before time is spent."""
    if options.save_kl_base is None:
        return
    check_apart({"--json": options.json, "--save-kl-base": options.save_kl_base})
    thetas = [file.path for file in options.thetas]
    inputs = [options.model, *thetas, options.text, options.reference]
    check_output(options.save_kl_base, options.force, [path for path in inputs if path is not None])


def base_passages(base: BaseFile, loaded: LoadedModel, chunks: int) -> Passages:
    """The text of a base file, as far as it is asked for. As in any other, BOS begins a chunk where texts get one."""
    tokens = base.tokens[:chunks].clone()
    if loaded.tokenizer.adds_bos and loaded.tokenizer.bos_id is not None:
        tokens[:, 0] = loaded.tokenizer.bos_id
    return Passages(tokens, None, base.path.name)


def measure_perplexity(judge: Judge, theta: ThetaSet | None, base: Base | None, label: str) -> tuple[Record, str]:
    """The same chunks without Θ and, where there is one, with it; beside another base where one is given.

    label: of the arm with Θ, for people
    """
    started = perf_counter()
    gamma = judge.loaded.gamma
    score: Score | None = None
    beside: list[Beside] = []
    if base is None:
        score = None if theta is None else judge.score(theta, gamma)
        without = judge.without()  # scored beside the other arm
    else:
        reference, beside = judge.beside(base, theta, gamma)
        without = beside[0].perplexity
        if theta is not None:
            score = Score(beside[1].perplexity, paired(without, beside[1].perplexity), judge.ratio(theta))
    record: Record = {
        "seconds": perf_counter() - started,
        "chunks": without.chunks,
        "context": without.context,
        "scored_tokens": without.tokens,
        "baseline_perplexity": without.ppl,
        "baseline_perplexity_stderr": without.stderr,
        "baseline_tpe": tpe(without.ppl, 1.0),
    }
    if score is not None:
        record |= {
            "nkat_perplexity": score.perplexity.ppl,
            "nkat_perplexity_stderr": score.perplexity.stderr,
            "perplexity_change_percent": score.change.percent,
            "perplexity_change_stderr": score.change.percent_stderr,
            "byte_ratio": score.byte_ratio,
            "nkat_tpe": score.tpe,
            "divergence": score.divergence and score.divergence.record(),
        }
    if base is not None:
        path = base.path if isinstance(base, BaseFile) else base.file.path
        arms = {f"{name}_beside_reference": arm.record() for name, arm in zip(ARMS, beside, strict=False)}
        record |= {"reference": {"file": str(path), **reference.record()}, **arms}
    verdict = "" if score is None else f"\n\n{what_it_says(score.change)}"
    return record, f"{_perplexity_tables(record, label)}{verdict}"


def _perplexity_tables(record: Mapping[str, Any], label: str) -> str:
    """The perplexities, and below them the divergence where there is something to diverge from."""
    labels = dict(zip(ARMS, ("without Θ", label), strict=True))
    names = [name for name in ARMS if f"{name}_perplexity" in record]
    reference = record.get("reference")
    beside = {name: record.get(f"{name}_beside_reference") for name in names}
    rows = []
    if reference is not None:
        rows.append(["reference", perplexity_text(reference["perplexity"], reference["perplexity_stderr"]), "", ""])
    for name in names:
        change = ""
        if found := beside[name]:
            change = change_text(found["change_percent"], found["change_percent_stderr"])
        elif name == "nkat":
            change = change_text(record["perplexity_change_percent"], record["perplexity_change_stderr"])
        figure = perplexity_text(record[f"{name}_perplexity"], record[f"{name}_perplexity_stderr"])
        rows.append([labels[name], figure, change, f"{record[f'{name}_tpe']:.6f}"])
    text = format_table(rows, ["", "perplexity", "change" if reference is None else "from the reference", "TPE"])
    if reference is not None:
        columns = {labels[name]: found["divergence"] for name, found in beside.items() if found}
        return f"{text}\n\nfrom {reference['file']}:\n\n{divergence_table(columns)}"
    if divergence := record.get("divergence"):
        text += f"\n\nfrom the model without Θ:\n\n{divergence_table({label: divergence})}"
    return text


def what_it_says(change: PairedChange) -> str:
    """What the paired difference says, at two standard errors."""
    if not change.clear:
        return "Θ makes no difference that this text can show (within two standard errors)."
    better = change.percent < 0
    return f"Θ makes this model {'better' if better else 'worse'} on this text (beyond two standard errors)."


def write_base(options: EngineOptions, judge: Judge, base: Base | None) -> None:
    """What the divergence was measured from, as a file: `--save-kl-base`."""
    assert options.save_kl_base is not None
    if judge.passages.counted is not None:
        note("note: a base file does not say which tokens are the assistant's: it has all of the second halves")
    source = base.model if isinstance(base, LoadedModel) else judge.loaded.model
    save_base(
        options.save_kl_base,
        source,
        judge.passages.chunks,
        batch=options.batch,
        progress=f"writing {options.save_kl_base.name}",
        force=options.force,
    )


def measure_tasks(
    options: EngineOptions, loaded: LoadedModel, tasks: Sequence[Choice | Blank], label: str
) -> tuple[Record, str]:
    """How many tasks of a file each arm solves. label: of the arm with Θ, None where there is none"""
    started = perf_counter()
    arms = 1 if loaded.gamma is None else 2
    title = _TITLES[options.command]
    found = solve(loaded, tasks, arms=arms, batch=options.batch, progress=title, beyond=bool(options.beyond_context))
    record: Record = {
        "seconds": perf_counter() - started,
        "task": options.command,
        "task_file": str(options.task_file),
        "tasks": len(tasks),
        "chance_percent": found[0].chance_percent,
        **{name: arm.record() for name, arm in zip(ARMS, found, strict=False)},
    }
    if len(found) == 2:
        record |= _changes(*found)
    rows = []
    for name, arm_label in zip(ARMS[:arms], ("without Θ", label), strict=False):
        arm = record[name]
        low, high = arm["interval_percent"]
        score = f"{arm['score_percent']:.4f} ± {arm['score_percent_stderr']:.4f}"
        rows.append([arm_label, score, f"{low:.2f} to {high:.2f}", f"{arm['solved']} of {len(tasks)}"])
    rows.append(["chance", f"{record['chance_percent']:.4f}", "", ""])
    text = f"{counted(len(tasks), f'{title} task')}\n\n" + format_table(rows, ["", "score, %", "95 % sure", "solved"])
    if "gained" in record:
        text += f"\n\nΘ solves {record['gained']} more, and fails at {record['lost']} that the model solves without it."
    return record, text


def _changes(without: Solved, with_theta: Solved) -> Record:
    return {
        "gained": int((with_theta.right & ~without.right).sum()),
        "lost": int((without.right & ~with_theta.right).sum()),
    }
