"""What a trained model looks at and what its gauge terms do: python -m nkat_vit.interpret --checkpoint RUN/best.pt

Twelve pictures: ten attention samples (the picture, attention rollout, the last layer's heads), an analysis of the
gauge parameters, and a summary by layer. The pictures shown are validation pictures, never those of the test set. An
untrained checkpoint is refused: maps of random weights look as convincing as those of learned ones.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("nkat_vit.interpret")

import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.console import counted, note
from nkat.host.files import output_folder
from nkat.host.hardware import describe, pick_device
from nkat.host.record import check_record, recorded
from nkat.host.tools import suggest
from nkat_vit.attention import Attention
from nkat_vit.checkpoint import TrainedModel, load_model, load_set
from nkat_vit.data import ImageSet, split
from nkat_vit.interpret_plots import plot_gauges, plot_sample, plot_summary
from nkat_vit.model import NKATViT

SAMPLES = 10
_STANDARD_ERRORS = 4  # above chance, for a checkpoint to count as trained


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer over some pictures; a list has one number a head.

    entropy: of a query's weights, in bits, the mean
    distance: between a query's patch and the patches it looks at, in cells, weighted, the mean
    keys: how many keys a query has left after filtering, the mean
    commutator: root mean square of what the gauge term adds to the scores (½ s qᵀθk, or a rotation's) over that of
        the scores qᵀk; 0 without gauge
    """

    entropy: list[float]
    distance: list[float]
    keys: float
    commutator: list[float]
    strength: float


def check_trained(trained: TrainedModel) -> None:
    """Raises NKATError for a model whose validation accuracy chance explains, or that was never trained.

    Where the validation pictures are too few to tell, whatever the accuracy, a warning has to do.
    """
    facts, classes = trained.facts, trained.recipe.model.classes
    validation, held = facts.get("validation", 0.0), trained.recipe.train.validation
    chance = 1 / classes
    limit = chance + _STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / held)
    if facts.get("steps", 0) and limit >= 1:
        note(f"warning: {counted(held, 'validation picture')} cannot tell this model from one that guesses")
    elif facts.get("steps", 0) < 1 or validation <= limit:
        raise NKATError(
            f"{trained.path}: this model is not trained: {100 * validation:.1f} % validation accuracy after "
            f"{facts.get('steps', 0)} steps, and chance alone gives up to {100 * limit:.1f} %"
        )


def rollout(attention: list[Tensor], pooling: Tensor) -> Tensor:
    """How much of each input token reaches the pooled vector: [b, n], rows sum to 1.

    Abnar and Zuidema, arXiv 2005.00928: heads averaged, half of each token stays where it is, layers multiplied.
    attention: [b, heads, n, n] a layer; pooling: [b, n], what the pooled vector takes from the last layer's tokens
    """
    total = torch.eye(pooling.shape[1], dtype=pooling.dtype, device=pooling.device)
    for weights in attention:
        step = weights.mean(dim=1)
        total = (0.5 * step + 0.5 * torch.eye(step.shape[-1], dtype=step.dtype, device=step.device)) @ total
    return (pooling[:, None] @ total).squeeze(1)


def pooling_weights(model: NKATViT, final: Tensor) -> Tensor:
    """What the model's pooling takes from each of the final normed tokens [b, n, dim]: [b, n]."""
    if model.config.pool == "seq":
        return model.pool_score(final).squeeze(-1).softmax(dim=1)
    if model.config.pool == "mean":
        return final.new_full(final.shape[:2], 1 / final.shape[1])
    return torch.nn.functional.one_hot(torch.zeros(len(final), dtype=torch.long), final.shape[1]).to(final)


@torch.no_grad()
def look(model: NKATViT, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor, list[LayerFacts]]:
    """Logits, attention a layer, rollout, and facts a layer, for pictures [b, c, h, w] from 0 to 1."""
    inputs: dict[int, tuple[Tensor, Tensor | None]] = {}
    final: list[Tensor] = []
    hooks = [model.norm.register_forward_hook(lambda _m, _i, out: final.append(out))]
    for layer, block in enumerate(model.blocks):
        hooks.append(
            block.attention.register_forward_pre_hook(lambda _m, args, layer=layer: inputs.update({layer: args[:2]}))
        )
    try:
        logits, seen = model(images, with_attention=True)
    finally:
        for hook in hooks:
            hook.remove()
    attention = seen["attention"]
    facts = [
        _layer_facts(block.attention, inputs[layer], attention[layer], model.config.grid, model.config.pool == "cls")
        for layer, block in enumerate(model.blocks)
    ]
    return logits, attention, rollout(attention, pooling_weights(model, final[0])), facts


def _layer_facts(
    layer: Attention, inputs: tuple[Tensor, Tensor | None], weights: Tensor, grid: int, cls: bool
) -> LayerFacts:
    entropy = -(weights * weights.clamp_min(1e-12).log2()).sum(-1).mean(dim=(0, 2))
    cells = torch.stack(torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"), -1).view(-1, 2)
    between = torch.cdist(cells.float(), cells.float()).to(weights.device)
    patches = weights[:, :, 1:, 1:] if cls else weights
    distance = (patches * between).sum(-1) / patches.sum(-1).clamp_min(1e-9)
    share, strength = [0.0] * layer.heads, 0.0
    if layer.gauge is not None:
        gauge, layer.gauge = layer.gauge, None
        try:
            q, k, _ = layer.project(*inputs)  # without the term; q has the scale in it
        finally:
            layer.gauge = gauge
        squares = [(x**2).mean(dim=(0, 2, 3)) for x in (gauge.change(q, k), q @ k.mT)]
        share = (squares[0] / squares[1]).sqrt().tolist()
        strength = gauge.strength().item()
    keys = (weights > 0).sum(-1).float().mean().item()
    return LayerFacts(entropy.tolist(), distance.mean(dim=(0, 2)).tolist(), keys, share, strength)


@torch.no_grad()
def without_gauge(model: NKATViT, images: Tensor) -> Tensor:
    """Logits of the same model with the gauge terms taken out."""
    gauges = [block.attention.gauge for block in model.blocks]
    try:
        for block in model.blocks:
            block.attention.gauge = None
        return model(images)[0]
    finally:
        for block, gauge in zip(model.blocks, gauges, strict=True):
            block.attention.gauge = gauge


def _one_of_each(held: ImageSet, count: int) -> Tensor:
    """Indices of the first picture of each class in turn, `count` in all."""
    firsts = [int(index) for label in held.labels.unique() if len(index := (held.labels == label).nonzero()[:1])]
    rest = [i for i in range(len(held)) if i not in set(firsts)]
    return torch.tensor((firsts + rest)[:count])


def interpret(trained: TrainedModel, held: ImageSet, folder: Path, stamp: str, pictures: int) -> dict[str, Any]:
    """Draws all pictures into the folder and returns the numbers in them."""
    model, spec = trained.model, trained.recipe.spec
    some = held.take(torch.arange(min(pictures, len(held))))
    images = some.images.float() / 255
    logits, _, _, facts = look(model, images)
    bare = without_gauge(model, images)
    files = []
    index = _one_of_each(held, SAMPLES)
    shown = held.take(index)
    shown_logits, attention, flow, _ = look(model, shown.images.float() / 255)
    for i in range(len(index)):
        path = folder / f"nkat_attention_sample_{i}_{stamp}.png"
        guess = int(shown_logits[i].argmax())
        share = float(shown_logits[i].softmax(-1)[guess])
        title = f"{spec.classes[int(shown.labels[i])]}, taken for {spec.classes[guess]} ({100 * share:.0f} %)"
        weights = [layer[i] for layer in attention]
        plot_sample(path, shown.images[i].float() / 255, flow[i], weights, trained.recipe.model, title)
        files.append(path.name)
    record = {
        "checkpoint": str(trained.path),
        "pictures": len(some),
        "accuracy": float((logits.argmax(1) == some.labels).double().mean()),
        "accuracy_without_gauge": float((bare.argmax(1) == some.labels).double().mean()),
        "changed_by_gauge": float((bare.argmax(1) != logits.argmax(1)).double().mean()),
        "layers": [
            {name: getattr(layer, name) for name in ("entropy", "distance", "keys", "commutator", "strength")}
            for layer in facts
        ],
    }
    if trained.recipe.model.nkat_strength > 0:
        path = folder / f"nkat_gauge_parameter_analysis_{stamp}.png"
        gauges = (block.attention.gauge for block in model.blocks)
        plot_gauges(path, [gauge for gauge in gauges if gauge is not None])
        files.append(path.name)
    else:
        note("this model has no gauge terms: no picture of them")
    path = folder / f"nkat_interpretability_summary_{stamp}.png"
    plot_summary(path, record, f"{spec.title}: {len(some)} validation pictures")
    return record | {"files": [*files, path.name]}


def main() -> None:
    parser = commandline.parser(
        "Pictures of what a trained model looks at and what its gauge terms do.",
        "  python -m nkat_vit.interpret --checkpoint output/vit/cifar10-stage2-seed0 --data-root data",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pt, or the run's folder")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder with the archives (data)")
    parser.add_argument("--output-dir", type=Path, help="for the pictures (the checkpoint's folder)")
    parser.add_argument("--pictures", type=commandline.positive_int, default=500, help="how many to average over (500)")
    parser.add_argument("--no-cuda", action="store_true", help="the processor although there is a GPU")
    parser.add_argument("--json", metavar="FILE", help='record; "-": last line of stdout')
    parser.add_argument("--force", action="store_true", help="replace an existing record")
    options = parser.parse_args()
    device = pick_device(not options.no_cuda)
    trained = load_model(options.checkpoint, device)
    check_record(options.json, options.force, [trained.path])
    check_trained(trained)
    folder = options.output_dir or trained.path.parent
    whole = load_set(trained, options.data_root, train=True)
    _, held = split(whole, trained.recipe.train.validation, trained.recipe.train.seed)
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    with output_folder(folder):
        record = interpret(trained, held.to(device), folder, stamp, options.pictures)
    with recorded(record | {"machine": describe(device)}, options.json, options.force):
        print(f"accuracy on {record['pictures']} validation pictures  {100 * record['accuracy']:.2f} %")
        print(f"with the gauge terms taken out        {100 * record['accuracy_without_gauge']:.2f} %")
        print(f"predictions that they change          {100 * record['changed_by_gauge']:.2f} %")
        for name in record["files"]:
            print(folder / name)
    suggest("vit export", "--checkpoint", options.checkpoint, "--output", "model.onnx")
