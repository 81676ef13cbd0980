"""Keys of the metadata whose meaning is not computed, and those that have none in a model of its architecture."""

from __future__ import annotations

import warnings

import numpy as np

from nkat.lm.architectures import (
    ATTENTION_CAP,
    DEEPSTACK,
    LAYER_INPUTS,
    LOGIT_CAP,
    ROPE_SECTIONS,
    SCALES,
    SHARED_KV,
    TEMPERATURE,
    YARN_KEYS,
)
from nkat.lm.keys import ConfigError, Keys

# Keys that change llama.cpp's forward pass in a way that is not computed here, in the models of every architecture, or
# of those whose row says so; and the values with which they do not.
_REFUSED: dict[str, tuple[bool | float, ...]] = {"attention.causal": (True,), "expert_group_count": (0, 1)}
_REFUSED_IN_SOME = {ROPE_SECTIONS: (0,), DEEPSTACK: (-1,)}
# Keys that llama.cpp reads in the models of some architectures only; and the values with which they change nothing.
_READ_BY_SOME: dict[str, tuple[bool | float, ...]] = {
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    ATTENTION_CAP: (0.0,),
    LOGIT_CAP: (0.0,),
    TEMPERATURE: (0.0,),
    LAYER_INPUTS: (0,),
    SHARED_KV: (0,),
    **dict.fromkeys(SCALES, (0.0, 1.0)),
    "attention.scale": (0.0,),
    **_REFUSED_IN_SOME,
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    **dict(zip(YARN_KEYS, ((32.0,), (1.0,), (0.0,)), strict=True)),
}


def refuse(keys: Keys) -> None:
    """Raises ConfigError for a key that is not computed, and warns of those that mean nothing in such a model."""
    refused = _REFUSED | {key: _REFUSED_IN_SOME[key] for key in keys.architecture.refuses}
    for key, neutral in refused.items():
        if (value := _unless(keys, key, neutral)) is not None:
            raise ConfigError(f"metadata {keys.name(key)} = {value!r:.80} is not supported")
    for key in _READ_BY_SOME.keys() - {*keys.architecture.reads}:
        if (value := _unless(keys, key, _READ_BY_SOME[key])) is not None:
            warnings.warn(
                f"metadata {keys.name(key)} = {value!r:.80} means nothing in {keys.architecture.name} models, and is "
                "not used, as by llama.cpp",
                stacklevel=5,
            )


def _unless(keys: Keys, key: str, neutral: tuple[bool | float, ...]) -> object:
    """A key's value, or None where it has such a value or is not there."""
    value = keys.metadata.get(keys.name(key))
    values = value.tolist() if isinstance(value, np.ndarray) else [value]
    return None if value is None or all(one in neutral for one in values) else values if len(values) > 1 else values[0]
