"""Typed, checked look-ups of a language model's metadata, `{architecture}.{key}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nkat.errors import NKATError
from nkat.lm.architectures import Architecture

# Sizes that a file may ask for. Lengths, counts and positions are signed 32-bit integers in llama.cpp, too.
MAX_SIZE = (1 << 31) - 1


class ConfigError(NKATError):
    """The metadata or the tensors do not describe a model this toolkit can run; the message names the key or tensor."""


class Keys:
    """Those of one file."""

    def __init__(self, metadata: Mapping[str, object], architecture: Architecture) -> None:
        self.metadata, self.architecture = metadata, architecture

    def name(self, key: str) -> str:
        return f"{self.architecture.name}.{key}"

    def get(self, key: str) -> object:
        """The value or None; an array with one value for every block counts as that value."""
        value = self.metadata.get(self.name(key))
        if isinstance(value, np.ndarray):
            distinct = np.unique(value)
            if len(distinct) != 1:
                raise ConfigError(f"metadata {self.name(key)} differs from block to block, which is not supported")
            return distinct[0].item()
        return value

    def per_block(self, key: str, blocks: int, default: int | None = None) -> list[int]:
        """One integer for each block, of an array or all the same."""
        value = self.metadata.get(self.name(key))
        if not isinstance(value, np.ndarray):
            return [self.integer(key, default)] * blocks
        return [self._checked(key, number, 1, MAX_SIZE) for number in self.by_block(key, value)[:blocks]]

    @property
    def blocks_in_file(self) -> int:
        """Those that are left out included."""
        return self.integer("block_count")

    def by_block(self, key: str, values: np.ndarray) -> list[Any]:
        """The values of an array, one for each block of the file. Raises ConfigError where there are more or fewer."""
        if len(values) != self.blocks_in_file:
            raise ConfigError(f"metadata {self.name(key)} has {len(values)} values for {self.blocks_in_file} blocks")
        return list(values.tolist())

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        return self._checked(key, self._required(key, default), minimum, maximum)

    def _checked(self, key: str, value: object, minimum: int, maximum: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"metadata {self.name(key)} must be an integer, got {value!r}")
        if value < minimum:
            raise ConfigError(f"metadata {self.name(key)} must be at least {minimum}, got {value}")
        if value > maximum:
            raise ConfigError(f"metadata {self.name(key)} must be at most {maximum}, got {value}")
        return value

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"metadata {self.name(key)} must be a number, got {value!r}")
        if not (math.isfinite(value) and value > above):
            raise ConfigError(f"metadata {self.name(key)} must be a finite number above {above:g}, got {value}")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._required(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"metadata {self.name(key)} must be a string, got {value!r}")
        return value

    def _required(self, key: str, default: object) -> object:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"metadata {self.name(key)} is missing")
        return value
