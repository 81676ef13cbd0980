"""The steps of a mixture of experts in a compiled program; see `nkat.kernels.cpu.experts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nkat.kernels.cpu.blocks import gate_kernel
from nkat.kernels.cpu.experts import CpuExperts, combine_kernel, gather_kernel, group_kernel, route_kernel
from nkat.kernels.cpu.formats import padded_rows
from nkat.kernels.cpu.linear import Panels, token_state
from nkat.kernels.cpu.matmul import Rounding
from nkat.kernels.cpu.program import Program, aligned
from nkat.lm.activation import kernel_clamp
from nkat.lm.config import ModelConfig


class ExpertRows:
    """Rows of (token, expert) pairs, and what becomes of them: memory that all blocks share.

    capacity: tokens, `tokens` to a panel; state: of the tokens; scratch: of `nkat.kernels.cpu.batch.make_scratch`
    """

    def __init__(self, config: ModelConfig, capacity: int, tokens: int, state: np.ndarray, scratch: np.ndarray) -> None:
        mixture = config.mixture
        assert mixture is not None
        self.config, self.mixture, self.tokens, self.state, self.scratch = config, mixture, tokens, state, scratch
        self.d, self.ff = config.embedding_length, mixture.feed_forward_length
        pairs = capacity * mixture.used
        # an expert's last panel may be filled in part
        self.capacity = pairs if capacity == 1 else (pairs // tokens + min(mixture.count, pairs)) * tokens
        self.chosen, self.row_of = np.zeros((2, capacity, mixture.used), np.int64)
        self.weights = np.zeros((capacity, mixture.used), np.float32)
        self.token_of = np.zeros(self.capacity, np.int64)
        self.first = np.zeros(mixture.count + 1, np.int64)
        self.row_state = token_state(0)
        self.gathered = self._rows(self.d) if capacity > 1 else None
        widths = (2 * self.ff,) if mixture.fused else (self.ff, self.ff)
        self.gate_up = [self._rows(padded_rows(width)) for width in widths]
        start = self.ff if mixture.fused else 0
        self.gate, self.up = self.gate_up[0][:, : self.ff], self.gate_up[-1][:, start : start + self.ff]
        self.down = self._rows(padded_rows(self.d))
        self.out = aligned((capacity, padded_rows(self.d)), np.float32)
        self._panels: dict[tuple[Rounding, int], Panels] = {}

    def _rows(self, columns: int) -> np.ndarray:
        return aligned((self.capacity, columns), np.float32)

    def add(
        self,
        program: Program,
        logits: np.ndarray,
        x: np.ndarray,
        experts: Sequence[CpuExperts],
        common: Mapping[Rounding, Panels],
        scales: np.ndarray | None = None,
    ) -> np.ndarray:
        """Adds the steps from a router's logits on; returns the array where the mixture's output is then.

        x: inputs of the experts; common: those of a program of one token, rounded
        experts: gate and up, or both in one, then down; scales: what each one's outputs are multiplied by, [experts]
        """
        mixture, tokens = self.mixture, self.tokens
        scales = np.ones(mixture.count, np.float32) if scales is None else scales
        routing = (logits, logits.strides[0], scales, self.chosen, self.weights, self.state)
        program.add(route_kernel(mixture.count, mixture.used, tokens), routing)
        if self.gathered is not None:  # the first thread alone has the only token
            program.barrier()
        grouping = (self.chosen, self.row_of, self.token_of, self.first, self.state, self.row_state)
        program.add(group_kernel(mixture.count, mixture.used, tokens), grouping)
        program.barrier()
        *read, down = experts
        inputs = common
        if self.gathered is not None:
            program.add(gather_kernel(self.d, tokens), (x, self.gathered, self.token_of, self.row_state))
            inputs = {r: self._fill(program, r, self.gathered) for r in dict.fromkeys(each.rounding for each in read)}
            program.barrier()
        for stack, y in zip(read, self.gate_up, strict=True):
            self._multiply(program, stack, inputs[stack.rounding], y, self.gathered is None)
        program.barrier()
        kernel = gate_kernel(self.ff, tokens, self.config.architecture.gelu, kernel_clamp(self.config.architecture))
        program.add(kernel, (self.gate, self.up, self.gate.strides[0], self.up.strides[0], self.row_state))
        active = self._fill(program, down.rounding, self.gate, self.ff)
        program.barrier()
        self._multiply(program, down, active, self.down, False)
        program.barrier()
        program.add(
            combine_kernel(self.d, mixture.used, tokens),
            (
                *(self.down, self.down.strides[0], self.row_of, self.weights),
                *(self.out, self.out.strides[0], self.state),
            ),
        )
        return self.out

    def _fill(self, program: Program, rounding: Rounding, x: np.ndarray, columns: int | None = None) -> Panels:
        columns = x.shape[1] if columns is None else columns
        key = rounding, columns
        if key not in self._panels:
            self._panels[key] = Panels(rounding, columns, self.capacity, self.tokens, self.row_state)
        self._panels[key].fill(program, x, x.strides[0])
        return self._panels[key]

    def _multiply(self, program: Program, experts: CpuExperts, inputs: Panels, y: np.ndarray, common: bool) -> None:
        experts.multiply(program, inputs, self.first, y, self.scratch, self.row_state, common)
