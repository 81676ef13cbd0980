"""The command that answers pictures: files of any kind against tensors, bad files among good ones, records."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nkat.errors import NKATError
from nkat_vit import checkpoint
from nkat_vit.checkpoint import TrainedModel, load_model
from nkat_vit.data import load_images
from nkat_vit.model import NKATViT
from nkat_vit.picture_files import find_pictures, has_bright_edge, read_picture
from nkat_vit.predict import answers, predict_logits
from nkat_vit.recipe import TTA, class_names, make_recipe
from tests.support.vit_data import run_module, write_digits

SMALL = {"embed_dim": 32, "depth": 1, "heads": 4, "gauge_rank": 2, "nkat_strength": 0.5}


def trained(folder: Path, dataset: str, **more: object) -> TrainedModel:
    """A small random model's checkpoint, with a head that tells pictures apart."""
    torch.manual_seed(0)
    recipe = make_recipe(SMALL | {"dataset": dataset} | more)
    model = NKATViT(recipe.model)
    with torch.no_grad():
        model.head.weight.mul_(50)
    content = {"kind": "weights", "recipe": recipe.values(), "weights": model.state_dict()}
    folder.mkdir(exist_ok=True)
    checkpoint.save(folder / "best.pt", content | {"steps": 5, "epoch": 1, "validation": 0.5})
    return load_model(folder)


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours, another in each corner."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (255 * x / width, 255 * y / height, 255 * (1 - x / width))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.fixture
def colour(tmp_path: Path) -> TrainedModel:
    return trained(tmp_path / "colour", "cifar10", tta="flip")


def test_a_picture_of_the_models_form_is_not_changed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for channels, side, shape in ((3, 32, (32, 32, 3)), (1, 28, (28, 28))):
        values = random.integers(0, 256, shape).astype(np.uint8)
        Image.fromarray(values).save(tmp_path / "x.png")
        read = read_picture(tmp_path / "x.png", channels, side)
        expected = torch.from_numpy(values).view(side, side, channels).permute(2, 0, 1)
        assert torch.equal(read.pixels, expected)
        assert read.pixels.dtype == torch.uint8
        assert torch.equal(read_picture(tmp_path / "x.png", channels, side, invert=True).pixels, 255 - expected)
        assert read.size == (side, side)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "RGB"), ("a.bmp", "RGB"), ("a.webp", "RGB"), ("a.jpg", "CMYK"), ("a.png", "RGBA"), ("a.tif", "RGB")],
)
def test_every_mode_gives_the_same_picture(tmp_path: Path, name: str, mode: str) -> None:
    whole = photo(100, 60)
    whole.convert(mode).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {"quality": 95}))
    got = read_picture(tmp_path / name, 3, 32)
    middle = whole.crop((20, 0, 80, 60)).resize((32, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(middle).copy())
    assert (got.pixels.permute(1, 2, 0).int() - expected.int()).abs().max() <= (12 if name == "a.jpg" else 1)
    assert (got.size, got.mode) == ((100, 60), mode)
    # Control: it is the middle that is taken.
    aside = torch.from_numpy(np.asarray(whole.crop((0, 0, 60, 60)).resize((32, 32))).copy())
    assert (got.pixels.permute(1, 2, 0).int() - aside.int()).abs().max() > 30


def test_grey_deep_float_and_transparent_pictures(tmp_path: Path) -> None:
    grey = np.arange(784, dtype=np.uint8).reshape(28, 28)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    for i, image in enumerate((Image.fromarray(grey), deep, Image.fromarray((grey / 255).astype(np.float32)))):
        path = tmp_path / ("x.tif" if i == 2 else "x.png")
        image.save(path)
        assert torch.equal(read_picture(path, 1, 28).pixels, torch.from_numpy(grey)[None]), i
        assert torch.equal(read_picture(path, 3, 28).pixels, torch.from_numpy(grey)[None].expand(3, -1, -1)), i
    clear = Image.new("LA", (28, 28), (0, 0))
    clear.paste((0, 255), (10, 10, 14, 14))
    clear.save(tmp_path / "clear.png")
    pixels = read_picture(tmp_path / "clear.png", 1, 28).pixels
    assert (int(pixels[0, 0, 0]), int(pixels[0, 12, 12])) == (255, 0)  # ink on nothing is ink on paper
    assert has_bright_edge(pixels)
    assert not has_bright_edge(255 - pixels)


def test_a_photo_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    whole = photo(64, 64)
    whole.save(tmp_path / "turned.png", exif=exif)
    whole.rotate(-90).save(tmp_path / "upright.png")
    assert torch.equal(*(read_picture(tmp_path / f"{name}.png", 3, 32).pixels for name in ("turned", "upright")))


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    photo(60, 60).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.jpg").write_text("none", encoding="utf-8")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", encoding="utf-8")
    for name, said in (("cut.png", "cannot be read"), ("text.jpg", "no picture"), ("program.eps", "no picture")):
        with pytest.raises(NKATError, match=said):
            read_picture(tmp_path / name, 3, 32)
    with pytest.raises(NKATError, match="no such file"):
        read_picture(tmp_path / "none.png", 3, 32)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(NKATError, match="is no file"):
            read_picture(tmp_path / "pipe.png", 3, 32)


def test_folders_are_looked_through_in_order(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("b.PNG", "a.jpg", "deep/c.webp", ".hidden.png", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"")
    named = tmp_path / "in" / "notes.txt"  # what is named is tried
    found, wrong = find_pictures([named, tmp_path / "in", tmp_path / "empty"])
    assert [path.name for path in found] == ["notes.txt", "a.jpg", "b.PNG", "c.webp"]
    assert list(wrong) == [tmp_path / "empty"]


def test_answers_are_the_largest_shares_with_the_runs_own_augmentation(colour: TrainedModel) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    shares = predict_logits(colour.model, images, "flip").softmax(dim=1)
    for row, found in zip(shares, answers(colour, images, 3), strict=True):
        order = row.argsort(descending=True)[:3].tolist()
        assert [answer["index"] for answer in found] == order
        assert [answer["class"] for answer in found] == [class_names(colour.recipe)[i] for i in order]
        assert [answer["probability"] for answer in found] == pytest.approx(row[order].tolist())
    assert not torch.allclose(predict_logits(colour.model, images).softmax(dim=1), shares, atol=1e-3)  # control
    assert len(answers(colour, images, 99)[0]) == 10


def test_good_pictures_are_answered_among_bad_ones(tmp_path: Path, colour: TrainedModel) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size in (("a.png", (40, 90)), ("b.jpg", (32, 32))):
        photo(*size).save(folder / name)
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    record = tmp_path / "answers.json"
    command = [folder, "--checkpoint", colour.path, "--top", 2, "--threads", 1, "--json", record]
    done = run_module("nkat_vit.predict", *command)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert f"error: {folder / 'bad.png'}: " in done.stderr
    found = json.loads(record.read_text(encoding="utf-8"))
    assert [Path(row["picture"]).name for row in found["pictures"]] == ["a.png", "b.jpg"]
    assert found["pictures"][0]["size"] == [40, 90]
    assert found["tta"] == "flip"
    assert [Path(row["picture"]).name for row in found["failed"]] == ["bad.png"]
    read = torch.stack([read_picture(folder / name, 3, 32).pixels for name in ("a.png", "b.jpg")])
    assert [row["answers"] for row in found["pictures"]] == answers(colour, read, 2)
    first = found["pictures"][0]["answers"][0]
    assert f"{first['class']} {100 * first['probability']:.1f} %" in done.stdout
    assert run_module("nkat_vit.predict", *command).returncode == 2  # the record is there
    assert record.read_text(encoding="utf-8") == json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    (folder / "bad.png").unlink()
    good = run_module("nkat_vit.predict", *command, "--force", "--output-format", "csv")
    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines()[0].endswith("picture,class_1,probability_1,class_2,probability_2")
    assert len(good.stdout.splitlines()) == 3


def test_nothing_to_answer(tmp_path: Path, colour: TrainedModel) -> None:
    (tmp_path / "empty").mkdir()
    done = run_module("nkat_vit.predict", tmp_path / "empty", tmp_path / "x.png", "--checkpoint", colour.path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'empty'}: there is no picture in this folder",
        f"error: {tmp_path / 'x.png'}: there is no such file",
    ]
    photo(32, 32).save(tmp_path / "x.png")
    absent = run_module("nkat_vit.predict", tmp_path / "x.png", "--checkpoint", tmp_path / "none")
    assert (absent.returncode, "there is no such file, where a checkpoint" in absent.stderr) == (2, True)


def test_ink_on_paper_is_noticed(tmp_path: Path) -> None:
    model = trained(tmp_path / "grey", "mnist")
    paper = Image.new("L", (60, 60), 250)
    paper.paste(10, (25, 10, 35, 50))
    paper.save(tmp_path / "one.png")
    done = run_module("nkat_vit.predict", tmp_path / "one.png", "--checkpoint", model.path)
    assert "1 picture with a bright edge" in done.stderr
    assert "with --invert" in done.stderr
    assert (
        "bright edge"
        not in run_module("nkat_vit.predict", tmp_path / "one.png", "--checkpoint", model.path, "--invert").stderr
    )


def test_a_model_trained_judged_explained_and_asked_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the test pictures get the answers that the test set got, and maps are worth more than chance."""
    data = write_digits(tmp_path / "data", train=384, test=100)
    settings = ["--embed-dim", 32, "--depth", 2, "--heads", 4, "--gauge-rank", 2, "--validation", 24, "--crop", 0]
    settings += ["--randaugment", 0, 0, "--cutout", 0, "--mixup", 0, "--cutmix", 0, "--dropout-attn", 0, "--warmup", 1]
    settings += ["--batch-size", 24, "--lr", 4e-3, "--epochs", 6, "--ema", 0.9, "--opt", "muon", "--threads", 1]
    run = tmp_path / "run"
    common = ["--data-root", data, "--json", "-"]
    done = run_module("nkat_vit.train", "--dataset", "emnist-digits", "--output", run, *settings, *common)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert f"top 5       {100 * record['test_top5']:.2f} %" in done.stdout

    test = load_images("emnist-digits", data, train=False)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(test.images):
        Image.fromarray(image[0].numpy()).resize((112, 112), Image.Resampling.NEAREST).save(folder / f"{i:03}.png")
    asked = run_module("nkat_vit.predict", folder, "--checkpoint", run, "--top", 1, "--json", "-")
    assert asked.returncode == 0, asked.stderr
    answered = [row["answers"][0]["index"] for row in json.loads(asked.stdout.splitlines()[-1])["pictures"]]
    right = np.mean(np.array(answered) == test.labels.numpy())
    assert abs(right - record["test"]) <= 0.03  # enlarged and made small again
    assert right > 0.8

    judged = run_module("nkat_vit.evaluate", run, "--data-root", tmp_path / "none", "--json", "-")  # nothing to read
    assert judged.returncode == 0, judged.stderr
    by_class = json.loads(judged.stdout.splitlines()[-1])["classes"]["emnist-digits"]
    assert by_class["confusion"] == record["test_confusion"]

    monkeypatch.setattr("nkat_vit.interpret.SAMPLES", 1)  # of pictures that are not looked at here
    shown = run_module("nkat_vit.interpret", "--checkpoint", run, *common, "--curve-pictures", 24)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout.splitlines()[-1])["explanation"]["orders"]["relevance"]
    for kind, sign in (("deletion", -1), ("insertion", 1)):
        better = found[f"{kind}_from_random"]
        assert sign * better["mean"] > 2 * better["standard_error"]


@pytest.mark.parametrize("tta", TTA)
def test_views_are_averaged(tta: str) -> None:
    """Against NumPy, by a model whose logits are the pixels."""
    pictures = torch.randint(256, (3, 1, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = predict_logits(Pixels(), pictures, tta)
    wanted = x = pictures.numpy() / 255
    if "shift" in tta:
        around = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
        wanted = x / 2 + around[:, :, :-2, :-2] / 4 + around[:, :, 2:, 2:] / 4
    if "flip" in tta:
        wanted = (wanted + wanted[..., ::-1]) / 2
    np.testing.assert_allclose(found.numpy(), wanted.reshape(3, -1), atol=1e-6)
    assert np.allclose(wanted, x) == (tta == "none")


class Pixels(torch.nn.Module):
    """A model's form, without a model."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (images.flatten(1),)
