"""Why a trained image model said what it said: another program's usual calls, on a model of this package.

    pip install captum
    python -m examples.explain_image output/vit/cifar10-fast-seed0 --data-root data --output why.png

`LogitsOnly` is what such programs take: pictures in, logits out. grad-cam's call is the same:
`GradCAM(LogitsOnly(trained.model), [trained.model.stem])(pictures)`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("examples.explain_image")

from pathlib import Path

import torch

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.figures import new_figure, save_figure
from nkat.host.files import check_output
from nkat_vit import LogitsOnly, TrainedModel, load_model
from nkat_vit.data import find_dataset, load_images, split
from nkat_vit.pictures import as_picture
from nkat_vit.recipe import class_names


def explain(trained: TrainedModel, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Guesses [n], and by pixel [n, h, w]: Integrated Gradients over the channels, and Grad-CAM of the stem."""
    try:
        from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam
    except ModuleNotFoundError:
        raise NKATError("this example needs the package captum: pip install captum") from None
    logits = LogitsOnly(trained.model)
    guesses = logits(pictures).argmax(dim=1)
    by_pixel = IntegratedGradients(logits).attribute(pictures, target=guesses, n_steps=32, internal_batch_size=64)
    by_cell = LayerGradCam(logits, trained.model.stem).attribute(pictures, target=guesses)
    return guesses, by_pixel.sum(dim=1), LayerAttribution.interpolate(by_cell, pictures.shape[2:], "bilinear")[:, 0]


def main() -> None:
    parser = commandline.parser(
        "Explain a trained image model's answers with captum.",
        "  python -m examples.explain_image output/vit/cifar10-fast-seed0 --data-root data --output why.png",
    )
    parser.add_argument("run", type=Path, help="the run's folder, or its best.pt")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder with the archives (data)")
    parser.add_argument("--output", type=Path, required=True, help="the PNG")
    parser.add_argument("--pictures", type=commandline.positive_int, default=4, help="validation pictures (4)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    options = parser.parse_args()
    check_output(options.output, options.force)
    trained = load_model(options.run)
    classes, training = class_names(trained.recipe), trained.recipe.train
    held = split(
        load_images(trained.recipe.dataset, options.data_root, train=True), training.validation, training.seed
    )[1]
    shown = held.take(torch.arange(min(options.pictures, len(held))))
    pictures = shown.images.float() / 255
    guesses, by_pixel, by_cell = (part.detach() for part in explain(trained, pictures))
    figure = new_figure(
        f"{find_dataset(trained.recipe.dataset).title}: what speaks for the answer (red) and against it (blue)",
        (7.5, 2 * len(shown) + 0.6),
    )
    for row, axes in enumerate(figure.subplots(len(shown), 3, squeeze=False)):
        axes[0].imshow(as_picture(pictures[row]), cmap="gray", vmin=0, vmax=1)
        label, guess = (classes[int(index)] for index in (shown.labels[row], guesses[row]))
        axes[0].set_title(f"{label}, taken for {guess}", fontsize=9)
        for panel, values, title, unit in (
            (axes[1], by_pixel, "Integrated Gradients", "change of the logit"),
            (axes[2], by_cell, "Grad-CAM, stem", "gradient × activation"),
        ):
            limit = values[row].abs().max().item() or 1.0
            drawn = panel.imshow(values[row].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            panel.set_title(title, fontsize=9)
            figure.colorbar(drawn, ax=panel, label=unit)
        for panel in axes:
            panel.axis("off")
    save_figure(figure, options.output, options.force)
    print(options.output)
