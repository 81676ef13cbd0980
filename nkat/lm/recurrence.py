"""The recurrent blocks of a model as its metadata describe them; what they compute is in `nkat.lm.delta_net`."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from nkat.lm.architectures import DELTA_LINEARS, Recurrent
from nkat.lm.keys import ConfigError, Keys

MAX_KERNEL = 16  # each token that the convolution sees is an instruction of its kernel; models see four
_PERIOD = 4  # of blocks with attention, where the file does not say (src/models/qwen35.cpp)


@dataclass(frozen=True, slots=True)
class Recurrence:
    """Of every block with a gated delta net. Lengths in elements.

    key_heads, value_heads: of `size` elements each; every key head serves as many value heads
    kernel: tokens that the convolution sees
    row: how the architecture orders them
    fused: queries, keys, values and gates come of one weight, `ssm_in`, which has them by key head (old files of
    qwen3next)
    """

    key_heads: int
    value_heads: int
    size: int
    kernel: int
    row: Recurrent
    fused: bool = False

    @classmethod
    def read(cls, keys: Keys, blocks: int, tensors: Container[str]) -> tuple[Recurrence | None, frozenset[int]]:
        """None: the model has none; and which of so many blocks are recurrent.

        Raises ConfigError naming the key that is wrong.
        """
        row = keys.architecture.recurrent
        if row is None:
            return None, frozenset()
        kernel = keys.integer("ssm.conv_kernel", maximum=MAX_KERNEL)
        inner, size, value_heads, key_heads = (
            keys.integer(f"ssm.{key}") for key in ("inner_size", "state_size", "time_step_rank", "group_count")
        )
        if value_heads % key_heads:
            raise ConfigError(
                f"metadata {keys.name('ssm.time_step_rank')} {value_heads} is no multiple of ssm.group_count "
                f"{key_heads}"
            )
        if inner != value_heads * size:
            raise ConfigError(
                f"metadata {keys.name('ssm.inner_size')} {inner} is not ssm.time_step_rank {value_heads} times "
                f"ssm.state_size {size}: not supported"
            )
        recurrent = _recurrent(keys, blocks)
        fused = row.grouped and any(f"blk.{i}.ssm_in.weight" in tensors for i in recurrent)
        return cls(key_heads, value_heads, size, kernel, row, fused), recurrent

    @property
    def keys(self) -> int:
        """Elements of all key heads."""
        return self.key_heads * self.size

    @property
    def values(self) -> int:
        return self.value_heads * self.size

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys, values."""
        return 2 * self.keys + self.values

    @property
    def inputs(self) -> dict[str, int]:
        """Outputs of the linear layers that read the residual stream: what is convolved and the gate, or both in one,
        then the strengths."""
        qkv, gate, _ = DELTA_LINEARS
        heads = self.value_heads
        strengths = {"ssm_ba": 2 * heads} if self.row.grouped else {"ssm_beta": heads, "ssm_alpha": heads}
        if self.fused:
            return {"ssm_in": self.channels + self.values, **strengths}
        return {qkv: self.channels, gate: self.values, **strengths}

    def linears(self, d: int) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a block's linear layers, by name, for a residual stream of d elements."""
        *_, out = DELTA_LINEARS
        return {**{name: (outputs, d) for name, outputs in self.inputs.items()}, out: (d, self.values)}

    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its other tensors, by their whole name behind the block's."""
        heads = self.value_heads
        return {
            "ssm_conv1d.weight": (self.channels, self.kernel),
            "ssm_dt.bias": (heads,),
            "ssm_a": (heads,),
            "ssm_norm.weight": (self.size,),
        }


def _recurrent(keys: Keys, blocks: int) -> frozenset[int]:
    name = "attention.recurrent_layers"
    listed = keys.metadata.get(keys.name(name))
    if isinstance(listed, np.ndarray):
        return frozenset(i for i, value in enumerate(keys.by_block(name, listed)[:blocks]) if value)
    if listed is not None:
        return frozenset(range(blocks)) if listed else frozenset()
    period = keys.integer("full_attention_interval", _PERIOD)
    return frozenset(i for i in range(blocks) if (i + 1) % period)
