"""`--model-card`: the page beside what a conversion writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nkat.convert.options import ConvertOptions
from nkat.convert.rank_search import decision_table
from nkat.convert.strengths import strengths_table
from nkat.host import hardware
from nkat.host.commandline import own_command
from nkat.host.console import remark
from nkat.host.page import machine_facts
from nkat.host.record import toolkit_version
from nkat.host.tables import Table
from nkat.lm.peft import WEIGHTS
from nkat.measure.gains import found_beside
from nkat.measure.guard import prices_table
from nkat.theta.card import Card, write_card
from nkat.theta.modelfile import ModelFile
from nkat.theta.set import ThetaSet

LORA = "the adapter, for llama.cpp and programs built on it (GGUF, LoRA in F16)"


def write_model_card(options: ConvertOptions, model: ModelFile, theta_set: ThetaSet, record: Mapping[str, Any]) -> None:
    """Says of the Θ that was written, or that the input has, what it was made from, what it gains and what it costs."""
    path = options.card_path
    if path is None or options.dry_run:
        return
    gains, prices = found_beside(model.path, theta_set)
    made = _measured(record)
    files = _files_beside(options, model, path.parent)
    own_strength = not options.writes_model and options.theta_gamma is not None  # --output has its own already
    card = Card(
        theta=theta_set,
        base=model.require_base().file.metadata,
        gamma=options.theta_gamma if own_strength and options.theta_gamma is not None else theta_set.gamma,
        files=files,
        lora=next((name for name, about in files.items() if about is LORA), None),
        peft=options.export_peft is not None,
        text=None if options.calibrate is None else options.calibrate.name,
        gains=[*gains, *made[0]],
        prices=[*prices, *made[1]],
        commands={"It was made by:": own_command()},
        facts=machine_facts(
            {
                "machine": hardware.describe(hardware.pick_device(allow_cuda=False)),
                "versions": {},
                **toolkit_version(),
            }
        ),
    )
    write_card(path, card, options.force)
    remark(f"wrote {path}")


def _files_beside(options: ConvertOptions, model: ModelFile, folder: Path) -> dict[str, str]:
    """What lies in the page's folder of what was written, by name."""
    about: dict[Path, str] = {}
    if options.export_peft is not None:
        about[options.export_peft / WEIGHTS] = "the adapter, for PEFT and programs built on it (safetensors)"
    if options.export_lora is not None:
        about[options.export_lora] = LORA
    if options.writes_model:
        whole = "Θ alone, for this toolkit" if options.theta_only else "the base model with Θ in it"
        about[options.output or model.path] = whole
    return {path.name: text for path, text in about.items() if path.parent.absolute() == folder.absolute()}


def _measured(record: Mapping[str, Any]) -> tuple[list[Table], list[Table]]:
    """Gains and prices that this run has measured."""
    gains = [decision_table(record["rank_search"])] if "rank_search" in record else []
    gains += [strengths_table(record["report"])] if "report" in record else []
    choice = record.get("fit", {}).get("choice")
    guard = None if choice is None or choice["kept"] is None else choice["judged"][choice["kept"]]["guard"]
    return gains, [] if guard is None else [prices_table(guard)]
