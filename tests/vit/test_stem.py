"""The stem's kernels against torch's own operations in float64, and where they are not used."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nkat_vit import stem
from nkat_vit.model import NKATViT, ViTConfig
from nkat_vit.stem import Stem, Whitening, WhiteStem, convolve, norm_gelu

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


def coloured_noise(count: int, channels: int, side: int) -> torch.Tensor:
    """Pictures whose neighbours and colours are much alike."""
    torch.manual_seed(0)
    rough = torch.randn(count, 1, side + 2, side + 2) + 0.1 * torch.randn(count, channels, side + 2, side + 2)
    return F.avg_pool2d(rough, 3, 1)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_whitened_patches_are_uncorrelated_and_of_one_spread(channels: int) -> None:
    x = coloured_noise(400, channels, 12)
    white = Whitening(channels)
    parts = 4 * channels
    before = white(x)
    passed = F.pad(x, (0, 1, 0, 1)).unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
    torch.testing.assert_close(before[:, :parts], passed, atol=0, rtol=0)  # each pixel of a patch as it is
    white.fit(x)
    after = white(x).detach()
    torch.testing.assert_close(after[:, :parts], -after[:, parts:])

    def moments(y: torch.Tensor) -> torch.Tensor:
        inner = y[:, :parts, :-1, :-1].permute(0, 2, 3, 1).reshape(-1, parts).double()
        return inner.T @ inner / len(inner)

    patches = moments(before.detach())
    components = white.weight[:parts].flatten(1).double()
    torch.testing.assert_close(moments(after), components @ patches @ components.T, atol=1e-3, rtol=1e-3)
    spread = torch.linalg.eigvalsh(patches)
    wanted = torch.diag(spread / (spread + stem._EPSILON)).flip(0, 1)  # 1, but for what is weaker than the epsilon
    torch.testing.assert_close(moments(after), wanted, atol=1e-3, rtol=0)
    assert float((patches / patches.diagonal().mean() - torch.eye(parts)).abs().max()) > 0.3  # control
    same = Whitening(channels)
    same.fit(x)
    torch.testing.assert_close(same.weight, white.weight, atol=0, rtol=0)


def test_constant_pictures_leave_finite_filters() -> None:
    white = Whitening(3)
    white.fit(torch.zeros(10, 3, 8, 8))
    assert white.weight.isfinite().all()


def test_a_white_stem_is_its_operations_written_out() -> None:
    torch.manual_seed(0)
    ours = WhiteStem(3, ((16, 2), (32, 2))).train()
    theirs = deepcopy(ours).double()
    x = torch.rand(4, 3, 16, 16)

    def written_out(y: torch.Tensor) -> torch.Tensor:
        y = F.gelu(F.conv2d(F.pad(y, (0, 1, 0, 1)), theirs.white.weight, theirs.white.bias))
        for group in theirs.groups:
            y = F.gelu(group.first_norm(F.max_pool2d(group.first(y), 2)))
            y = y + F.gelu(group.second_norm(group.second(y)))
        return y

    found, right = ours(x), written_out(x.double())
    assert found.shape == (4, 32, 4, 4)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    right.backward(gradient.double())
    assert error(found, right) < 1e-5
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name == "white.weight":
            assert one.grad is None
            continue
        assert one.grad is not None
        assert other.grad is not None
        assert error(one.grad, other.grad) < 1e-4, name


@pytest.mark.parametrize("colors", ["off", "on", "concat"])
def test_a_model_takes_its_filters_from_normalised_pictures(colors: str) -> None:
    torch.manual_seed(0)
    config = ViTConfig(conv_stem="white", patch_size=1, embed_dim=32, depth=1, color_norm=colors)
    model, other = NKATViT(config), NKATViT(config)
    images = (coloured_noise(64, 3, 32).clamp(-2, 2) * 60 + 128).to(torch.uint8)
    start = model.stem.white.weight.clone()
    model.fit_stem(images)
    x = (images.float() / 255 - model.mean) / model.std
    if colors != "off":
        x = torch.cat([x, model.color_norm(x)], dim=1) if colors == "concat" else model.color_norm(x)
    other.stem.white.fit(x.detach())
    torch.testing.assert_close(model.stem.white.weight, other.stem.white.weight, atol=0, rtol=0)
    assert not torch.equal(start, model.stem.white.weight)
    assert config.tokens == 17
    plain = NKATViT(ViTConfig(embed_dim=32, depth=1))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    plain.fit_stem(images)  # nothing to fit
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
