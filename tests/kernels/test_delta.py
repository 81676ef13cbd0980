"""The kernels of a gated delta net: against the module that they stand for, and their mathematics by themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nkat.engine.recurrent import BlockState, DeltaRows
from nkat.kernels.cpu.delta import softplus
from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.linear import token_state
from nkat.kernels.cpu.llvm import F32, Builder
from nkat.kernels.cpu.program import Program, Threads, pool
from nkat.lm.architectures import Recurrent
from nkat.lm.delta_net import DeltaNet
from nkat.lm.recurrence import Recurrence

pytestmark = pytest.mark.isa

EPSILON = 1e-6
SHAPES = {
    "as Qwen 3.5": Recurrence(2, 4, 16, 4, Recurrent()),
    "neighbours": Recurrence(2, 6, 32, 4, Recurrent(grouped=True)),
    "odd lengths": Recurrence(1, 3, 12, 2, Recurrent()),
    "by key head": Recurrence(2, 6, 16, 4, Recurrent(grouped=True), fused=True),
    "no convolution": Recurrence(3, 3, 8, 1, Recurrent(grouped=True)),
}


def net_of(sizes: Recurrence) -> DeltaNet:
    generator = torch.Generator().manual_seed(0)
    shapes = list(sizes.vectors().values())
    kernel, bias, factor, norm = (torch.randn(shape, generator=generator) for shape in shapes)
    return DeltaNet(sizes, EPSILON, kernel + 0.3, bias, -factor.abs(), 1.0 + 0.2 * norm)


class Kernels:
    """A block's steps over so many sequences that lie behind one another; its states go on from pass to pass."""

    def __init__(self, sizes: Recurrence, net: DeltaNet, sequences: int, length: int, threads: Threads) -> None:
        count = sequences * length
        self.sequences, self.threads = sequences, threads
        self.state, self.program = token_state(0), Program()
        self.held = BlockState.of(sizes, sequences)
        self.outputs = {name: np.zeros((count, rows + 5), np.float32) for name, rows in sizes.inputs.items()}
        self.out = np.zeros((count, sizes.values + 3), np.float32)
        rows = DeltaRows(sizes, count, 1, self.state, np.array([EPSILON], np.float32))
        rows.add(self.program, self.outputs, net, self.held, self.out)
        self.program.barrier()

    def run(self, outputs: list[torch.Tensor], start: int) -> torch.Tensor:
        """Outputs of the linear layers [sequence, token, rows] → [sequence, token, H·D]."""
        tokens = outputs[0].shape[1]
        count = self.sequences * tokens
        for array, given in zip(self.outputs.values(), outputs, strict=True):
            array[:count, : given.shape[2]] = given.flatten(0, 1).numpy()
        self.state[:3] = count, start, tokens
        self.program.run(self.threads)
        values = self.held.memory.shape[1] * self.held.memory.shape[3]
        return torch.from_numpy(self.out[:count, :values].copy()).view(self.sequences, tokens, -1)

    @property
    def memory(self) -> torch.Tensor:
        """[sequence, H, D, D]"""
        return torch.from_numpy(self.held.memory).movedim(2, 3).flatten(3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sequences", [1, 3])
def test_kernels_equal_the_module(shape: str, sequences: int) -> None:
    """Passes of several lengths, one after another; one that begins at position 0 begins anew."""
    sizes = SHAPES[shape]
    net = net_of(sizes)
    kernels = [Kernels(sizes, net, sequences, 20, pool(threads)) for threads in (1, 2)]
    generator = torch.Generator().manual_seed(1)
    state, start = None, 0
    for tokens, begins in ((20, True), (1, False), (3, False), (2, True), (5, False)):
        outputs = [torch.randn(sequences, tokens, rows, generator=generator) for rows in sizes.inputs.values()]
        if begins:
            state, start = None, 0
        expected, state = net(outputs, state)
        found, other = (each.run(outputs, start) for each in kernels)
        assert (found - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))
        assert torch.equal(found, other)  # threads change no bit
        assert (kernels[0].memory - state.memory).abs().max() < 2e-5
        assert torch.equal(torch.from_numpy(kernels[0].held.earlier), state.inputs)
        start += tokens


def test_softplus_keeps_its_small_values() -> None:
    x = np.concatenate((np.linspace(-86.0, 30.0, 4000), [200.0, -100.0, np.nan])).astype(np.float32)
    found = np.zeros_like(x)

    def emit(k: Builder) -> None:
        with k.loop(0, 4 * len(x), 4) as i:
            k.store(softplus(k, k.load(F32(), k.pointer(0) + i)), k.pointer(1) + i)

    program = Program()
    program.add(compile_kernel("softplus_alone", emit), (x, found))
    program.run(pool(1))
    with np.errstate(invalid="ignore"):
        expected = np.logaddexp(0.0, x.astype(np.float64))
    assert np.isnan(found[-1])
    assert found[-2] == 0.0  # as of exp
    assert np.abs(found[:-2] / expected[:-2] - 1.0).max() < 1e-6
    plain = np.log(np.float32(1.0) + np.exp(x[:-3]))  # the control
    assert np.abs(plain / expected[:-3] - 1.0).max() > 0.5
