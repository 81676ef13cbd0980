"""What a task asks of generated text, in lm-eval's words (`generation_kwargs`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nkat.engine.generate import Sampling
from nkat.errors import NKATError

MAX_TOKENS = 256  # where a task names no number: lm-eval's own
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLERS = ("temperature", "top_k", "top_p", "min_p")
_WITHOUT_EFFECT = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "num_return_sequences": 1}


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """until: texts before the first of which the answer ends"""

    until: tuple[str, ...]
    max_tokens: int
    sampling: Sampling

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> GenerationSettings:
        """Raises NKATError for what this engine does not do, instead of leaving it out."""
        known = ("until", "do_sample", *_LENGTHS, *_SAMPLERS, *_WITHOUT_EFFECT)
        unknown = [name for name in given if name not in known]
        if unknown:
            raise NKATError(f"generation_kwargs: {', '.join(unknown)} is not known to the model nkat")
        for name, only in _WITHOUT_EFFECT.items():
            if given.get(name, only) != only:
                raise NKATError(f"generation_kwargs: the model nkat has {name} = {only} only, got {given[name]}")
        until = given.get("until") or ()
        words = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(word, str) for word in words):
            raise NKATError(f"generation_kwargs: until must be texts, got {until}")
        lengths = [given[name] for name in _LENGTHS if given.get(name) is not None]
        most = lengths[0] if lengths else MAX_TOKENS
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise NKATError(f"generation_kwargs: max_gen_toks must be a whole number from 1 on, got {most}")
        return cls(tuple(word for word in words if word), most, _sampling(given))


def _sampling(given: Mapping[str, Any]) -> Sampling:
    """The best token each time unless a task asks for chance; then nothing is cut off that it does not cut off."""
    numbers: dict[str, float] = {}
    for name in _SAMPLERS:
        value = given.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise NKATError(f"generation_kwargs: {name} must be a number, got {value}")
            numbers[name] = value
    temperature = numbers.get("temperature", 1.0 if given.get("do_sample") else 0.0)
    if given.get("do_sample", temperature > 0) is False or temperature == 0:
        return Sampling(temperature=0.0)
    top_k = max(0, int(numbers.get("top_k", 0)))  # -1 is "all" in other programs
    return Sampling(float(temperature), top_k, float(numbers.get("top_p", 1.0)), float(numbers.get("min_p", 0.0)))
