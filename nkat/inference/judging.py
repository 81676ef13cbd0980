"""`--perplexity` and the tasks: what is measured of a loaded model, as records and the text that is made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

from nkat.host.console import counted, note
from nkat.host.files import check_apart, check_output
from nkat.host.tables import Column, Table
from nkat.inference.options import EngineOptions
from nkat.lm.load import LoadedModel
from nkat.measure.base_file import BaseFile
from nkat.measure.columns import CHANGE, PERPLEXITY, TPE
from nkat.measure.compare import Base, save_base
from nkat.measure.divergence import divergence_table
from nkat.measure.judge import Beside, Judge, Passages, Score
from nkat.measure.perplexity import PairedChange, change_text, paired
from nkat.measure.task_scores import Solved, solve
from nkat.measure.tasks import Blank, Choice
from nkat.measure.tpe import tpe
from nkat.theta.set import LoraSet, TermSet

Record = dict[str, Any]
FROM_REFERENCE = Column(
    "from the reference", ("from_reference_percent", "from_reference_percent_stderr"), change_text
)  # and CHANGE is what Θ changes, whatever stands beside it
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


def measure_perplexity(
    judge: Judge, theta: TermSet | None, base: Base | None, label: str
) -> tuple[Record, list[Table], str]:
    """The same chunks without Θ and, where there is one, with it; beside another base where one is given.

    label: of the arm with Θ, for people. Returns the record, its tables, and what they say.
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
    verdict = "" if score is None else what_it_says(score.change, _subject(theta))
    return record, _perplexity_tables(record, label), verdict


def _perplexity_tables(record: Mapping[str, Any], label: str) -> list[Table]:
    """The perplexities, and below them the divergence where there is something to diverge from."""
    labels = dict(zip(ARMS, ("without Θ", label), strict=True))
    names = [name for name in ARMS if f"{name}_perplexity" in record]
    reference = record.get("reference")
    beside = {name: record.get(f"{name}_beside_reference") for name in names}
    rows: list[dict[str, Any]] = []
    if reference is not None:
        rows.append({"arm": "reference", **{key: reference[key] for key in PERPLEXITY.names}})
    for name in names:
        row = {"arm": labels[name], "tpe": record[f"{name}_tpe"]}
        row |= {key: record[f"{name}_{key}"] for key in PERPLEXITY.names}
        if found := beside[name]:
            row |= {key: found[of] for key, of in zip(FROM_REFERENCE.names, CHANGE.names, strict=True)}
        if name == "nkat":
            own = ("perplexity_change_percent", "perplexity_change_stderr")
            row |= {key: record[of] for key, of in zip(CHANGE.names, own, strict=True)}
        rows.append(row)
    changes = [CHANGE] if reference is None else [CHANGE, FROM_REFERENCE]
    tables = [Table("perplexity", [Column("", "arm"), PERPLEXITY, *changes, TPE], rows)]
    if reference is not None:
        columns = {labels[name]: found["divergence"] for name, found in beside.items() if found}
        tables.append(divergence_table(columns, f"\nfrom {reference['file']}:"))
    elif divergence := record.get("divergence"):
        tables.append(divergence_table({label: divergence}, "\nfrom the model without Θ:"))
    return tables


def what_it_says(change: PairedChange, subject: str = "Θ") -> str:
    """What the paired difference says, at two standard errors. subject: what makes it"""
    if not change.clear:
        return f"{subject} makes no difference that this text can show (within two standard errors)."
    better = change.percent < 0
    return f"{subject} makes this model {'better' if better else 'worse'} on this text (beyond two standard errors)."


def _subject(theta: TermSet | None) -> str:
    return "The LoRA" if isinstance(theta, LoraSet) else "Θ"


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
    options: EngineOptions, loaded: LoadedModel, theta: TermSet | None, tasks: Sequence[Choice | Blank], label: str
) -> tuple[Record, Table, str]:
    """How many tasks of a file each arm solves. label: of the arm with Θ, None where there is none"""
    started = perf_counter()
    arms = 1 if loaded.gamma is None else 2
    title = _TITLES[options.command]
    found = solve(
        loaded, tasks, arms=arms, batch=options.batch or None, progress=title, beyond=bool(options.beyond_context)
    )
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
    rows: list[dict[str, Any]] = []
    for name, arm_label in zip(ARMS[:arms], ("without Θ", label), strict=False):
        arm = record[name]
        low, high = arm["interval_percent"]
        rows.append({**arm, "arm": arm_label, "low_percent": low, "high_percent": high, "tasks": len(tasks)})
    rows.append({"arm": "chance", "score_percent": record["chance_percent"]})
    columns = [
        Column("", "arm"),
        Column("score, %", ("score_percent", "score_percent_stderr"), _score_text),
        Column("95 % sure", ("low_percent", "high_percent"), "{:.2f} to {:.2f}".format),
        Column("solved", ("solved", "tasks"), "{} of {}".format),
    ]
    words = ""
    if "gained" in record:
        gained, lost = record["gained"], record["lost"]
        words = f"{_subject(theta)} solves {gained} more, and fails at {lost} that the model solves without it."
    return record, Table(options.command, columns, rows, counted(len(tasks), f"{title} task")), words


def _score_text(percent: float, stderr: float | None) -> str:
    return f"{percent:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _changes(without: Solved, with_theta: Solved) -> Record:
    return {
        "gained": int((with_theta.right & ~without.right).sum()),
        "lost": int((without.right & ~with_theta.right).sum()),
    }
