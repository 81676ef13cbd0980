"""Training step of the image model against a plain ViT of the same size, interleaved in one run.

    python -m benchmarks.vit_step --threads 2
    python -m benchmarks.vit_step --patch-size 1 --conv-stem small      64 tokens instead of 16
    python -m benchmarks.vit_step --compile      our model by torch.compile too, as nkat_vit.train --compile has it

The peer is built from torch.nn.TransformerEncoderLayer (pre-norm, GELU, same width, depth, heads, MLP, tokens) behind
one convolution that makes the patches. It has no stem, no colour features, no filtering, no gauge terms and no
dropout. It is timed twice: as it comes, and with torch's unfused attention, which on a processor can be the faster. All
arms run the same forward, loss, backward and AdamW step in turns on the same pictures; a ratio is the median of the
paired ratios of each round. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.vit_step")

import contextlib
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nkat.host import commandline, console
from nkat.host.console import say
from nkat.host.distributed import World
from nkat.host.hardware import describe, pick_device, set_threads
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat_vit.augment import AugmentConfig, augment
from nkat_vit.loop import compile_model
from nkat_vit.model import STEMS, NKATViT, ViTConfig
from nkat_vit.predict import autocast

WARM_UP = 2


class PlainViT(nn.Module):
    """The peer, with as many tokens of the same width."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.patches = nn.Conv2d(3, dim, config.cell, config.cell)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, config.grid**2 + 1, dim))
        hidden = round(dim * config.mlp_ratio)
        layer = nn.TransformerEncoderLayer(dim, config.heads, hidden, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.depth, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, config.classes)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """[b, 3, h, w] → (logits [b, classes],)"""
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return (self.head(self.encoder(x)[:, 0]),)


def make_step(model: nn.Module, images: Tensor, labels: Tensor, amp: str, unfused: bool = False) -> Callable[[], float]:
    """A whole training step; calling it returns its seconds."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    device = images.device

    def step() -> float:
        context = sdpa_kernel(SDPBackend.MATH) if unfused else contextlib.nullcontext()
        started = perf_counter()
        with context:
            with autocast(device, amp):
                logits = model(images)[0]
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - started

    return step


def make_augmentation(images: Tensor, labels: Tensor) -> Callable[[], float]:
    """STAGE2's augmentation of one batch; calling it returns its seconds."""
    pictures = (images * 255).to(torch.uint8)
    random = np.random.default_rng(0)

    def run() -> float:
        started = perf_counter()
        augment(pictures, labels, AugmentConfig(), (0.5, 0.5, 0.5), random)
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - started

    return run


def main() -> None:
    parser = commandline.parser(__doc__.splitlines()[0], "  python -m benchmarks.vit_step --threads 2 --amp bf16")
    parser.add_argument("--batch-size", type=commandline.positive_int, default=128)
    parser.add_argument("--rounds", type=commandline.positive_int, default=12)
    parser.add_argument("--amp", choices=("off", "bf16"), default="bf16")
    parser.add_argument("--conv-stem", choices=list(STEMS), default="tiny")
    parser.add_argument("--patch-size", type=commandline.positive_int, default=2)
    parser.add_argument("--threads", type=commandline.thread_count)
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--compile", action="store_true", help="an arm of ours by torch.compile (needs a C++ compiler)")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    set_threads(options.threads)
    device = pick_device(not options.no_cuda)
    torch.manual_seed(0)
    full = ViTConfig(conv_stem=options.conv_stem, patch_size=options.patch_size)
    still = replace(full, dropout_attn=0.0, dropout_embed=0.0)
    open_ = replace(still, top_k=0, top_p=1.0)
    bare = replace(open_, nkat_strength=0.0)
    images = torch.rand(options.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (options.batch_size,), device=device)

    def arm(model: nn.Module, unfused: bool = False) -> Callable[[], float]:
        return make_step(model.to(device), images, labels, options.amp, unfused)

    arms = {
        "TransformerEncoderLayer": arm(PlainViT(full)),
        "TransformerEncoderLayer, unfused attention": arm(PlainViT(full), unfused=True),
        "ours, stage2 (with dropout)": arm(NKATViT(full)),
        "ours, no dropout": arm(NKATViT(still)),
        "ours, no filter": arm(NKATViT(open_)),
        "ours, no filter, no gauge": arm(NKATViT(bare)),
        "ours, no filter, gauge, colours": arm(NKATViT(replace(bare, split_heads=False, color_norm="off"))),
        "augmentation alone": make_augmentation(images, labels),
    }
    if options.compile:
        arms["ours, stage2, compiled"] = arm(compile_model(NKATViT(full), World(0, 1, device)))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with console.bar(WARM_UP + options.rounds, "rounds", "round") as progress:
        for index in range(WARM_UP + options.rounds):
            for name, step in arms.items():
                elapsed = step()
                if index >= WARM_UP:
                    seconds[name].append(elapsed)
            progress.update()

    def ratio(slower: str, faster: str) -> float:
        return median(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True))

    rows = [
        {
            "step": name,
            "median_ms": 1e3 * median(times),
            "fastest_ms": 1e3 * min(times),
            "images_per_second": options.batch_size / median(times),
        }
        for name, times in seconds.items()
    ]
    where = f"{describe(device)['device_name']}, {torch.get_num_threads()} threads"
    columns = [
        Column("step", "step"),
        Column("median ms", "median_ms", ".1f"),
        Column("fastest ms", "fastest_ms", ".1f"),
        Column("images/s", "images_per_second", ".0f"),
    ]
    show(Table("steps", columns, rows, f"{where}, amp {options.amp}, {full.tokens} tokens", {"amp": options.amp}))
    names = list(arms)
    ratios = {
        "speed against TransformerEncoderLayer": ratio(names[0], names[2]),
        "speed against it with unfused attention": ratio(names[1], names[2]),
        "time with filtering / without": ratio(names[3], names[4]),
        "time with gauge terms / without": ratio(names[4], names[5]),
        "time with filtering and gauge / without either": ratio(names[3], names[5]),
        "time with split heads and colour norm / without": ratio(names[5], names[6]),
        "augmentation / step": ratio(names[7], names[2]),
    }
    if options.compile:
        ratios["speed of ours compiled"] = ratio(names[2], names[8])
    for name, value in ratios.items():
        say(f"{name}: {value:.3f}")
    record = {
        "benchmark": "vit_step",
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "amp": options.amp,
        "tokens": full.tokens,
        "median_seconds": {name: median(times) for name, times in seconds.items()},
        "fastest_seconds": {name: min(times) for name, times in seconds.items()},
        "ratios": ratios,
        "ratio": ratios["speed against TransformerEncoderLayer"],
        "machine": describe(device),
    }
    print_record(record)
