"""Maps of what an answer rests on: sums and gradients written out, a model that looks at one token, poolings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nkat_vit.maps import (
    MAPS,
    answer_maps,
    cells,
    class_relevance,
    logit_shares,
    observe,
    on_pixels,
    pooling_weights,
    relevance,
    rollout,
)
from nkat_vit.model import NKATViT, ViTConfig

CONFIG = ViTConfig(
    embed_dim=32, depth=2, heads=4, color_dim=4, gauge_rank=2, nkat_strength=0.8, dropout_attn=0, dropout_embed=0
)
POOLS = ("cls", "seq", "mean")
# One layer, one head, 16 cells of 7 × 7 pixels; everything in it is set by hand below.
BARE = ViTConfig(
    image_size=28, channels=1, classes=4, conv_stem="off", patch_size=7, embed_dim=32, depth=1, heads=1, mlp_ratio=1.0,
    color_norm="off", split_heads=False, temperature=1.0, top_k=0, top_p=1.0, nkat_strength=0.0, pool="cls",
    mean=(0.0,), std=(1.0,),
)  # fmt: skip


def looks_at(cell: int, pool: str = "cls") -> NKATViT:
    """A model whose every query looks at one cell, by its position, and whose first class is how bright that is."""
    model = NKATViT(replace(BARE, pool=pool)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.blocks[0].attention_norm, model.blocks[0].mlp_norm, model.norm):
            norm.weight.fill_(1)
        model.embed.weight[0] = 1 / 49  # brightness is dimension 0
        model.position[0, :, 1] = 3.0
        model.position[0, cell + (pool == "cls"), 2] = 6.0  # the cell's mark, which keys are made of
        attention = model.blocks[0].attention
        attention.q.bias[2] = 30.0
        attention.kv.weight[2, 2] = 1.0
        attention.kv.weight[32, 0] = 5.0  # values carry brightness
        attention.out.weight[3, 0] = 1.0
        model.head.weight[0, 3] = 1.0
        model.head.weight[1, 3] = -1.0
        if pool == "seq":
            model.pool_score.weight.zero_()
    return model


def test_rollout_is_the_sum_over_paths() -> None:
    attention = [torch.rand(2, 3, 5, 5, dtype=torch.float64).softmax(-1) for _ in range(2)]
    pooling = torch.rand(2, 5, dtype=torch.float64).softmax(-1)
    got = rollout(attention, pooling)
    steps = [0.5 * layer.mean(1) + 0.5 * torch.eye(5, dtype=torch.float64) for layer in attention]
    expected = torch.einsum("bi,bij,bjk->bk", pooling, steps[1], steps[0])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, dtype=torch.float64))
    assert not torch.allclose(rollout(attention[::-1], pooling), got)  # control: layers have an order


def test_relevance_is_the_papers_rule_token_by_token() -> None:
    """Equations 5 and 6 of arXiv 2103.15679, with loops in place of matrices."""
    generator = torch.Generator().manual_seed(0)
    attention = [torch.rand(1, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    slopes = [torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    total = [[float(i == j) for j in range(3)] for i in range(3)]
    for weights, gradient in zip(attention, slopes, strict=True):
        bar = [
            [sum(max(float(weights[0, h, i, k] * gradient[0, h, i, k]), 0.0) for h in range(2)) / 2 for k in range(3)]
            for i in range(3)
        ]
        total = [[total[i][j] + sum(bar[i][k] * total[k][j] for k in range(3)) for j in range(3)] for i in range(3)]
    pooling = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    got = relevance(attention, slopes, pooling)
    torch.testing.assert_close(got, torch.tensor([total[0]], dtype=torch.float64))
    assert not torch.allclose(relevance(attention, [-slope for slope in slopes], pooling), got)  # control: the sign


@pytest.mark.parametrize("pool", POOLS)
def test_gradients_are_those_of_the_logit_by_attention(pool: str) -> None:
    """Against differences of the logit when single weights of attention are changed in the running model."""
    torch.manual_seed(1)
    model = NKATViT(replace(CONFIG, pool=pool, embed_dim=16, heads=4, top_k=3)).double().eval()
    with torch.no_grad():  # more than the start's small weights, or every difference is a rounding
        for parameter in model.parameters():
            parameter.mul_(2.0)
    images, target = torch.rand(1, 3, 32, 32, dtype=torch.float64), torch.tensor([2])
    got = class_relevance(model, images, target)
    with torch.no_grad():
        _, attention, tokens = observe(model, images)
        slopes = [torch.zeros_like(weights) for weights in attention]
        for layer, weights in enumerate(attention):
            places = (weights[0] > 0).nonzero()
            steps = torch.zeros(len(places), *weights.shape[1:], dtype=torch.float64)
            steps[torch.arange(len(places)), places[:, 0], places[:, 1], places[:, 2]] = 1e-4
            high, low = (_logits_with(model, images, 2, layer, weights + sign * steps) for sign in (1, -1))
            slopes[layer][0][tuple(places.T)] = (high - low) / 2e-4
        pooling = pooling_weights(model, tokens)
        if pool != "cls":
            pooling = (pooling * (tokens @ model.head.weight[2])).clamp_min(0)
        torch.testing.assert_close(got, relevance(attention, slopes, pooling), rtol=1e-5, atol=1e-9)
    assert not torch.allclose(class_relevance(model, images, torch.tensor([3])), got, rtol=1e-2)  # control: a class


def _logits_with(model: NKATViT, images: Tensor, target: int, layer: int, weights: Tensor) -> Tensor:
    """The logit when a layer's attention weights are these [k, heads, n, n], one after the other: [k]."""
    attention = model.blocks[layer].attention

    def replaced(_module: object, arguments: tuple, _output: object) -> tuple[Tensor, None]:
        v = attention.project(*arguments[:2])[2]
        return attention.out((weights @ v).transpose(1, 2).flatten(2)), None

    hook = attention.register_forward_hook(replaced)
    try:
        return model(images.expand(len(weights), -1, -1, -1))[0][:, target]
    finally:
        hook.remove()


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_weights_give_the_pooled_vector_and_shares_the_logit(pool: str) -> None:
    model = NKATViT(replace(CONFIG, pool=pool)).eval()
    images, targets = torch.rand(3, 3, 32, 32), torch.tensor([0, 4, 9])
    logits, _, tokens = observe(model, images)
    pooled = model(images)[1]["pooled"]
    torch.testing.assert_close((pooling_weights(model, tokens)[:, None] @ tokens).squeeze(1), pooled)
    whole = logit_shares(model, tokens, targets).sum(dim=1) + model.head.bias[targets]
    torch.testing.assert_close(whole, logits.gather(1, targets[:, None]).squeeze(1))


@pytest.mark.parametrize("cell", [5, 10])
def test_a_model_that_looks_at_one_cell_is_found_out(cell: int) -> None:
    model = looks_at(cell)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 28, 28, generator=generator)
    at = on_pixels(torch.arange(16), BARE) == cell
    before = model(image)[0]
    assert not torch.allclose(model(torch.where(at, 0.0, image))[0], before, atol=1e-2)  # it is what it claims to be
    torch.testing.assert_close(model(torch.where(at, image, 0.0))[0], before, atol=1e-4, rtol=1e-3)
    found = answer_maps(model, image, torch.tensor([0]))
    assert found.keys() == set(MAPS)
    for values in found.values():
        assert int(values.argmax()) == cell
    mass = found["relevance"][0] / found["relevance"].sum()
    assert mass[cell] > 0.99
    other = answer_maps(looks_at(15 - cell), image, torch.tensor([0]))["relevance"][0]  # control: another cell
    assert int(other.argmax()) == 15 - cell
    assert other[cell] < 0.01 * other.sum()


def test_relevance_is_for_a_class_and_attention_is_not() -> None:
    """What speaks for the first class speaks against the second: it has no relevance for that one."""
    model, image = looks_at(6), torch.rand(1, 1, 28, 28)
    for_first, for_second = (answer_maps(model, image, torch.tensor([label])) for label in (0, 1))
    assert for_first["relevance"][0, 6] > 100 * for_second["relevance"][0, 6]
    for name in ("rollout", "attention"):
        assert torch.equal(for_first[name], for_second[name])


@pytest.mark.parametrize("pool", POOLS)
def test_maps_are_repeatable_and_leave_the_model_alone(pool: str) -> None:
    model = NKATViT(replace(CONFIG, pool=pool)).eval()
    images, targets = torch.rand(2, 3, 32, 32), torch.tensor([1, 7])
    first = answer_maps(model, images, targets)
    for parameter in model.parameters():
        assert parameter.grad is None
        parameter.requires_grad_(False)  # as a frozen model
    again = answer_maps(model, images, targets)
    for name in MAPS:
        assert torch.equal(first[name], again[name])
        assert first[name].shape == (2, 16)
        assert (first[name] >= 0).all()
    one = answer_maps(model, images[1:], targets[1:])  # a picture's map does not depend on the others
    torch.testing.assert_close(one["relevance"], first["relevance"][1:], rtol=1e-4, atol=1e-6)


def test_cells_lie_where_their_pixels_are() -> None:
    config = replace(BARE, patch_size=8)  # 28 pixels in cells of 8: two are padding on each side
    assert torch.equal(cells(torch.arange(17), config), torch.arange(1, 17))
    assert torch.equal(cells(torch.arange(16), replace(config, pool="mean")), torch.arange(16))
    pixels = on_pixels(torch.arange(16), config)
    assert pixels.shape == (28, 28)
    assert pixels[0, :7].tolist() == [0] * 6 + [1]
    assert pixels[6, 0] == 4
    assert pixels[-1, -1] == 15
    assert [int((pixels == cell).sum()) for cell in (0, 1, 5)] == [36, 48, 64]
