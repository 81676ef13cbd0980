"""The image model: ConvStem, patches, transformer blocks with gauge terms, pooling, classifier.

`ViTConfig` describes it and checks itself; `NKATViT(config)` takes pictures as floats from 0 to 1 and normalises them
with the config's own mean and spread, so that a checkpoint needs nothing beside it. Pictures whose side is not a
multiple of stem stride × patch are padded with black. Grey pictures have one channel and no colour features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nkat.errors import NKATError
from nkat.host.console import counted
from nkat_vit.attention import COLOR_GROUPS, Attention
from nkat_vit.dropout import dropout
from nkat_vit.gauge import FORMS, Gauge
from nkat_vit.stem import Stem, WhiteStem

# (channels, stride) of the stem's 3×3 convolutions. "tiny" is the plan's; "small" puts one at full resolution before;
# "deep" is a small convolutional network: more is learned from few pictures, in less time, than by attention alone;
# "white" (`WhiteStem`, with two convolutions for each entry) learns the most in the same time.
STEMS: dict[str, tuple[tuple[int, int], ...]] = {
    "off": (),
    "tiny": ((32, 2), (64, 2)),
    "small": ((32, 1), (64, 2), (128, 2)),
    "deep": ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2)),
    "white": ((64, 2), (128, 2), (256, 2)),
}
COLOR_NORMS = ("off", "on", "concat")
POOLS = ("cls", "seq", "mean")
_FIT_POINTS = 1 << 21  # a whitening is made from: 2,048 pictures of 32 × 32, for which it takes half a gigabyte
_BEYOND = 8.0  # how far beyond 0 and 1 a value can lie: standard deviations of noise, and not 255


@dataclass(frozen=True, slots=True)
class ViTConfig:
    """What a model is. The defaults are STAGE2's baseline for CIFAR-10: 8.5 M parameters.

    color_norm: LayerNorm over the three channels at each point: "on" in place of the picture, "concat" beside it (a
        LayerNorm over three numbers keeps only their hue: brightness and saturation are gone)
    split_heads: two of eight heads bound to each of R, G, B, two shared, in the first `color_layers` blocks
    temperature: scores are divided by it, and by √d
    top_k, top_p: filtering of attention; 0 and 1.0 are off
    nkat_strength, nkat_decay, gauge_rank: the gauge terms, strength · decay^layer; strength 0 is none at all
    gauge_form: the "star" product of query and key, or a "rotation" of the query (`nkat_vit.gauge`)
    pool: "cls" token, "seq"uence pooling (Hassani et al., arXiv 2104.05704: a learned average), or "mean"
    mean, std: of each channel, for pixels from 0 to 1
    """

    image_size: int = 32
    channels: int = 3
    classes: int = 10
    conv_stem: str = "tiny"
    patch_size: int = 2
    embed_dim: int = 384
    depth: int = 7
    heads: int = 8
    mlp_ratio: float = 2.0
    color_norm: str = "concat"
    split_heads: bool = True
    color_dim: int = 16
    color_layers: int = 3
    temperature: float = 0.65
    top_k: int = 6
    top_p: float = 0.80
    nkat_strength: float = 0.0024
    nkat_decay: float = 0.99
    gauge_rank: int = 4
    gauge_form: str = "star"
    dropout_attn: float = 0.17
    dropout_embed: float = 0.08
    dropout: float = 0.0
    drop_path: float = 0.0
    pool: str = "cls"
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)

    def __post_init__(self) -> None:
        for name in (
            "image_size",
            "classes",
            "patch_size",
            "embed_dim",
            "depth",
            "heads",
            "gauge_rank",
            "color_dim",
            "color_layers",
        ):
            _check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout_attn", "dropout_embed", "dropout", "drop_path"):
            _check(0.0 <= getattr(self, name) < 1.0, f"{name} must lie in 0 <= p < 1, got {getattr(self, name)}")
        for name, choices in (
            ("conv_stem", tuple(STEMS)),
            ("color_norm", COLOR_NORMS),
            ("pool", POOLS),
            ("gauge_form", tuple(FORMS)),
        ):
            value = getattr(self, name)
            _check(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")
        _check(self.channels in (1, 3), f"channels must be 1 or 3, got {self.channels}")
        _check(self.embed_dim % self.heads == 0, f"{self.heads} heads do not divide embed_dim {self.embed_dim}")
        _check(self.mlp_ratio > 0, f"mlp_ratio must be positive, got {self.mlp_ratio}")
        _check(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        _check(self.top_k >= 0, f"top_k must be at least 0 (off), got {self.top_k}")
        _check(0.0 < self.top_p <= 1.0, f"top_p must lie in 0 < p <= 1, got {self.top_p}")
        _check(self.nkat_strength >= 0, f"nkat_strength must be at least 0, got {self.nkat_strength}")
        _check(0.0 < self.nkat_decay <= 1.0, f"nkat_decay must lie in 0 < decay <= 1, got {self.nkat_decay}")
        for name in ("mean", "std"):
            size = len(getattr(self, name))
            _check(size == self.channels, f"{name} has {size} numbers for {counted(self.channels, 'channel')}")
        _check(min(self.std) > 0, f"std must be positive, got {self.std}")
        if self.channels == 1:
            _check(self.color_norm == "off", "color_norm needs three channels, a grey picture has no colours")
            _check(not self.split_heads, "split_heads needs three channels, a grey picture has no colours")
        if self.split_heads:
            _check(self.heads % COLOR_GROUPS == 0, f"split_heads needs a multiple of four heads, got {self.heads}")
        _check(
            self.grid > 1,
            f"patch_size {self.patch_size} behind the stem {self.conv_stem} makes one token of a picture of "
            f"{self.image_size} pixels: there is nothing to attend to; give a smaller patch_size",
        )

    @property
    def cell(self) -> int:
        """Side of the square of pixels that one token covers: stem stride × patch."""
        stride = 1
        for _, step in STEMS[self.conv_stem]:
            stride *= step
        return stride * self.patch_size

    @property
    def grid(self) -> int:
        """Patches on a side, after padding."""
        return -(-self.image_size // self.cell)

    @property
    def tokens(self) -> int:
        """Length of the sequence, with the CLS token where there is one."""
        return self.grid**2 + (self.pool == "cls")


class Block(nn.Module):
    """Pre-norm transformer block. drop_path drops a branch for whole pictures (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, config: ViTConfig, layer: int) -> None:
        super().__init__()
        dim, hidden = config.embed_dim, round(config.embed_dim * config.mlp_ratio)
        gauge = None
        if config.nkat_strength > 0:
            strength = config.nkat_strength * config.nkat_decay**layer
            gauge = Gauge(config.heads, dim // config.heads, config.gauge_rank, strength, layer, config.gauge_form)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(
            dim,
            config.heads,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            dropout=config.dropout_attn,
            gauge=gauge,
            color_dim=config.color_dim if config.split_heads and layer < config.color_layers else 0,
        )
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, hidden)
        self.mlp_out = nn.Linear(hidden, dim)
        self.dropout = config.dropout
        self.drop_path = config.drop_path * layer / max(config.depth - 1, 1)  # deeper layers are dropped more often

    def forward(self, x: Tensor, color: Tensor | None, with_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens [b, n, dim] in and out, with the attention weights [b, heads, n, n] on request."""
        mixed, weights = self.attention(self.attention_norm(x), color, with_weights)
        x = x + self._survives(mixed)
        hidden = dropout(F.gelu(self.mlp_in(self.mlp_norm(x))), self.dropout, self.training)
        return x + self._survives(dropout(self.mlp_out(hidden), self.dropout, self.training)), weights

    def _survives(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * (torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep).to(branch.dtype).div_(keep)


class ColorNorm(nn.Module):
    """LayerNorm over the three channels at each point of [b, 3, h, w].

    Written out: torch's kernel takes a row at a time, and a row of three numbers leaves a processor idle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """The same shape."""
        centred = images - images.mean(dim=1, keepdim=True)
        spread = torch.rsqrt((centred * centred).mean(dim=1, keepdim=True) + 1e-5)
        return torch.addcmul(self.bias, centred * spread, self.weight)


class NKATViT(nn.Module):
    """The model of a config. Call it with pictures [b, channels, image_size, image_size], floats from 0 to 1."""

    mean: Tensor
    std: Tensor
    blocks: Sequence[Block]  # an nn.ModuleList, whose own type does not say what is in it

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.register_buffer("mean", torch.tensor(config.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(-1, 1, 1))
        channels = config.channels
        if config.color_norm != "off":
            self.color_norm = ColorNorm()
            channels *= 2 if config.color_norm == "concat" else 1
        layers = STEMS[config.conv_stem]
        self.stem = (WhiteStem if config.conv_stem == "white" else Stem)(channels, layers)
        channels = layers[-1][0] if layers else channels
        self.embed = nn.Linear(channels * config.patch_size**2, dim)
        self.position = nn.Parameter(torch.zeros(1, config.tokens, dim))
        if config.split_heads:
            self.color_embed = nn.Parameter(torch.zeros(3, config.cell**2, config.color_dim))
        if config.pool == "cls":
            self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        elif config.pool == "seq":
            self.pool_score = nn.Linear(dim, 1)
        self.add_module("blocks", nn.ModuleList(Block(config, layer) for layer in range(config.depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.classes)
        self._initialise()

    def forward(self, images: Tensor, with_attention: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """Returns logits [b, classes] and named intermediates.

        Always "pooled" [b, dim]; with_attention adds "attention", one [b, heads, tokens, tokens] a layer.
        """
        config = self.config
        self._check_pictures(images)
        images = self._normalised(images)
        x = dropout(self._tokens(images), config.dropout_embed, self.training)
        color = self._color_features(images) if config.split_heads else None
        attention = []
        for layer, block in enumerate(self.blocks):
            x, weights = block(x, color if layer < config.color_layers else None, with_attention)
            attention.append(weights)
        pooled = self._pool(self.norm(x))
        intermediates: dict[str, Any] = {"pooled": pooled}
        if with_attention:
            intermediates["attention"] = attention
        return self.head(pooled), intermediates

    @torch.no_grad()
    def fit_stem(self, images: Tensor) -> None:
        """Before training: what the stem takes from some of pictures uint8 [n, channels, size, size], if anything."""
        if isinstance(self.stem, WhiteStem):
            some = images[: max(_FIT_POINTS // self.config.image_size**2, 1)]
            self.stem.white.fit(self._colours(self._normalised(some.float() / 255)))

    def _normalised(self, images: Tensor) -> Tensor:
        """Padded to whole cells, with the set's mean and spread."""
        missing = self.config.grid * self.config.cell - self.config.image_size
        before = missing // 2
        images = F.pad(images, (before, missing - before, before, missing - before))
        return (images - self.mean) / self.std

    def _check_pictures(self, images: Tensor) -> None:
        """Raises NKATError for what is no batch of this model's pictures; it would else give classes all the same.

        Values are looked at in evaluation mode only, where nobody minds that a GPU has to wait for it, and not while a
        program is made of the model. Those of noise, or of an attack, may lie beyond 0 and 1.
        """
        config = self.config
        expected = (config.channels, config.image_size, config.image_size)
        wanted = f"the model takes floats from 0 to 1 of shape [batch, {', '.join(map(str, expected))}]"
        if not images.is_floating_point():
            scale = ": divide by 255" if images.dtype == torch.uint8 else ""
            raise NKATError(f"these pictures are {images.dtype}, {wanted}{scale}")
        if images.ndim != 4 or images.shape[1:] != expected:
            raise NKATError(f"these pictures have the shape {list(images.shape)}, {wanted}")
        if torch.promote_types(images.dtype, self.mean.dtype) != self.mean.dtype:
            raise NKATError(
                f"these pictures are {images.dtype} and the model's weights {self.mean.dtype}: bring them to one type"
            )
        if self.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if not len(images):
            raise NKATError(f"there are no pictures in this batch, {wanted}")
        low, high = (value.item() for value in images.detach().aminmax())
        if not -_BEYOND <= low <= high <= 1 + _BEYOND:
            raise NKATError(f"these pictures have values from {low:g} to {high:g}, {wanted}")

    def _tokens(self, images: Tensor) -> Tensor:
        """Normalised pictures → tokens [b, n, dim] with their positions."""
        x = self.embed(_patches(self.stem(self._colours(images)), self.config.patch_size))
        if self.config.pool == "cls":
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        return x + self.position

    def _colours(self, images: Tensor) -> Tensor:
        """Normalised pictures with the norm of their colours, as the stem takes them."""
        if self.config.color_norm == "off":
            return images
        normed = self.color_norm(images)
        return torch.cat([images, normed], dim=1) if self.config.color_norm == "concat" else normed

    def _color_features(self, images: Tensor) -> Tensor:
        """The local features of red, green and blue side by side: [b·n, 3 · color_dim], zero at the CLS token."""
        b, cell = images.shape[0], self.config.cell  # len() would fix the batch in an exported model
        pixels = _patches(images, cell).view(b, -1, 3, cell**2).permute(2, 0, 1, 3).reshape(3, -1, cell**2)
        features = torch.bmm(pixels, self.color_embed).transpose(0, 1).reshape(b, -1, 3 * self.config.color_dim)
        if self.config.pool == "cls":
            features = F.pad(features, (0, 0, 1, 0))
        return features.flatten(0, 1)

    def _pool(self, x: Tensor) -> Tensor:
        if self.config.pool == "cls":
            return x[:, 0]
        if self.config.pool == "mean":
            return x.mean(dim=1)
        return (self.pool_score(x).softmax(dim=1).mT @ x).squeeze(1)

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
                if name.endswith(("attention.out", "mlp_out")):  # GPT-2's rule: the residual stream grows evenly
                    module.weight.data.div_((2 * self.config.depth) ** 0.5)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.trunc_normal_(self.embed.weight, std=self.embed.in_features**-0.5)
        nn.init.trunc_normal_(self.position, std=0.02)
        if self.config.split_heads:
            nn.init.trunc_normal_(self.color_embed, std=1 / self.config.cell)
        if self.config.pool == "cls":
            nn.init.trunc_normal_(self.cls, std=0.02)


class LogitsOnly(nn.Module):
    """A model without its intermediates, as programs that explain or export a classifier take it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[b, c, h, w] from 0 to 1 → [b, classes]"""
        logits: Tensor = self.model(images)[0]
        return logits


@cache
def count_parameters(config: ViTConfig) -> int:
    """Learned numbers of the config's model, counted on one (torch's "meta" device takes seconds to import)."""
    with torch.random.fork_rng(devices=[]):
        return sum(p.numel() for p in NKATViT(config).parameters())


def _patches(x: Tensor, size: int) -> Tensor:
    """[b, c, h, w] → [b, (h/size)·(w/size), c·size²]: what a convolution with stride = kernel = size sees."""
    b, c, h, w = x.shape
    cells = x.reshape(b, c, h // size, size, w // size, size).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b, (h // size) * (w // size), c * size * size)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise NKATError(message)
