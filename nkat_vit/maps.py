"""What an answer of the model rests on, as a map over the tokens of the picture; larger is more.

    relevance  for one class: R ← R + mean over heads of (∇A ⊙ A)⁺ · R, layer by layer from R = I, where A is a layer's
               attention and ∇A the gradient of that class's logit (Chefer, Gur and Wolf, arXiv 2103.15679)
    rollout    for none: R ← (½ I + ½ mean over heads of A) · R (Abnar and Zuidema, arXiv 2005.00928)
    attention  for none: the last layer's A, the mean of its heads

Each is a matrix of tokens by tokens. At its end the rows are weighed as the model's pooling weighs the tokens: the CLS
token's row alone (cls), all alike (mean), by the learned average (seq). For relevance pooling by an average is one more
attention, of a single query, and treated alike: a row counts (∇p ⊙ p)⁺, which is what of its token's share of the
logit, pᵢ wᵀxᵢ, is positive. What convolutions and MLPs mix lies outside all three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nkat_vit.model import NKATViT, ViTConfig

MAPS = ("relevance", "rollout", "attention")


def observe(model: NKATViT, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits [b, classes], attention [b, heads, n, n] a layer, and the normed tokens [b, n, dim] that are pooled."""
    final: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda _m, _i, out: final.append(out))
    try:
        logits, seen = model(images, with_attention=True)
    finally:
        hook.remove()
    return logits, seen["attention"], final[0]


def pooling_weights(model: NKATViT, tokens: Tensor) -> Tensor:
    """What the model's pooling takes from each of the final normed tokens [b, n, dim]: [b, n], rows sum to 1."""
    if model.config.pool == "seq":
        return model.pool_score(tokens).squeeze(-1).softmax(dim=1)
    if model.config.pool == "mean":
        return tokens.new_full(tokens.shape[:2], 1 / tokens.shape[1])
    return torch.nn.functional.one_hot(tokens.new_zeros(len(tokens), dtype=torch.long), tokens.shape[1]).to(tokens)


def logit_shares(model: NKATViT, tokens: Tensor, targets: Tensor) -> Tensor:
    """What each of the final normed tokens [b, n, dim] adds to the logit of its picture's target [b]: [b, n].

    They add up to the logit without the head's bias.
    """
    values = (tokens @ model.head.weight[targets][:, :, None]).squeeze(-1)
    return pooling_weights(model, tokens) * values


def rollout(attention: Sequence[Tensor], pooling: Tensor) -> Tensor:
    """How much of each input token reaches the pooled vector: [b, n], rows sum to 1 where those of pooling do.

    attention: [b, heads, n, n] a layer; pooling: [b, n], what the pooled vector takes from the last layer's tokens
    """
    total = torch.eye(pooling.shape[1], dtype=pooling.dtype, device=pooling.device)
    for weights in attention:
        step = weights.mean(dim=1)
        total = (0.5 * step + 0.5 * torch.eye(step.shape[-1], dtype=step.dtype, device=step.device)) @ total
    return (pooling[:, None] @ total).squeeze(1)


def relevance(attention: Sequence[Tensor], gradients: Sequence[Tensor], pooling: Tensor) -> Tensor:
    """How much each input token speaks for a class: [b, n], 0 or more.

    attention, gradients: [b, heads, n, n] a layer, the latter of the class's logit by the former; pooling: [b, n]
    """
    total = torch.eye(pooling.shape[1], dtype=pooling.dtype, device=pooling.device)
    for weights, slopes in zip(attention, gradients, strict=True):
        total = total + (slopes * weights).clamp_min(0).mean(dim=1) @ total
    return (pooling[:, None] @ total).squeeze(1)


def class_relevance(model: NKATViT, images: Tensor, targets: Tensor) -> Tensor:
    """`relevance` of pictures [b, c, h, w] from 0 to 1 for the class of each in targets [b], by tokens: [b, n].

    The model must be in evaluation mode; its own gradients are left alone.
    """
    with torch.enable_grad():
        pictures = images.detach().clone().requires_grad_()  # a frozen model has no other leaf
        logits, attention, tokens = observe(model, pictures)
        gradients = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), attention)
    tokens = tokens.detach()
    with torch.no_grad():
        average = model.config.pool != "cls"
        pooling = logit_shares(model, tokens, targets).clamp_min(0) if average else pooling_weights(model, tokens)
        return relevance([weights.detach() for weights in attention], gradients, pooling)


def answer_maps(model: NKATViT, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Each of `MAPS` for pictures [b, c, h, w] from 0 to 1, by cell: [b, cells]. Relevance is for targets [b]."""
    with torch.no_grad():
        _, attention, tokens = observe(model, images)
        pooling = pooling_weights(model, tokens)
        last = (pooling[:, None] @ attention[-1].mean(dim=1)).squeeze(1)
        flow = rollout(attention, pooling)
    found = {"relevance": class_relevance(model, images, targets), "rollout": flow, "attention": last}
    return {name: cells(values, model.config) for name, values in found.items()}


def cells(values: Tensor, config: ViTConfig) -> Tensor:
    """Values of tokens [..., n] without that of the CLS token, where there is one: [..., grid²]."""
    return values[..., 1:] if config.pool == "cls" else values


def on_pixels(values: Tensor, config: ViTConfig) -> Tensor:
    """Values of cells [..., grid²] at each pixel of the picture: [..., side, side], the padding cut off."""
    pixels = values.unflatten(-1, (config.grid, config.grid))
    pixels = pixels.repeat_interleave(config.cell, -2).repeat_interleave(config.cell, -1)
    before = (config.grid * config.cell - config.image_size) // 2
    inside = slice(before, before + config.image_size)
    return pixels[..., inside, inside]
