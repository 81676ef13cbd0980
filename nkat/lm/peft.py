"""LoRA adapters as PEFT keeps them: a folder with `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [r, n]      W x + s · B (A x),  s = alpha / r, with
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   [m, r]      `use_rslora` alpha / √r

(https://github.com/huggingface/peft, src/peft/tuners/lora.) What an adapter does besides that is refused by its name:
an adapter that runs without a part of it would be another one. Names and rows are those of `nkat.lm.huggingface`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.host.files import atomic_output, make_folder
from nkat.host.record import parse_json
from nkat.lm.config import ModelConfig
from nkat.lm.huggingface import inputs_for_gguf, inputs_for_hf, module_name, rows_for_gguf, rows_for_hf, weight_name
from nkat.theta.algebra import ThetaError, coupling, low_rank_form
from nkat.theta.card import hub_repository
from nkat.theta.lowrank import LowRank
from nkat.theta.modelfile import ModelFile
from nkat.theta.set import ThetaSet

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Where a GGUF may say what repository it was converted from.
_FACTOR = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")

# Settings of PEFT's LoraConfig that change more than W x + s · B A x, where they are set.
_REFUSED = {
    "use_dora": "it scales every row of a weight, too (DoRA)",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it adapts parameters that are no linear layers, as a mixture's experts are",
    "alora_invocation_tokens": "it acts only behind an invocation (aLoRA)",
    "lora_bias": "its second factor has a bias",
    "layer_replication": "it repeats layers of the model",
    "use_qalora": "it sums up groups of inputs (QALoRA)",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "arrow_config": "it routes between several adapters (Arrow)",
    "kasa_config": "it changes the model's weights, too (KaSA)",
    "velora_config": "it is of a kind that is not known here (VeLoRA)",
    "monteclora_config": "it is of a kind that is not known here (MonteCLoRA)",
}
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that subtract themselves from the weights


def read_peft(path: Path, config: ModelConfig) -> dict[str, LowRank]:
    """The adapter's terms by the names of a GGUF's weights, which need not have them all.

    path: the folder, or its `.safetensors`. Raises NKATError for files that are missing or damaged, and naming what an
    adapter has that is no LoRA of a linear layer.
    """
    folder = path if path.is_dir() else path.parent
    weights = folder / WEIGHTS if path.is_dir() else path
    settings = _settings(folder / CONFIG)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _read_tensors(weights).items():
        found = _FACTOR.fullmatch(key)
        if found is None:
            raise NKATError(f"{weights}: {key}: {_why_no_factor(key)}")
        factors.setdefault(found[1].removeprefix(_PREFIX), {})[found[2]] = tensor
    if not factors:
        raise NKATError(f"{weights}: holds no LoRA")
    terms = {}
    for module, pair in factors.items():
        if (name := weight_name(module)) is None or ".experts." in module:
            what = _why_no_factor(module) if ".experts." in module else "is no linear layer of a block"
            raise NKATError(f"{weights}: {module}: {what}")
        if len(pair) != 2 or any(factor.ndim != 2 for factor in pair.values()):
            raise NKATError(f"{weights}: {module}: there is no matrix lora_A, or none lora_B, of it")
        down, up = pair["A"].float(), pair["B"].float() * _scale(settings, module, len(pair["A"]))
        try:
            terms[name] = LowRank(rows_for_gguf(name, up, config), inputs_for_gguf(name, down, config))
        except (ThetaError, RuntimeError) as error:  # torch: rows that are no whole heads of this model
            raise NKATError(f"{weights}: {module}: {str(error).splitlines()[0]}") from None
    return terms


def peft_files(theta_set: ThetaSet, gamma: float, model: ModelFile) -> dict[str, bytes]:
    """κ(γ)Θ as a PEFT LoRA of rank 2r, by file name: lora_A = [Qᵀ; Pᵀ], lora_B = κ [P, −Q], F32, scale 1.

    model: what Θ was made for. Raises NKATError for a Θ of experts, which are no linear modules there.
    """
    metadata = model.require_base().file.metadata
    config = ModelConfig.from_gguf(metadata, model.require_base().tensors)
    base = hub_repository(metadata)
    kappa = coupling(gamma)
    tensors, ranks = {}, {}
    for name, theta in theta_set.layers.items():
        module = module_name(name, config)
        if theta.experts is not None or module is None:
            what = "it" if theta.experts is None else "a mixture's experts"
            raise NKATError(
                f"{name}: a PEFT LoRA acts on linear modules, which {what} {'is' if what == 'it' else 'are'} not in "
                "transformers; --export-lora writes one for llama.cpp"
            )
        down, up = low_rank_form(*theta.factors(), *_shape(name, config))
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = inputs_for_hf(name, down, config).contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = rows_for_hf(name, kappa * up, config).contiguous()
        ranks[module] = 2 * theta.rank
    return {CONFIG: _config(ranks, config, base), WEIGHTS: _packed(tensors)}


def write_files(folder: Path, files: Mapping[str, bytes], force: bool = False) -> None:
    """Writes files into a folder, which is made where it is not there; each appears whole or not at all."""
    make_folder(folder)
    for name, data in files.items():
        with atomic_output(folder / name, len(data), force) as file:
            file.write(data)


def _shape(name: str, config: ModelConfig) -> tuple[int, int]:
    _, block, linear, _ = name.split(".")
    return config.linears(int(block))[linear]


def _config(ranks: Mapping[str, int], config: ModelConfig, base: str | None) -> bytes:
    rank = max(ranks.values())
    others = {module: own for module, own in ranks.items() if own != rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _targets(list(ranks), config.block_count),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    return (json.dumps(settings, indent=2) + "\n").encode()


def _targets(modules: list[str], blocks: int) -> list[str]:
    """ "q_proj" where every block's is adapted, and else the whole names of those that are."""
    by_kind: dict[str, list[str]] = {}
    for module in modules:
        by_kind.setdefault(module.rpartition(".")[2], []).append(module)
    return sorted(name for kind, named in by_kind.items() for name in ([kind] if len(named) == blocks else named))


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise NKATError(f"{path}: no such file; it says how strong the adapter is, and belongs beside its weights")
    try:
        settings = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise NKATError(f"{path}: cannot be read: {error}") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise NKATError(f"{path}: is of peft_type {kind!r}; only LORA has the form of a low-rank term")
    for key, reason in _REFUSED.items():
        if settings.get(key):
            raise NKATError(f"{path}: has {key}: {reason}")
    if settings.get("bias") not in (None, "none"):
        raise NKATError(f"{path}: has bias {settings['bias']!r}: it changes the model's biases, too")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise NKATError(
            f"{path}: was begun with {start!r}, which changes the model's weights, too; PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) makes a plain LoRA of it"
        )
    return settings


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / √r."""
    alpha = settings.get("lora_alpha", 8)  # PEFT's default
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = own
                break
        except re.error:
            raise NKATError(f"{CONFIG}: alpha_pattern {pattern!r} is no regular expression") from None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise NKATError(f"{CONFIG}: lora_alpha of {module} is {alpha!r}, not a number")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _why_no_factor(name: str) -> str:
    for part, reason in (
        ("lora_embedding_", "a LoRA of an embedding, which Θ and the kernels have no place for"),
        ("lora_magnitude_vector", "the scales of DoRA, which change the weight's rows"),
        (".lora_B.bias", "a bias of LoRA's second factor"),
        ("experts", "of a mixture's experts, which are no linear layers here"),
    ):
        if part in name:
            return reason
    return "is neither lora_A nor lora_B of a linear layer"


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        old = path.with_name("adapter_model.bin")
        hint = f"; {old.name} is there, which PEFT's save_pretrained(..., safe_serialization=True) writes anew"
        raise NKATError(f"{path}: no such file{hint if old.is_file() else ''}")
    package = _safetensors()
    try:
        return dict(package.torch.load_file(path))
    except (package.SafetensorError, OSError, KeyError) as error:  # KeyError: a type that torch has not
        raise NKATError(f"{path}: cannot be read: {error}") from None


def _packed(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return bytes(_safetensors().torch.save(dict(tensors), metadata={"format": "pt"}))


def check_safetensors() -> None:
    """Raises NKATError where the package is missing: to be known before time is spent."""
    _safetensors()


def _safetensors() -> Any:
    try:
        import safetensors.torch  # optional: only PEFT's files need it
    except ModuleNotFoundError:
        raise NKATError("PEFT's files need the package safetensors: pip install safetensors (the extra peft)") from None
    return safetensors
