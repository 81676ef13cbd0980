"""Folders of pictures: every kind of picture against its own pixels, the parts of a set, what is refused, and a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nkat.errors import NKATError
from nkat_vit import checkpoint, folders
from nkat_vit.checkpoint import load_model, load_set
from nkat_vit.data import describe_dataset, load_images, split
from nkat_vit.folders import choose_side, decode, mean_and_std, open_folder, picture_sides, to_grey
from nkat_vit.picture_files import read_picture
from nkat_vit.recipe import make_recipe
from tests.support.vit_data import run_module

SMALL = ["--embed-dim", 16, "--depth", 1, "--heads", 4, "--gauge-rank", 2, "--batch-size", 12, "--threads", 1]
SMALL += ["--conv-stem", "off", "--patch-size", 8, "--lr", 3e-3, "--randaugment", 0, 0, "--cutout", 0]


def write_pictures(root: Path, classes: dict[str, int], grey: bool = False, side: int = 16) -> Path:
    """Pictures of a class have its colour, or as grey ones its quarter, bright."""
    random = np.random.default_rng(0)
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = random.integers(0, 60, (side, side, 1 if grey else 3)).astype(np.uint8)
            if grey:
                pixels[:, number * side // len(classes) : (number + 1) * side // len(classes)] += 150
            else:
                pixels[..., number] += 150
            Image.fromarray(pixels[..., 0] if grey else pixels).save(root / name / f"{i}.png")
    return root


def test_grey_is_pillows() -> None:
    colour = np.random.default_rng(1).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    image = Image.fromarray(colour)
    assert np.array_equal(to_grey(colour.transpose(2, 0, 1)[None])[0, 0], np.asarray(image.convert("L")))
    grey = np.asarray(image.convert("L").convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(to_grey(grey[None])[0, 0], grey[0])


def test_sides_are_upright(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for i, turn in enumerate((1, 6)):  # EXIF: upright, and to be turned a quarter
            exif = Image.Exif()
            exif[0x0112] = turn
            Image.new("RGB", (30, 20)).save(tmp_path / name / f"{i}.jpg", exif=exif)
    part = open_folder(tmp_path).train
    sides = dict(zip((path.name for path in part.paths), picture_sides(part), strict=True))
    assert sides.items() <= {("0.jpg", (30, 20)), ("1.jpg", (20, 30))}
    assert sides


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (11, 30), (20, 20)])
def test_pictures_are_scaled_and_cut_at_the_centre(tmp_path: Path, height: int, width: int) -> None:
    """A slope along the longer side shows which part was taken, and at which scale."""
    slope = np.linspace(0, 255, max(height, width))
    pixels = np.broadcast_to(slope[:, None] if height > width else slope, (height, width))
    image = Image.fromarray(np.dstack([pixels.round().astype(np.uint8)] * 3))
    for side in (10, 25):
        image.save(tmp_path / "x.png")
        got = read_picture(tmp_path / "x.png", 3, side).pixels[0].numpy()
        line = got[:, side // 2] if height > width else got[side // 2]
        longer, shorter = max(height, width), min(height, width)
        places = (longer - shorter) // 2 + (np.arange(side) + 0.5) * shorter / side - 0.5
        inner = slice(2, -2)  # at a picture's edge the filter is cut off
        assert np.abs(line - np.interp(places, np.arange(longer), slope))[inner].max() < 4
        plain = np.asarray(image.resize((side, side)))[:, :, 0]  # control: squeezed, it is another
        if height != width:
            assert np.abs((plain[:, side // 2] if height > width else plain[side // 2]) - line.astype(int)).max() > 10


def test_mean_and_std_against_numpy_and_the_side(tmp_path: Path) -> None:
    pictures = np.random.default_rng(2).integers(0, 256, (5, 3, 7, 7)).astype(np.uint8)
    mean, std = mean_and_std(pictures)
    assert mean == pytest.approx((pictures / 255).mean(axis=(0, 2, 3)), abs=6e-5)
    assert std == pytest.approx((pictures / 255).std(axis=(0, 2, 3)), abs=6e-5)
    assert mean_and_std(np.zeros((2, 1, 4, 4), np.uint8)) == ((0.0,), (1e-3,))
    assert choose_side([(30, 40), (28, 28), (50, 29)]) == 29
    assert choose_side([(300, 400)]) == 64


def test_the_three_layouts(tmp_path: Path) -> None:
    classes = {"b": 10, "a": 5, "c": 6}
    flat = open_folder(write_pictures(tmp_path / "flat", classes))
    assert flat.classes == ("a", "b", "c")
    assert [flat.test.labels.count(label) for label in range(3)] == [1, 2, 1]  # a fifth of each class
    assert not set(flat.train.paths) & set(flat.test.paths)
    assert len(flat.train) + len(flat.test) == 21
    assert all(
        path.parent.name == "abc"[label] for path, label in zip(flat.train.paths, flat.train.labels, strict=True)
    )
    again = open_folder(shutil.copytree(tmp_path / "flat", tmp_path / "copy"))
    names = [
        [path.relative_to(root) for path in part.test.paths]
        for part, root in ((flat, tmp_path / "flat"), (again, tmp_path / "copy"))
    ]
    assert names[0] == names[1]
    assert open_folder(write_pictures(tmp_path / "vehicles", {"bus": 3, "train": 3})).classes == ("bus", "train")
    for part, count in (("train", 8), ("test", 3)):
        write_pictures(tmp_path / "parts" / part, dict.fromkeys("ab", count))
    parts = open_folder(tmp_path / "parts")
    assert (len(parts.train), len(parts.val), len(parts.test), parts.test_from) == (16, 0, 6, "test")
    (tmp_path / "parts" / "test").rename(tmp_path / "parts" / "val")
    assert (len((other := open_folder(tmp_path / "parts")).test), other.test_from) == (6, "val")
    write_pictures(tmp_path / "parts" / "test", {"a": 2})
    (tmp_path / "parts" / "train" / "a" / "deeper").mkdir()
    (tmp_path / "parts" / "train" / "a" / "0.png").rename(tmp_path / "parts" / "train" / "a" / "deeper" / "0.PNG")
    (tmp_path / "parts" / "train" / "a" / "notes.txt").write_text("no picture")
    three = open_folder(tmp_path / "parts")
    assert (len(three.train), len(three.val), len(three.test), three.test_from) == (16, 6, 2, "test")
    name = f"folder:{tmp_path / 'parts'}"
    whole = load_images(name, tmp_path, train=True)
    assert whole.held == 6
    for seed in (0, 1):  # its own validation part, for every seed
        train, held = split(whole, 6, seed)
        assert torch.equal(held.images, whole.images[16:])
        assert sorted(map(tuple, train.images.flatten(1).tolist())) == sorted(
            map(tuple, whole.images[:16].flatten(1).tolist())
        )
    with pytest.raises(NKATError, match="val has 6 pictures, which --validation 5 is not"):
        split(whole, 5, 0)


def test_grey_is_what_the_pixels_say(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "set", {"a": 6, "b": 6}, grey=True)
    Image.open(root / "a" / "0.png").convert("RGB").save(root / "a" / "0.png")  # its mode says colour
    spec = describe_dataset(f"folder:{root}", tmp_path)
    assert (spec.channels, spec.size, spec.classes, len(spec.mean)) == (1, 16, ("a", "b"), 1)
    images = load_images(f"folder:{root}", tmp_path, True, spec).images
    assert images.shape == (10, 1, 16, 16)
    Image.new("RGB", (16, 16), (1, 2, 3)).save(root / "a" / "new.png")  # seen anew, in this process too
    Image.new("RGB", (16, 16), (1, 2, 3)).save(root / "a" / "newer.png")
    assert describe_dataset(f"folder:{root}", tmp_path).channels == 3
    assert describe_dataset("folder:/elsewhere/set", tmp_path).channels == 3  # found below the data root


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(root: Path) -> str:
        with pytest.raises(NKATError) as raised:
            load_images(f"folder:{root}", tmp_path / "data", train=True)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "there is no such folder" in message(tmp_path / "absent")
    (tmp_path / "file").touch()
    assert "this is no folder" in message(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "holds no folders" in message(tmp_path / "empty")
    assert "holds one class only, a" in message(write_pictures(tmp_path / "one", {"a": 3}))
    assert "there are no pictures in b" in message(write_pictures(tmp_path / "none", {"a": 3, "b": 0}))
    assert "has one picture of each class" in message(write_pictures(tmp_path / "few", {"a": 1, "b": 1}))
    assert "has test, and no train" in message(write_pictures(tmp_path / "t" / "test", {"a": 1, "b": 1}).parent)
    write_pictures(tmp_path / "f" / "train", {"a": 1, "b": 1})
    assert "there is no class z among" in message(write_pictures(tmp_path / "f" / "val", {"a": 1, "z": 1}).parent)
    good = write_pictures(tmp_path / "good", {"a": 5, "b": 5}, side=40)
    load_images(f"folder:{good}", tmp_path, train=True)  # control
    monkeypatch.setattr(folders, "total_and_free_memory", lambda: (1 << 30, 1000))
    with pytest.raises(NKATError, match=r"8 pictures of 8 x 8 take 3.1 kB of memory.*give a smaller --image-size"):
        decode(open_folder(good).train, 8)
    monkeypatch.undo()
    content = (good / "a" / "1.png").read_bytes()
    for number, bad in enumerate(
        (b"", b"GIF", content[: len(content) // 2], content[:60] + b"\xff" * 40 + content[100:])
    ):
        for name in ("a/1.png", "b/1.png", "b/2.png"):
            (good / name).write_bytes(bad)
        said = message(good)
        assert "1.png: " in said, number
        assert "more like it)" in said


def test_a_recipe_keeps_what_was_measured() -> None:
    values = {"dataset": "folder:x/pets", "image_size": 20, "channels": 3, "classes": ["a", "b"]}
    values |= {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    recipe = make_recipe(values)
    assert (recipe.spec.title, recipe.spec.classes, recipe.model.classes, recipe.model.image_size) == (
        "pets",
        ("a", "b"),
        2,
        20,
    )
    assert make_recipe(json.loads(json.dumps(recipe.values()))) == recipe
    assert make_recipe(values | {"tta": "auto"}).train.tta == "flip"
    assert make_recipe(values | {"tta": "auto", "flip": False}).train.tta == "none"
    for name, bad in (
        ("classes", ["a"]),
        ("classes", "ab"),
        ("mean", [0.5]),
        ("std", ["x", 1, 1]),
        ("channels", 2),
        ("image_size", 0),
    ):
        with pytest.raises(NKATError, match=name):
            make_recipe(values | {name: bad})
    with pytest.raises(NKATError, match="its std are not among the settings"):
        make_recipe({name: value for name, value in values.items() if name != "std"})
    with pytest.raises(NKATError, match="image_size is for folders of pictures; mnist's are 28 x 28"):
        make_recipe({"dataset": "mnist", "image_size": 20})
    with pytest.raises(NKATError, match="unknown setting"):
        make_recipe({"dataset": "mnist", "classes": ["a", "b"]})


def test_a_run_from_training_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_pictures(tmp_path / "pets", {"ant bear": 40, "bee": 40, "cat": 40})
    output = tmp_path / "run"

    def ok(module: str, *arguments: object) -> str:
        done = run_module(f"nkat_vit.{module}", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = ok("train", "--dataset", f"folder:{root}", *SMALL, "--epochs", 8, "--no-test", "--output", output)
    assert "pets: 3 classes, 96 colour pictures to learn from, 16 x 16 pixels, taken at 16 x 16" in said
    assert "a fifth of each class, which no run learns from (24 pictures)" in said
    trained = load_model(output)
    assert trained.recipe.spec.classes == ("ant bear", "bee", "cat")
    assert (trained.recipe.train.validation, trained.recipe.model.classes) == (9, 3)
    before = checkpoint.load(output / "last.pt", "run")["model"]
    json_line = ok("train", "--resume", output, "--json", "-").splitlines()
    record = next(json.loads(line) for line in json_line if line.startswith("{"))
    assert record["test"] > 0.9  # one in three by chance
    assert record["test_images"] == 24
    assert "pets, 24 pictures: accuracy" in ok("evaluate", output)
    monkeypatch.setattr("nkat_vit.interpret._STANDARD_ERRORS", 1)  # nine pictures prove little
    assert "accuracy on 9 validation pictures" in ok(
        "interpret", "--checkpoint", output, "--output-dir", tmp_path / "seen"
    )
    ok("export", "--checkpoint", output, "--output", tmp_path / "model.pt2")
    answered = ok("predict", root / "bee" / "3.png", "--checkpoint", output)
    assert "bee" in answered
    extra = {"nkat.json": ""}
    torch.export.load(str(tmp_path / "model.pt2"), extra_files=extra)
    assert json.loads(json.loads(extra["nkat.json"])["classes"]) == ["ant bear", "bee", "cat"]
    assert (tmp_path / "examples.png") == tmp_path / ok(
        "augment", "--dataset", f"folder:{root}", "--output", tmp_path / "examples.png"
    ).splitlines()[0]

    other = run_module("nkat_vit.train", "--resume", output, "--image-size", 12)
    assert "was begun with image_size 16, which --resume cannot change to 12" in other.stderr
    config = ["--config", output / "config.json", "--epochs", 8, "--output", tmp_path / "again"]
    ok("train", "--dataset", f"folder:{root}", *config)  # what the file says of the pictures is measured anew
    after = checkpoint.load(tmp_path / "again" / "last.pt", "run")["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    (root / "bee" / "0.png").unlink()
    with pytest.raises(NKATError, match="other pictures than when this model was trained"):
        load_set(trained, tmp_path, train=True)
    foreign = run_module("nkat_vit.train", "--resume", output)
    assert foreign.returncode == 2
    assert "data_sha256" in foreign.stderr
    words = ["train", "--dataset", f"folder:{root}", "--preset", "fast", "--epochs", 2, "--output", tmp_path / "fast"]
    assert "; batch size 16, as an epoch has 86 pictures" in ok(*words, "--embed-dim", 32, "--threads", 1, "--no-test")
    ok(*words, "--embed-dim", 32, "--threads", 1, "--resume", "--no-test")  # the preset's batch size is no other wish
    refused = run_module("nkat_vit.train", *words[1:], "--resume", "--batch-size", 32)
    assert "batch_size 16, which --resume cannot change to 256, 32" in refused.stderr
    shutil.rmtree(root)
    assert load_model(output).recipe.spec.classes[0] == "ant bear"  # a checkpoint needs no folder
    ok("export", "--checkpoint", output, "--output", tmp_path / "model.pt2", "--force")
