"""Exports a trained model: python -m nkat_vit.export --checkpoint RUN --output model.pt2 (or model.onnx)

`.pt2` is torch.export's format, `.onnx` needs the packages onnx, onnxscript and onnxruntime. Either takes pictures
float32 [batch, channels, side, side] from 0 to 1 (normalising is inside) for any batch and gives logits
[batch, classes], and says so itself, with the names of the classes. What was written is loaded again and compared with
the eager model before the file takes its name.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("nkat_vit.export")

import importlib.util
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.console import note
from nkat.host.files import atomic_output, check_output
from nkat.host.record import toolkit_version
from nkat.host.tools import suggest
from nkat_vit.checkpoint import TrainedModel, load_model
from nkat_vit.model import LogitsOnly
from nkat_vit.recipe import class_names

TOLERANCE = 1e-4  # of logits; other kernels sum in another order
DESCRIPTION = "nkat.json"  # in a .pt2
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def example_pictures(trained: TrainedModel, count: int) -> Tensor:
    """Random ones of the right shape, seeded."""
    config = trained.recipe.model
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, config.channels, config.image_size, config.image_size, generator=generator)


def describe_input(trained: TrainedModel) -> dict[str, str]:
    """What an exported file says of itself: what to give it, and what its logits are of. Lists are JSON."""
    config = trained.recipe.model
    colours = "red, green and blue planes" if config.channels == 3 else "one grey plane"
    side = config.image_size
    facts = {
        "input": f"float32 [batch, {config.channels}, {side}, {side}], {colours}, values from 0 to 1: divide bytes by "
        "255 and do not normalise, that is inside",
        "output": "logits [batch, classes]; softmax of them for shares",
        "dataset": trained.recipe.dataset,
        "classes": json.dumps(class_names(trained.recipe)),
        "image_size": str(side),
        "channels": str(config.channels),
        "mean": json.dumps(config.mean),
        "std": json.dumps(config.std),
    }
    return facts | {name: str(version) for name, version in toolkit_version().items()}


def export_pt2(trained: TrainedModel) -> bytes:
    """torch.export's program with a free batch size, as bytes, with `describe_input` in its extra file nkat.json."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        LogitsOnly(trained.model).eval(), (example_pictures(trained, 3),), dynamic_shapes=({0: batch},)
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={DESCRIPTION: json.dumps(describe_input(trained), indent=2)})
    return buffer.getvalue()


def export_onnx(trained: TrainedModel) -> bytes:
    """An ONNX model with a free batch size, as bytes, with `describe_input` as its metadata."""
    absent = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise NKATError(f"export to ONNX needs {', '.join(absent)}: pip install {' '.join(absent)}")
    batch = torch.export.Dim("batch", min=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program = torch.onnx.export(
            LogitsOnly(trained.model).eval(),
            (example_pictures(trained, 3),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
        assert program is not None  # None is what the older exporter gives
        program.model.metadata_props.update(describe_input(trained))
        program.save(path, external_data=False)
        return path.read_bytes()


def open_pt2(data: bytes) -> Callable[[Tensor], Tensor]:
    """The exported program as a function."""
    return torch.export.load(io.BytesIO(data)).module()


def open_onnx(data: bytes) -> Callable[[Tensor], Tensor]:
    """The ONNX model in onnxruntime, as a function."""
    import onnxruntime

    runtime = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(runtime.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def largest_difference(exported: Callable[[Tensor], Tensor], trained: TrainedModel) -> float:
    """Of logits from the eager model's, over batches of 1, 2 and 17 pictures; raises NKATError beyond the tolerance."""
    worst = 0.0
    for count in (1, 2, 17):
        images = example_pictures(trained, count)
        expected = trained.model(images)[0]
        worst = max(worst, float((exported(images) - expected).abs().max()))
    if worst > TOLERANCE:
        raise NKATError(
            f"the exported model's logits differ from the eager model's by {worst:.2g}; nothing was written"
        )
    return worst


def main() -> None:
    parser = commandline.parser(
        "Export a trained model for use without this package.",
        "  python -m nkat_vit.export --checkpoint output/vit/cifar10-stage2-seed0 --output model.pt2\n"
        "  python -m nkat_vit.export --checkpoint output/vit/cifar10-stage2-seed0 --output model.onnx",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pt, or the run's folder")
    parser.add_argument("--output", type=Path, required=True, help="a file ending in .pt2 or .onnx")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    options = parser.parse_args()
    ways = {".pt2": (export_pt2, open_pt2), ".onnx": (export_onnx, open_onnx)}
    if options.output.suffix not in ways:
        raise NKATError(f"{options.output}: the name must end in .pt2 or .onnx")
    check_output(options.output, options.force)
    trained = load_model(options.checkpoint)
    export, reopen = ways[options.output.suffix]
    data = export(trained)
    worst = largest_difference(reopen(data), trained)
    note(f"logits differ from the eager model's by at most {worst:.2g}")
    with atomic_output(options.output, len(data), options.force) as file:
        file.write(data)
    print(f"{options.output} ({len(data):,} bytes)")
    suggest("vit evaluate", options.checkpoint)
