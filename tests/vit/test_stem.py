"""The stem's kernels against torch's own operations in float64, and where they are not used."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nkat_vit import stem
from nkat_vit.stem import Stem, convolve, norm_gelu

pytestmark = pytest.mark.isa

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of a result's norm: bfloat16 rounds by 2⁻⁹ at most


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "batch"), [(16, 1), (48, 7), (64, 5), (256, 2)])
def test_norm_and_gelu_are_torchs(channels: int, batch: int, dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(batch, channels, 5, 5) * 2 + 30).to(dtype).contiguous(memory_format=torch.channels_last)
    ours = random_norm(channels)
    theirs = deepcopy(ours).double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given, wanted = x.clone().requires_grad_(), x.double().requires_grad_()
        found, right = norm_gelu(given, ours), F.gelu(theirs(wanted))
        gradient = torch.randn_like(found)
        found.backward(gradient)
        right.backward(gradient.double())
    finally:
        torch.set_num_threads(before)
    assert type(found.grad_fn).__name__ == "_NormGeluBackward"
    pairs = [(found, right), (given.grad, wanted.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    for place, (one, other) in enumerate(pairs):
        assert one is not None
        assert other is not None
        assert error(one, other) < TOLERANCE[dtype], place
        assert error(one.roll(1, -1), other) > 0.1, place  # control
    for name, value in ours.named_buffers():
        torch.testing.assert_close(value, theirs.get_buffer(name).to(value.dtype), rtol=1e-5, atol=1e-6)
    assert ours.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "stride"), [(8, 2), (4, 1), (9, 1), (7, 2)])  # few points, and more
def test_a_convolution_has_torchs_gradients(side: int, stride: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours = nn.Conv2d(16, 32, 3, stride, 1, bias=False)
    theirs = deepcopy(ours).to(dtype).double()
    x = torch.randn(3, 16, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
    wanted, given = x.double().requires_grad_(), x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = convolve(given, ours)
    right = theirs(wanted)
    assert found.dtype == dtype
    gradient = torch.randn_like(found)
    found.backward(gradient)
    right.backward(gradient.double())
    assert type(found.grad_fn).__name__ == "_ConvolutionBackward"
    for place, (one, other) in enumerate(
        [(found, right), (given.grad, wanted.grad), (ours.weight.grad, theirs.weight.grad)]
    ):
        assert one is not None
        assert other is not None
        assert error(one, other) < TOLERANCE[dtype], place
        assert error(one.roll(1, -1), other) > 0.1, place  # control


def test_gelu_is_right_far_from_zero_and_damage_is_seen() -> None:
    x = torch.linspace(-12, 12, 4096).view(256, 16).repeat(1, 2).view(256, 32, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(32)
    with torch.no_grad():  # z runs from −12 to 12 again
        norm.weight.copy_(x.std(dim=(0, 2, 3), unbiased=False))
        norm.bias.copy_(x.mean(dim=(0, 2, 3)))
    expected = F.gelu(deepcopy(norm).double()(x.double()))
    torch.testing.assert_close(norm_gelu(x, norm).double(), expected, atol=2e-6, rtol=2e-6)
    x[3, 7] = float("nan")
    out = norm_gelu(x, norm)
    assert out[:, 7].isnan().all()
    assert not out[:, :7].isnan().any()


def test_elsewhere_the_operations_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = Stem(3, ((16, 1), (32, 2))).train()
    x = torch.rand(4, 3, 8, 8)
    learned = layers(x)
    plain = deepcopy(layers)
    monkeypatch.setattr(stem, "_suits", lambda x: False)
    torch.testing.assert_close(learned, plain(x), atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr("nkat_vit.norm_gelu.run", lambda *_: pytest.fail("no kernel is wanted"))
    layers.eval()
    torch.testing.assert_close(layers(x), nn.Sequential(*layers)(x), atol=1e-6, rtol=1e-5)
    layers.train()
    assert norm_gelu(torch.rand(2, 16, 4, 4), layers[1]).shape == (2, 16, 4, 4)  # not channels last
    assert norm_gelu(torch.rand(2, 5, 4, 4).contiguous(memory_format=torch.channels_last), random_norm(5)).shape[1] == 5
