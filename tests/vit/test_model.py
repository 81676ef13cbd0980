"""The image model: its config, its three ways through attention, filtering, and what colours and gauge terms do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import nkat_vit
from nkat.errors import NKATError
from nkat_vit import attention as attention_module
from nkat_vit.attention import Attention
from nkat_vit.dropout import dropout
from nkat_vit.filtering import _largest, acts, filter_scores_, lowest_kept
from nkat_vit.model import ColorNorm, LogitsOnly, NKATViT, ViTConfig, count_parameters
from tests.support.public_names import check_light, check_names

pytestmark = pytest.mark.isa

SMALL = ViTConfig(
    embed_dim=32, depth=2, heads=4, color_dim=4, gauge_rank=2, nkat_strength=0.5, dropout_attn=0.0, dropout_embed=0.0
)
GREY = replace(
    SMALL, image_size=28, channels=1, color_norm="off", split_heads=False, mean=(0.13,), std=(0.31,), classes=47
)


def build(config: ViTConfig, seed: int = 0) -> NKATViT:
    """With colour weights that are not the zeros they start as."""
    torch.manual_seed(seed)
    model = NKATViT(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("attention.color"):
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(5))
    return model


def pictures(config: ViTConfig, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, config.channels, config.image_size, config.image_size, generator=generator)


def test_the_plans_baseline_has_the_plans_size() -> None:
    plain = ViTConfig(color_norm="off", split_heads=False, nkat_strength=0.0)
    assert count_parameters(plain) == pytest.approx(8.4e6, rel=5e-3)
    assert count_parameters(replace(plain, mlp_ratio=4.0)) == pytest.approx(12.6e6, rel=5e-3)
    assert count_parameters(ViTConfig()) == pytest.approx(8.5e6, rel=5e-3)
    assert count_parameters(ViTConfig()) == 8_479_127  # λ_theory is measured in it: 20 is this many
    stem = count_parameters(plain) - count_parameters(replace(plain, conv_stem="off", patch_size=8))
    assert abs(stem) < 60_000  # the plan says about 30 K


@pytest.mark.parametrize(
    ("change", "grid"),
    [
        ({}, 4),
        ({"conv_stem": "off", "patch_size": 4}, 8),
        ({"conv_stem": "small", "patch_size": 1, "pool": "seq"}, 8),
        ({"conv_stem": "deep", "patch_size": 1, "pool": "seq"}, 4),
        ({"conv_stem": "white", "patch_size": 1, "pool": "seq"}, 4),
        ({"color_norm": "on", "pool": "mean"}, 4),
        ({"color_norm": "off", "split_heads": False}, 4),
    ],
)
def test_shapes_of_colour_models(change: dict, grid: int) -> None:
    config = replace(SMALL, **change)
    logits, seen = build(config)(pictures(config), with_attention=True)
    tokens = grid**2 + (config.pool == "cls")
    assert config.tokens == tokens
    assert logits.shape == (3, 10)
    assert [tuple(a.shape) for a in seen["attention"]] == [(3, 4, tokens, tokens)] * 2
    torch.testing.assert_close(seen["attention"][0].sum(-1), torch.ones(3, 4, tokens))


@pytest.mark.parametrize(("patch", "grid"), [(1, 7), (2, 4)])
def test_grey_pictures_of_28_pixels(patch: int, grid: int) -> None:
    config = replace(GREY, patch_size=patch)
    logits, _ = build(config)(pictures(config))
    assert config.grid == grid
    assert logits.shape == (3, 47)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "do not divide"),
        ({"heads": 2}, "multiple of four"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"conv_stem": "huge"}, "off, tiny, small, deep, white"),
        ({"channels": 1}, "numbers for 1 channel"),
        ({"channels": 1, "mean": (0.5,), "std": (0.5,)}, "three channels"),
        ({"nkat_decay": 1.5}, "nkat_decay"),
        ({"depth": 0}, "depth"),
        ({"dropout_attn": 1.0}, "dropout_attn"),
        ({"std": (0.1, 0.0, 0.1)}, "std"),
        ({"patch_size": 16}, "one token of a picture of 32 pixels: there is nothing to attend to"),
        ({"patch_size": 8}, "one token"),
    ],
)
def test_impossible_configs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(NKATError, match=message):
        replace(SMALL, **change)


def test_what_is_no_batch_of_its_pictures_is_refused_in_words() -> None:
    model, x = build(SMALL), pictures(SMALL)
    expected = r"floats from 0 to 1 of shape \[batch, 3, 32, 32\]"
    refused = {
        rf"torch.uint8, the model takes {expected}: divide by 255": (255 * x).to(torch.uint8),
        rf"torch.int64, the model takes {expected}$": (255 * x).long(),
        rf"values from \S+ to 2\d\d\S*, the model takes {expected}": 255 * x,
        rf"values from nan to nan, the model takes {expected}": x * torch.nan,
        rf"shape \[3, 32, 32\], the model takes {expected}": x[0],
        rf"shape \[3, 1, 32, 32\], the model takes {expected}": x[:, :1],
        rf"shape \[3, 3, 30, 30\], the model takes {expected}": x[..., 1:31, 1:31],  # it would be padded
        rf"shape \[3, 3, 32, 40\], the model takes {expected}": torch.rand(3, 3, 32, 40),
        "no pictures in this batch": x[:0],
        "torch.float64 and the model's weights torch.float32": x.double(),
    }
    for message, images in refused.items():
        with pytest.raises(NKATError, match=message):
            model(images)
    assert torch.equal(model.double()(x.double())[0], model(x)[0])  # float32 is part of float64
    noisy = x + torch.randn_like(x)
    assert model.float()(noisy)[0].shape == (3, 10)  # attacks and noise lie beyond 0 and 1


def test_the_package_gives_the_model_and_its_logits_alone() -> None:
    assert nkat_vit.NKATViT is NKATViT
    assert nkat_vit.LogitsOnly is LogitsOnly
    model, x = build(SMALL), pictures(SMALL).requires_grad_()
    logits = nkat_vit.LogitsOnly(model)(x)
    assert torch.equal(logits, model(x)[0])
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)  # what every program that explains begins with
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    check_names(nkat_vit)


def test_importing_the_package_loads_nothing_heavy() -> None:
    check_light(nkat_vit, {"torch", "numpy"}, "NKATViT")


def test_fused_and_written_out_attention_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, top_k=0, top_p=1.0)
    model, x = build(config), pictures(config)
    written = model(x)[0]
    calls = []
    fused = F.scaled_dot_product_attention

    def counted(*arguments: torch.Tensor, **options: float) -> torch.Tensor:
        calls.append(1)
        return fused(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(attention_module, "_FUSED_FROM_KEYS", 1)
    torch.testing.assert_close(model(x)[0], written, atol=1e-5, rtol=1e-5)
    assert len(calls) == config.depth
    torch.testing.assert_close(model(x, with_attention=True)[0], written, atol=1e-5, rtol=1e-5)
    assert len(calls) == config.depth  # weights asked for: written out
    other = build(replace(config, top_k=3))(x)[0]  # control: a filter changes the function
    assert len(calls) == config.depth
    assert not torch.allclose(other, written, atol=1e-4)


def test_attention_is_the_star_product_written_out() -> None:
    """The whole layer against one head after another, in float64."""
    config = replace(SMALL, top_k=0, top_p=1.0)
    layer: Attention = build(config).blocks[0].attention.double()
    n, dim, size = 6, 32, 8
    x, color = torch.randn(2, n, dim).double(), torch.randn(2 * n, 3 * 4).double()
    expected = torch.zeros(2, n, dim).double()
    theta, strength = layer.gauge.theta(), layer.gauge.strength()
    for b in range(2):
        for h in range(4):
            weights = [layer.q.weight, *layer.kv.weight.chunk(2)]
            biases = [layer.q.bias, *layer.kv.bias.chunk(2)]
            rows = slice(h * size, (h + 1) * size)
            q, k, v = (x[b] @ w[rows].T + c[rows] for w, c in zip(weights, biases, strict=True))
            red, green, blue = color[b * n : (b + 1) * n].chunk(3, dim=1)
            own = (red, green, blue, (red + green + blue) / 3)[h]  # one head a group here
            seen = own @ layer.color[h]
            k, v = k + seen[:, :size], v + seen[:, size:]
            scores = q @ k.T + 0.5 * strength * q @ theta[h] @ k.T
            expected[b, :, rows] = torch.softmax(scores / (size**0.5 * config.temperature), -1) @ v
    expected = expected @ layer.out.weight.T + layer.out.bias
    torch.testing.assert_close(layer(x, color, False)[0], expected, atol=1e-8, rtol=1e-5)  # a third is a float32
    assert not torch.allclose(layer(x, color.roll(4, 1), False)[0], expected, atol=1e-3)  # control: other colours


def test_strength_zero_is_bit_identical_to_no_gauge() -> None:
    off = build(replace(SMALL, nkat_strength=0.0))
    x = pictures(SMALL)
    assert not any("gauge" in name for name, _ in off.named_parameters())
    on = build(SMALL)
    shared = {name: p for name, p in on.state_dict().items() if "gauge" not in name}
    assert all(torch.equal(p, shared[name]) for name, p in off.state_dict().items())  # the seed gives the same rest
    for block in on.blocks:
        block.attention.gauge = None
    assert torch.equal(on(x)[0], off(x)[0])
    assert not torch.equal(build(SMALL)(x)[0], off(x)[0])  # control: the term does something


def test_gauge_gain_zero_equals_no_gauge_and_strength_decays() -> None:
    model, x = build(replace(SMALL, nkat_decay=0.5)), pictures(SMALL)
    assert model.blocks[1].attention.gauge.strength().item() == pytest.approx(0.5 * 0.5)
    for block in model.blocks:
        block.attention.gauge.gain.data.zero_()
    torch.testing.assert_close(model(x)[0], build(replace(SMALL, nkat_strength=0.0))(x)[0], atol=1e-6, rtol=1e-6)


def test_every_parameter_learns() -> None:
    for config in (SMALL, replace(SMALL, pool="seq", color_norm="on"), GREY):
        model = build(config).train()
        F.cross_entropy(model(pictures(config))[0], torch.tensor([1, 2, 3])).backward()
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        # what is added to all scores of a softmax changes nothing: that one's gradient is rounding, or 0
        assert set(idle) <= {"pool_score.bias"}


def test_colour_heads_see_their_own_colour_only() -> None:
    """Changing blue pixels changes blue features, and with them keys and values of blue and shared heads only."""
    model, x = build(SMALL), pictures(SMALL)
    changed = x.clone()
    changed[:, 2] = 1 - changed[:, 2]
    before, after = model._color_features(x), model._color_features(changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])
    assert before.view(len(x), SMALL.tokens, -1)[:, 0].abs().max() == 0  # the CLS token has no place
    weight = model.blocks[0].attention.color_weight().detach().view(3, 4, 2, 4, 8)  # colour, width, k or v, head, size
    seen = weight.abs().amax(dim=(1, 2, 4)) > 0
    assert seen.tolist() == [[c == h or h == 3 for h in range(4)] for c in range(3)]


def test_color_norm_is_layer_norm_over_the_channels() -> None:
    norm, x = ColorNorm().double(), torch.rand(2, 3, 5, 7, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (3,), norm.weight.flatten(), norm.bias.flatten())
    torch.testing.assert_close(norm(x), expected.permute(0, 3, 1, 2))
    assert not torch.allclose(norm(x), F.layer_norm(x, x.shape[1:]), atol=0.1)  # control: over all of a picture


def test_a_color_norm_alone_loses_brightness_and_concat_keeps_it() -> None:
    x = pictures(SMALL) * 0.4
    brighter = x + 0.3 * torch.tensor(SMALL.std).view(3, 1, 1)  # the same for each channel, once normalised
    assert not torch.allclose(*(build(SMALL)(v)[0] for v in (x, brighter)), atol=1e-4)
    only_hue = build(replace(SMALL, color_norm="on", split_heads=False, conv_stem="off", patch_size=8))
    torch.testing.assert_close(only_hue(x)[0], only_hue(brighter)[0], atol=1e-3, rtol=1e-3)


@given(st.integers(1, 20), st.integers(0, 25), st.sampled_from([0.05, 0.3, 0.8, 0.95, 1.0]), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_filter_against_a_written_out_loop(keys: int, top_k: int, top_p: float, seed: int) -> None:
    scores = torch.randn(2, 3, keys, generator=torch.Generator().manual_seed(seed)) * 2
    filtered = filter_scores_(scores.clone(), top_k, top_p)
    for row, got in zip(scores.view(-1, keys), filtered.view(-1, keys), strict=True):
        order = row.sort(descending=True).indices[: min(top_k, keys) if top_k else keys].tolist()
        weights = row[order].double().softmax(-1)
        kept = {k for i, k in enumerate(order) if i == 0 or float(weights[:i].sum()) < top_p or top_p == 1.0}
        assert {k for k in range(keys) if got[k] > float("-inf")} == kept
        assert row.argmax().item() in kept
    if not acts(top_k, top_p, keys):
        assert torch.equal(filtered, scores)


def test_largest_by_comparisons_and_by_topk_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(4, 5, 17).bfloat16()  # with ties
    compared = torch.stack(_largest(scores, 6))
    monkeypatch.setattr("nkat_vit.filtering._MAX_PAIRS", 0)
    assert torch.equal(compared, torch.stack(_largest(scores, 6)))
    assert torch.equal(compared, scores.sort(descending=True).values[..., :6].movedim(-1, 0))


def test_ties_stay_together_and_order_of_keys_does_not_matter() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    assert lowest_kept(scores, 2, 1.0).item() == 2.0
    assert (filter_scores_(scores.clone(), 2, 1.0) > float("-inf")).sum() == 3
    flipped = filter_scores_(scores.flip(-1), 2, 1.0)
    assert torch.equal(flipped.flip(-1), filter_scores_(scores.clone(), 2, 1.0))


def test_filtered_keys_have_weight_and_gradient_zero() -> None:
    scores = torch.randn(4, 9, requires_grad=True)
    weights = filter_scores_(scores * 1.0, 3, 0.9).softmax(-1)
    (weights * torch.randn(4, 9)).sum().backward()
    assert torch.equal(weights == 0, scores.grad == 0)
    assert (weights > 0).sum(-1).max() <= 3


def test_training_and_evaluation_filter_alike() -> None:
    model, x = build(SMALL), pictures(SMALL)
    evaluated = model(x, with_attention=True)[1]["attention"][0]
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # it alone may differ: there is no dropout here
    assert torch.equal(model(x, with_attention=True)[1]["attention"][0], evaluated)


def test_dropouts_act_in_training_only_and_follow_the_seed() -> None:
    config = replace(SMALL, dropout_attn=0.5, dropout_embed=0.2, dropout=0.2, drop_path=0.5)
    model, x = build(config), pictures(config)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(x)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.17, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype: torch.dtype, probability: float) -> None:
    x = torch.ones(3, 7, 10001, dtype=dtype, requires_grad=True)  # no multiple of four
    y = dropout(x, probability, training=True)
    share = (y == 0).double().mean().item()
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / x.numel()) ** 0.5)
    assert y.max().item() == pytest.approx(1 / (1 - probability), rel=1e-2)
    y.sum().backward()
    assert torch.equal(x.grad, y)  # of ones: the mask itself
    flat = (y == 0).double().flatten()
    for lag in (1, 2, 4, 10001):  # neighbours, lanes of a draw, rows: independent
        together = (flat[lag:] * flat[:-lag]).mean().item()
        assert together == pytest.approx(probability**2, abs=0.01)
    assert dropout(x, probability, training=False) is x
    assert dropout(x, 0.0, training=True) is x
