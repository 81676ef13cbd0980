"""A mixture of experts as its metadata describe it; what it computes is in `nkat.lm.experts`."""

from __future__ import annotations

from dataclasses import dataclass

from nkat.lm.architectures import ROUTER, STACKS
from nkat.lm.keys import Keys

MAX_EXPERTS = 1024  # as in llama.cpp


@dataclass(frozen=True, slots=True)
class Mixture:
    """How many experts there are, how many a token goes to, the length of an expert's inner vector."""

    count: int
    used: int
    feed_forward_length: int

    @classmethod
    def read(cls, keys: Keys) -> Mixture:
        """Raises ConfigError naming the key that is wrong."""
        count = keys.integer("expert_count", minimum=2, maximum=MAX_EXPERTS)
        used = keys.integer("expert_used_count", maximum=count)
        # older files of qwen3moe have no length of an expert's own (src/models/qwen3moe.cpp)
        whole = keys.integer("feed_forward_length", 0, minimum=0)
        return cls(count, used, keys.integer("expert_feed_forward_length", whole // used))

    @property
    def active(self) -> float:
        """The share of the experts that a token goes to."""
        return self.used / self.count

    def stacks(self, d: int) -> dict[str, tuple[int, int, int]]:
        """(experts, outputs, inputs) of the weights, by name, for a residual stream of d elements."""
        inner = self.feed_forward_length
        shapes = (self.count, inner, d), (self.count, inner, d), (self.count, d, inner)
        return dict(zip(STACKS, shapes, strict=True))

    def weights(self, d: int) -> dict[str, tuple[int, ...]]:
        """The same, with the router's; a bias has the shape without its last length."""
        return {ROUTER: (self.count, d), **self.stacks(d)}
