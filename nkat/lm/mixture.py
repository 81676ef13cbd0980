"""A mixture of experts as its metadata describe it; what it computes is in `nkat.lm.experts`."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from nkat.lm.architectures import GATE_UP_STACK, ROUTER, SHARED_EXPERT, SHARED_LENGTH, STACKS, Routing
from nkat.lm.keys import ConfigError, Keys

MAX_EXPERTS = 1024  # as in llama.cpp


@dataclass(frozen=True, slots=True)
class Mixture:
    """How many experts there are, how many a token goes to, the length of an expert's inner vector.

    fused: gate and up are one weight; beside: see `nkat.lm.architectures.Routing`
    shared_length: of the inner vector of the expert that every token goes to; 0: there is none
    """

    count: int
    used: int
    feed_forward_length: int
    fused: bool = False
    beside: bool = False
    shared_length: int = 0

    @classmethod
    def read(cls, keys: Keys, tensors: Container[str]) -> Mixture | None:
        """None: the model has none. Raises ConfigError naming the key or the tensor that is wrong."""
        routing = keys.architecture.experts
        if routing is None or (routing.optional and keys.get("expert_count") in (None, 0)):
            _refuse(keys)
            return None
        _check_form(tensors)
        count = keys.integer("expert_count", minimum=2, maximum=MAX_EXPERTS)
        used = keys.integer("expert_used_count", maximum=count)
        fused = (routing.beside or routing.shared_gate) and f"blk.0.{GATE_UP_STACK}.weight" in tensors
        shared = _shared_length(keys, routing) if routing.shared else 0
        return cls(count, used, _length(keys, routing, used), fused, routing.beside, shared)

    @property
    def active(self) -> float:
        """The share of the experts that a token goes to."""
        return self.used / self.count

    def stacks(self, d: int) -> dict[str, tuple[int, int, int]]:
        """(experts, outputs, inputs) of the weights, by name, for a residual stream of d elements."""
        inner = self.feed_forward_length
        gate, up, down = STACKS
        if self.fused:
            return {GATE_UP_STACK: (self.count, 2 * inner, d), down: (self.count, d, inner)}
        return {gate: (self.count, inner, d), up: (self.count, inner, d), down: (self.count, d, inner)}

    def shared_linears(self, d: int) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the shared expert's layers, by name."""
        gate, up, down = SHARED_EXPERT
        inner = self.shared_length
        return {gate: (inner, d), up: (inner, d), down: (d, inner)} if inner else {}

    def weights(self, d: int) -> dict[str, tuple[int, ...]]:
        """The same, with the router's; a bias has the shape without its last length."""
        return {ROUTER: (self.count, d), **self.stacks(d)}


def _length(keys: Keys, routing: Routing, used: int) -> int:
    if not routing.own_length:
        return keys.integer("feed_forward_length")
    if keys.get("expert_feed_forward_length") is not None:
        return keys.integer("expert_feed_forward_length")
    # older files of qwen3moe have no length of an expert's own (src/models/qwen3moe.cpp)
    return keys.integer("expert_feed_forward_length", keys.integer("feed_forward_length", 0, minimum=0) // used)


def _shared_length(keys: Keys, routing: Routing) -> int:
    if routing.shared_gate and keys.get(SHARED_LENGTH) in (None, 0):
        return keys.integer("feed_forward_length")
    return keys.integer(SHARED_LENGTH, 0, minimum=0)


def _refuse(keys: Keys) -> None:
    """Raises ConfigError for a model without a mixture whose metadata have one all the same."""
    for key in ("expert_count", "expert_used_count"):
        count = keys.get(key)
        if count in (None, 0):
            continue
        if keys.architecture.experts is None:
            name = keys.architecture.name
            raise ConfigError(
                f"metadata {keys.name(key)} is {count!r}: mixtures of experts are not supported in {name} models"
            )
        raise ConfigError(f"metadata {keys.name(key)} is {count!r}, but there is no {keys.name('expert_count')}")


def _check_form(tensors: Container[str]) -> None:
    """Raises ConfigError for experts in tensors of two dimensions, which llama.cpp does not load either."""
    for stack in STACKS:
        single = f"blk.0.{stack.removesuffix('_exps')}.0.weight"
        if single in tensors:
            raise ConfigError(
                f"tensor {single}: each expert is a tensor of its own, in place of blk.0.{stack}.weight with all of "
                "them, a form of old files that llama.cpp no longer loads; convert the original model again"
            )
