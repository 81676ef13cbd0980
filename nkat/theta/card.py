"""The page beside an adapter that says what it is: `README.md`, with the front matter of Hugging Face's model cards.

What is on it was measured or is recorded in the files; where a figure is missing the page says that it is.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.host.files import atomic_output
from nkat.host.tables import Column, Table, as_markdown, markdown
from nkat.theta.algebra import coupling
from nkat.theta.set import CALIBRATION_KEY, DECAY_KEY, GUARD_PREFIX, HELDOUT_PREFIX, KEEP_KEY, UNFINISHED_KEY, ThetaSet
from nkat.version import __version__

CARD = "README.md"
_MARK = "# written by the NKAT toolkit"
_REPOSITORIES = ("general.source.huggingface.repository", "general.repo_url", "general.source.repo_url")
_HUB = "https://huggingface.co/"
_SOURCES = {
    "weight": "from the model's weights alone: no text was learned",
    "residual": "from what a better copy of the model has and this one lost",
    "fit": "by gradient descent on a text",
}
_SETTINGS = {
    "nkat.fit.start": "start",
    "nkat.fit.learning_rate": "peak learning rate",
    "nkat.fit.steps": "steps",
    "nkat.fit.kept_step": "kept: the factors after step",
    "nkat.calibration.tokens": "tokens to learn from",
}


@dataclass(frozen=True, slots=True)
class Card:
    """What is said of one Θ.

    base: the base model's metadata, for its name and licence;  gamma: the strength of what is beside the page
    files: what lies beside the page, by name;  lora: which of them is an adapter for llama.cpp, if one is
    peft: whether the folder is one that PEFT loads
    text: the name of the text that was learned, where that is known
    gains, prices: what was measured at home and elsewhere;  commands: by what they are for;  facts: machine, versions
    """

    theta: ThetaSet
    base: Mapping[str, Any]
    gamma: float
    files: Mapping[str, str]
    lora: str | None = None
    peft: bool = False
    text: str | None = None
    gains: Sequence[Table] = ()
    prices: Sequence[Table] = ()
    commands: Mapping[str, str] | None = None
    facts: Mapping[str, Any] | None = None


def hub_repository(metadata: Mapping[str, Any]) -> str | None:
    """Of which repository of Hugging Face's hub, "owner/name", a GGUF says that it is made; None where it does not."""
    found = (metadata.get(key) for key in _REPOSITORIES)
    name = next((value for value in found if isinstance(value, str)), "").removeprefix(_HUB).strip("/")
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def may_write(path: Path) -> bool:
    """Whether there is no such page yet, or one that the toolkit wrote."""
    try:
        return _MARK in path.read_text(encoding="utf-8")[:400]
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False


def write_card(path: Path, card: Card, force: bool) -> None:
    """Writes the page, whole or not at all."""
    data = render(card).encode(errors="backslashreplace")
    with atomic_output(path, len(data), force) as file:
        file.write(data)


def render(card: Card) -> str:
    """The page's text."""
    theta = card.theta
    parts = [
        _front_matter(card),
        f"# Θ for {markdown(theta.base_name)}",
        "Θ is a small antisymmetric INT8 tensor beside each linear layer, with which it computes W x + κ Θ x. This "
        f"one has rank {theta.rank} in {len(theta.layers)} layers ({theta.nbytes:,} bytes) and is meant for gamma "
        f"{card.gamma:g} (κ = {coupling(card.gamma):.6f}).",
        _listed({f"`{name}`": about for name, about in card.files.items()}),
        "## What it was made from",
        _listed(_origin(card)),
        "## What it gains",
        _measured(
            [*card.gains, *recorded_gain(theta, card.gamma)],
            "Not measured: nothing is recorded of what this Θ gains. `nkat-engine --compare` measures it.",
        ),
        "## What it costs elsewhere",
        _measured(
            [*card.prices, *([] if card.prices else recorded_price(theta, card.gamma))],
            "Not measured: nothing is recorded of what this Θ costs on other texts.",
        ),
        "## Run it",
        _usage(card),
    ]
    if card.commands:
        parts += ["## The same again"]
        parts += [f"{what}\n\n```sh\n{_portable(line)}\n```" for what, line in card.commands.items()]
    parts += ["## Made with", _listed(card.facts or {"nkat": __version__})]
    return "\n\n".join(parts) + "\n"


def recorded_gain(theta: ThetaSet, gamma: float) -> list[Table]:
    """What the file itself records of this very Θ: its change on the part of the text that was not learned."""
    return _recorded(theta, gamma, HELDOUT_PREFIX, "the part of the learned text that was kept back")


def recorded_price(theta: ThetaSet, gamma: float) -> list[Table]:
    """Likewise of the guard text on which it costs most."""
    return _recorded(theta, gamma, GUARD_PREFIX, str(theta.notes.get(f"{GUARD_PREFIX}text")))


def _recorded(theta: ThetaSet, gamma: float, prefix: str, text: str) -> list[Table]:
    change = theta.notes.get(f"{prefix}change_percent")
    if change is None or gamma != theta.gamma:  # it was measured at that strength
        return []
    error, tokens = theta.notes.get(f"{prefix}change_percent_stderr"), theta.notes.get(f"{prefix}tokens")
    row = {"text": text, "tokens": tokens, "change_percent": change, "change_percent_stderr": error}
    columns = [
        Column("text", "text"),
        *([] if tokens is None else [Column("tokens", "tokens", ",")]),
        Column("change of perplexity", ("change_percent", "change_percent_stderr"), _change_text),
    ]
    return [Table("recorded", columns, [row])]


def _change_text(percent: float, stderr: float | None) -> str:
    return f"{percent:+.3f} % ± {'not recorded' if stderr is None else f'{stderr:.3f}'}"


def _front_matter(card: Card) -> str:
    """YAML, of which JSON's strings are a part."""
    known = hub_repository(card.base)
    name = known or card.theta.base_name
    licence = card.base.get("general.license")
    of_base = f"; the base model's is {json.dumps(str(licence))}" if licence else ""
    lines = [
        "---",
        _MARK,
        f"base_model: {json.dumps(name)}" + ("" if known else "  # as the file calls itself: no Hub id is in it"),
        *(["base_model_relation: adapter"] if card.lora or card.peft else []),
        f"library_name: {'peft' if card.peft else 'nkat'}",
        f"license: unknown  # of this Θ: for its maker to say{of_base}",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(['nkat', 'gguf', *(['lora'] if card.lora or card.peft else [])])}]",
        "---",
    ]
    return "\n".join(lines)


def _origin(card: Card) -> dict[str, Any]:
    theta = card.theta
    sha256 = theta.notes.get(CALIBRATION_KEY)
    found: dict[str, Any] = {
        "base model": f"{markdown(theta.base_name)}, {theta.base_size:,} bytes, sha256 `{theta.base_sha256}`",
        "made": _SOURCES.get(theta.source, theta.source),
    }
    if sha256 is not None:
        found["text"] = f"{markdown(card.text) if card.text else 'of a name that is not recorded'}, sha256 `{sha256}`"
    for key, what in ((KEEP_KEY, "text to stay the same on"), ("nkat.reference.sha256", "better copy of the model")):
        if key in theta.notes:
            found[what] = f"sha256 `{theta.notes[key]}`"
    found |= {"rank": theta.rank, "gamma": f"{card.gamma:g}", "seed": theta.seed}
    for key, what in _SETTINGS.items():
        if key in theta.notes:
            value = theta.notes[key]
            found[what] = f"{value:g}" if isinstance(value, float) else value
    if DECAY_KEY in theta.notes:
        found["strength by depth"] = f"times {theta.notes[DECAY_KEY]:g} a block"
    if theta.notes.get(UNFINISHED_KEY):
        found["unfinished"] = "the fit was interrupted: this is the best that it had come to"
    return found


def _usage(card: Card) -> str:
    lines = []
    if card.lora is not None:
        lines.append(f"llama-cli -m BASE.gguf --lora {card.lora}")
        lines.append(f"koboldcpp --model BASE.gguf --lora {card.lora}")
    for name, about in card.files.items():
        if name.endswith(".nkat"):
            lines.append(f"nkat-engine --model {name} --generate 'Once upon a time'")
        elif about.startswith("Θ alone"):
            lines.append(f"nkat-engine --model BASE.gguf --theta {name} --generate 'Once upon a time'")
    parts = []
    if any("BASE.gguf" in line for line in lines):
        parts.append("`BASE.gguf` is the base model of the hash above.")
    if lines:
        parts.append("```sh\n" + "\n".join(lines) + "\n```")
    if card.peft:
        parts.append("```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, FOLDER)\n```")
    return "\n\n".join(parts)


def _portable(line: str) -> str:
    """A command without the folders of the machine that it ran on, which are nobody's business and nowhere else."""
    commands = []
    for command in line.split(" && "):
        words = [Path(word).name if Path(word).is_absolute() else word for word in shlex.split(command)]
        commands.append(shlex.join(words))
    return " && ".join(commands)


def _measured(tables: Sequence[Table], otherwise: str) -> str:
    return "\n\n".join(as_markdown(table) for table in tables) if tables else otherwise


def _listed(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
