"""What a trained model looks at and what its gauge terms do: python -m nkat_vit.interpret --checkpoint RUN/best.pt

Fourteen pictures: ten attention samples (the picture, attention rollout, the last layer's heads), an analysis of the
gauge parameters, a summary by layer, maps of what speaks for a class (`nkat_vit.maps`), and curves of what becomes of
the answer when the picture is taken away in their order (`nkat_vit.deletion`). The pictures shown are validation
pictures, never those of the test set. An untrained checkpoint is refused: maps of random weights look as convincing as
those of learned ones.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("nkat_vit.interpret")

import math
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.console import counted, note, say
from nkat.host.files import output_folder
from nkat.host.hardware import describe, pick_device, set_threads
from nkat.host.record import check_record, recorded
from nkat.host.tables import Column, Table, show
from nkat.host.tools import suggest
from nkat_vit.answer_options import add_answer_options
from nkat_vit.attention import Attention
from nkat_vit.checkpoint import TrainedModel, load_model, load_set
from nkat_vit.data import ImageSet, split
from nkat_vit.deletion import blur_sigma, measure_curves
from nkat_vit.explain_plots import plot_curves, plot_maps
from nkat_vit.interpret_plots import plot_gauges, plot_sample, plot_summary
from nkat_vit.maps import answer_maps, observe, pooling_weights, rollout
from nkat_vit.model import NKATViT
from nkat_vit.recipe import class_names

SAMPLES = 10
EXPLAINED = 6
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


@torch.no_grad()
def look(model: NKATViT, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor, list[LayerFacts]]:
    """Logits, attention a layer, rollout, and facts a layer, for pictures [b, c, h, w] from 0 to 1."""
    inputs: dict[int, tuple[Tensor, Tensor | None]] = {}
    hooks = [
        block.attention.register_forward_pre_hook(lambda _m, args, layer=layer: inputs.update({layer: args[:2]}))
        for layer, block in enumerate(model.blocks)
    ]
    try:
        logits, attention, tokens = observe(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    facts = [
        _layer_facts(block.attention, inputs[layer], attention[layer], model.config.grid, model.config.pool == "cls")
        for layer, block in enumerate(model.blocks)
    ]
    return logits, attention, rollout(attention, pooling_weights(model, tokens)), facts


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
    model, names, set_title = trained.model, class_names(trained.recipe), trained.recipe.spec.title
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
        title = f"{names[int(shown.labels[i])]}, taken for {names[guess]} ({100 * share:.0f} %)"
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
    plot_summary(path, record, f"{set_title}: {len(some)} validation pictures")
    return record | {"files": [*files, path.name]}


def explain(
    trained: TrainedModel, held: ImageSet, folder: Path, stamp: str, pictures: int, seed: int
) -> dict[str, Any]:
    """Maps of what speaks for a class, and what becomes of the answers to `pictures` pictures when cells are taken away
    in their order: draws both into the folder and returns the numbers. seed: of the random order, the control
    """
    model, names, title = trained.model, class_names(trained.recipe), trained.recipe.spec.title
    shown = held.take(_one_of_each(held, EXPLAINED))
    images = shown.images.float() / 255
    with torch.no_grad():
        shares = model(images)[0].softmax(dim=1)
    best = shares.topk(2, dim=1)
    first, second = (answer_maps(model, images, best.indices[:, place]) for place in (0, 1))
    columns = {"relevance": first["relevance"], "relevance, 2nd answer": second["relevance"]}
    columns |= {name: first[name] for name in ("rollout", "attention")}
    captions = [
        [names[label], *(f"for {names[i]}, {100 * p:.1f} %" for i, p in zip(index, share, strict=True))]
        for label, index, share in zip(shown.labels.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    maps_file = folder / f"nkat_relevance_samples_{stamp}.png"
    plot_maps(
        maps_file,
        images,
        columns,
        captions,
        trained.recipe.model,
        f"{title}: what speaks for a class (rollout and attention are for none)",
    )
    some = held.take(torch.arange(min(pictures, len(held)))).images.float() / 255
    curves = measure_curves(model, some, seed)
    record = curves.record() | {
        "pictures": len(some),
        "explained": "the model's own answer",
        "deletion_to": "black",
        "insertion_from": f"blurred, sigma {blur_sigma(model):g} pixels",
        "seed": seed,
    }
    curves_file = folder / f"nkat_deletion_insertion_{stamp}.png"
    plot_curves(curves_file, curves, f"{title}, {len(some)} validation pictures")
    return {"explanation": record, "files": [maps_file.name, curves_file.name]}


def explanation_table(record: dict[str, Any]) -> Table:
    """Areas under the curves of deletion and insertion, with standard errors over the pictures; a line an order."""
    kinds = ("deletion", "deletion_from_random", "insertion", "insertion_from_random")
    rows = []
    for name, found in record["orders"].items():
        row: dict[str, Any] = {"order": name}
        for kind in kinds:
            if kind in found:
                row |= {kind: found[kind]["mean"], f"{kind}_error": found[kind]["standard_error"]}
        rows.append(row)
    columns = [Column("cells in the order of", "order")]
    for kind in kinds:
        title = "minus random's" if kind.endswith("random") else f"{kind} area"
        sign = "+" if kind.endswith("random") else ""
        columns.append(Column(title, (kind, f"{kind}_error"), partial(_with_error, sign)))
    caption = f"\nwhat becomes of {record['explained']}, mean of {counted(record['pictures'], 'picture')}:"
    return Table("explanation", columns, rows, caption)


def _with_error(sign: str, mean: float, error: float | None) -> str:
    return f"{mean:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def main() -> None:
    parser = commandline.parser(
        "Pictures of what a trained model looks at and what its gauge terms do.",
        "  python -m nkat_vit.interpret --checkpoint output/vit/cifar10-stage2-seed0 --data-root data",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pt, or the run's folder")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder with the archives (data)")
    parser.add_argument("--output-dir", type=Path, help="for the pictures (the checkpoint's folder)")
    parser.add_argument("--pictures", type=commandline.positive_int, default=500, help="how many to average over (500)")
    parser.add_argument(
        "--curve-pictures",
        type=commandline.positive_int,
        default=50,
        metavar="N",
        help="how many for deletion and insertion (50)",
    )
    parser.add_argument("--seed", type=commandline.seed, default=0, help="of their random order (0)")
    add_answer_options(parser)
    options = parser.parse_args()
    set_threads(options.threads)
    device = pick_device(not options.no_cuda)
    trained = load_model(options.checkpoint, device)
    check_record(options.json, options.force, [trained.path])
    check_trained(trained)
    folder = options.output_dir or trained.path.parent
    whole = load_set(trained, options.data_root, train=True)
    _, held = split(whole, trained.recipe.train.validation, trained.recipe.train.seed)
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    with output_folder(folder):
        held = held.to(device)
        record = interpret(trained, held, folder, stamp, options.pictures)
        more = explain(trained, held, folder, stamp, options.curve_pictures, options.seed)
    record |= {"explanation": more["explanation"], "files": record["files"] + more["files"]}
    with recorded(record | {"machine": describe(device)}, options.json, options.force):
        say(f"accuracy on {record['pictures']} validation pictures  {100 * record['accuracy']:.2f} %")
        say(f"with the gauge terms taken out        {100 * record['accuracy_without_gauge']:.2f} %")
        say(f"predictions that they change          {100 * record['changed_by_gauge']:.2f} %")
        show(explanation_table(record["explanation"]))
        for name in record["files"]:
            say(str(folder / name))
    suggest("vit export", "--checkpoint", options.checkpoint, "--output", "model.onnx")
