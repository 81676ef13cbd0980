"""Training: it learns, repeats, survives being killed, stops at NaN, runs on two processes, and keeps files safe."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from functools import partial
from math import log10
from pathlib import Path
from statistics import median

import pytest
import torch

from nkat.errors import NKATError
from nkat.host.distributed import World
from nkat_vit import checkpoint, loop, train
from nkat_vit.augment import Batch
from nkat_vit.checkpoint import load_model
from nkat_vit.data import ImageSet, load_images, split
from nkat_vit.loop import Trainer, compile_model, mixed_loss
from nkat_vit.metrics import Target, lambda_theory
from nkat_vit.model import NKATViT
from nkat_vit.optim import lr_factor
from nkat_vit.predict import accuracy, predict_logits
from nkat_vit.recipe import make_recipe
from tests.conftest import ROOT
from tests.support.vit_data import run_module, write_digits

MODEL = ["--embed-dim", 32, "--depth", 2, "--heads", 4, "--gauge-rank", 2]
COMMON = ["--dataset", "emnist-digits", *MODEL, "--validation", 24, "--batch-size", 24, "--warmup", 1, "--threads", 1]
STILL = ["--crop", 0, "--randaugment", 0, 0, "--cutout", 0, "--mixup", 0, "--cutmix", 0]
STILL += ["--dropout-attn", 0, "--dropout-embed", 0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "data")


def run(data: Path, output: Path, *more: object) -> dict:
    done = run_module(
        "nkat_vit.train", "--data-root", data, "--output", output, *COMMON, "--epochs", 3, *more, "--json", "-"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "last.pt", "run")["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_leaves_everything_behind(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data", train=384, test=100)
    record = run(data, tmp_path / "run", *STILL, "--lr", 4e-3, "--epochs", 6, "--ema", 0.9, "--opt", "muon")
    assert record["test"] > 0.8  # one in ten by chance
    assert record["test_images"] == 100
    assert record["tpe"] == pytest.approx(
        record["test"] / torch.log10(torch.tensor(1 + record["lambda_theory"])).item()
    )
    folder = tmp_path / "run"
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert (folder / "curves.png").stat().st_size > 5000
    assert (folder / "confusion.png").stat().st_size > 5000
    assert record["test_top5"] >= record["test"]
    assert sum(row[i] for i, row in enumerate(record["test_confusion"])) == round(100 * record["test"])
    assert record["test_images_per_second"] > 0
    assert json.loads((folder / "result.json").read_text())["test"] == record["test"]
    for name, row in (
        ("train_images_per_second", "images_per_second"),
        ("judge_images_per_second", "judged_per_second"),
    ):
        assert record[name] == pytest.approx(median(float(r[row]) for r in rows))
    assert record["memory"]["peak"] > 1 << 20
    assert record["memory"]["gpu_peak"] is None or torch.cuda.is_available()
    again = run_module("nkat_vit.train", "--data-root", data, "--output", folder, *COMMON)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr

    trained = load_model(folder)
    assert trained.facts["test"] == record["test"]
    assert not trained.model.training
    whole = load_images("emnist-digits", data, train=False)
    logits = predict_logits(trained.model, whole.images, tta="flip")
    flipped = predict_logits(trained.model, whole.images.flip(-1), tta="flip")
    torch.testing.assert_close(logits, flipped, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, predict_logits(trained.model, whole.images), atol=1e-3)
    assert accuracy(trained.model, whole) == record["test"]


@pytest.mark.isa
def test_a_seed_repeats_and_another_does_not(tmp_path: Path, data: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(data, tmp_path / name, "--seed", seed, "--no-test")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.isa
@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_killed_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, opt: str
) -> None:
    extra = ["--opt", opt, "--save-steps", 2, "--drop-path", 0.2]
    extra += ["--grad-accum", 2, "--layer-decay", 0.8] if opt == "muon" else ["--aa", "autoaugment"]
    run(data, tmp_path / "whole", *extra)
    whole = Trainer.train_step
    for stop in (2, 5, 7):  # epochs have three steps: after a step that was saved, and between

        def killed(self: Trainer, stop: int = stop) -> torch.Tensor:
            if self.step == stop:
                raise KeyboardInterrupt
            return whole(self)

        monkeypatch.setattr(Trainer, "train_step", killed)
        resume = ["--resume"] if stop > 2 else []
        command = ["--data-root", data, "--output", tmp_path / "cut", *COMMON, "--epochs", 3, *extra, *resume]
        done = run_module("nkat_vit.train", *command)
        assert done.returncode == 130
        assert "--resume" in done.stderr
    monkeypatch.setattr(Trainer, "train_step", whole)
    done = run_module("nkat_vit.train", "--resume", tmp_path / "cut", "--data-root", data)
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    first, second = (checkpoint.load(tmp_path / n / "best.pt", "weights") for n in ("whole", "cut"))
    assert same(first["weights"], second["weights"])
    assert first["test"] == second["test"]
    for a, b in zip(*(list(csv.DictReader((tmp_path / n / "log.csv").open())) for n in ("whole", "cut")), strict=True):
        assert (a["loss"], a["validation"]) == (b["loss"], b["validation"])


def test_resume_refuses_another_recipe_and_other_data(tmp_path: Path, data: Path) -> None:
    run(data, tmp_path / "run", "--no-test")
    resume = ["--resume", tmp_path / "run", "--data-root", data]
    changed = run_module("nkat_vit.train", *resume, "--lr", 0.5)
    assert changed.returncode == 2
    assert "was begun with lr 0.0002, which --resume cannot change to 0.5" in changed.stderr
    another = run_module("nkat_vit.train", *resume, "--dataset", "cifar10", "--epochs", 4)
    assert another.returncode == 2
    assert (
        "was begun with dataset emnist-digits, epochs 3, which --resume cannot change to cifar10, 4" in another.stderr
    )
    assert "--extend-to makes a run longer" in another.stderr
    many = run_module("nkat_vit.train", *resume, "--preset", "fast")
    assert "more), which --resume cannot change" in many.stderr
    other = write_digits(tmp_path / "other", train=95)
    foreign = run_module("nkat_vit.train", "--resume", tmp_path / "run", "--data-root", other)
    assert foreign.returncode == 2
    assert "data_sha256" in foreign.stderr
    for more in ([], ["--tta", "auto", "--randaugment", 2, 9]):  # nothing left to do, and nothing changed
        assert run_module("nkat_vit.train", *resume, "--no-test", *more).returncode == 0
    absent = run_module("nkat_vit.train", "--resume", tmp_path / "nowhere")
    assert "there is no such file, where a checkpoint should be" in absent.stderr


def test_a_finished_run_is_made_longer_on_request(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(data, tmp_path / "run")
    before = checkpoint.load(tmp_path / "run" / "last.pt", "run")
    longer = ["--resume", tmp_path / "run", "--data-root", data, "--extend-to", 6, "--json", "-"]
    whole, rates = Trainer.train_step, []

    def killed(self: Trainer) -> torch.Tensor:
        if self.step == 13:
            raise KeyboardInterrupt
        loss = whole(self)
        rates.append(self.optimizers[0].param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(Trainer, "train_step", killed)
    done = run_module("nkat_vit.train", *longer)
    assert done.returncode == 130
    assert "from 3 epochs to 6: after epoch 3 the learning rate goes on at 65 % of its peak" in done.stderr
    assert rates == pytest.approx([2e-4 * lr_factor(step, 18, 3) for step in range(9, 13)])
    monkeypatch.setattr(Trainer, "train_step", whole)
    again = run_module("nkat_vit.train", *longer)  # the same command goes on
    assert again.returncode == 0, again.stderr
    record = json.loads(again.stdout.splitlines()[-1])
    assert record["extended_from"] == [3]
    assert record["recipe"]["epochs"] == 6
    assert [row["epoch"] for row in record["history"]] == [1, 2, 3, 4, 5, 6]
    assert record["history"][:3] == before["history"]
    shorter = run_module("nkat_vit.train", *longer[:-3], 2)
    assert shorter.returncode == 2
    assert "is no longer run" in shorter.stderr
    alone = run_module("nkat_vit.train", "--data-root", data, *COMMON, "--extend-to", 6)
    assert "give --resume as well" in alone.stderr


def test_a_short_run_has_a_short_warm_up_and_none_is_longer_than_its_run(tmp_path: Path, data: Path) -> None:
    common = ["--data-root", data, *COMMON[:-4], "--threads", 1, "--epochs", 2, "--no-test"]  # no --warmup
    assert "--warmup" not in common
    done = run_module("nkat_vit.train", *common, "--output", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "warm-up: 0.25 epochs of 2, as 5 of 40 in stage2" in done.stderr
    history = checkpoint.load(tmp_path / "a" / "last.pt", "run")["history"]
    assert history[1]["lr"] < history[0]["lr"]  # control: with 5 epochs it would still rise
    for warmup in (2, 5):
        refused = run_module("nkat_vit.train", *common, "--warmup", warmup, "--output", tmp_path / "b")
        assert refused.returncode == 2
        assert "no time to learn with a falling rate" in refused.stderr


def test_fewer_threads_are_advised_where_they_are_faster(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--data-root", data, *COMMON[:-2], "--epochs", 2, "--no-test", "--force", "--output", tmp_path / "r"]
    for speeds, advised in (({1: 126.0, 2: 73.0}, True), ({1: 126.0, 2: 130.0}, False)):
        monkeypatch.setattr(train, "measure_threads", lambda *_, s=speeds: s)
        done = run_module("nkat_vit.train", *common)
        assert done.returncode == 0, done.stderr
        assert ("73 pictures a second with 2 threads, 126 with 1" in done.stderr) == advised
    monkeypatch.setattr(train, "measure_threads", lambda *_: pytest.fail("a number was given"))
    assert run_module("nkat_vit.train", *common, "--threads", 1).returncode == 0


def test_what_the_targets_take_is_said_before_training_and_what_size_bought_after_it(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "TARGETS", {"emnist-digits": Target(accuracy=1.0, tpe=0.45)})
    begin, said = Trainer.run, []

    def noted(self: Trainer) -> None:
        said.append(sys.stderr.getvalue())
        begin(self)

    monkeypatch.setattr(Trainer, "run", noted)
    run(data, tmp_path / "small", "--epochs", 2)
    lam = lambda_theory(sum(p.numel() for p in load_model(tmp_path / "small").model.parameters()))
    assert (
        f"100 % on emnist-digits; at lambda {lam:.2f} its TPE 0.45 takes {100 * 0.45 * log10(1 + lam):.1f} %" in said[0]
    )
    monkeypatch.setattr(train, "accuracy_needed", lambda *_: 1.01)
    record = run(data, tmp_path / "other", "--epochs", 2)
    assert "takes what no accuracy gives, and Global TPE 0.70, over the four sets, takes what no" in said[1]
    for share, bought in ((0.105, True), (1.0, False)):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            train.print_result(record | {"test": share, "tpe": 2.53})
        assert ("bought by size alone: STAGE2 asks for 100 % as well" in out.getvalue()) == bought


def test_threads_are_measured_and_left_as_they_were(data: Path) -> None:
    before = torch.get_num_threads()
    recipe = make_recipe({"dataset": "emnist-digits", "embed_dim": 16, "depth": 1, "heads": 2, "batch_size": 8})
    speeds = loop.measure_threads(recipe, load_images("emnist-digits", data, train=True))
    assert {1, before} <= set(speeds)
    assert all(speed > 0 for speed in speeds.values())
    assert torch.get_num_threads() == before


def test_nan_stops_with_the_last_good_checkpoint(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(data, tmp_path / "good", "--no-test")
    original = loop.mixed_loss
    count = iter(range(100))
    monkeypatch.setattr(loop, "mixed_loss", lambda *a: original(*a) * (float("nan") if next(count) == 4 else 1.0))
    command = ["--data-root", data, "--output", tmp_path / "bad", *COMMON, "--epochs", 3]
    done = run_module("nkat_vit.train", *command)
    assert done.returncode == 2
    assert "no number any more" in done.stderr
    assert "last good checkpoint" in done.stderr
    kept = checkpoint.load(tmp_path / "bad" / "last.pt", "run")
    assert kept["step"] == 3
    assert all(bool(torch.isfinite(w).all()) for w in kept["model"].values())
    monkeypatch.setattr(loop, "mixed_loss", original)
    assert run_module("nkat_vit.train", *command, "--resume", "--no-test").returncode == 0
    assert same(weights(tmp_path / "bad"), weights(tmp_path / "good"))


@pytest.mark.slow
def test_two_processes_train_the_same_model(tmp_path: Path, data: Path) -> None:
    """Without BatchNorm and randomness two halves of a batch, in two parts each, give the whole batch's gradient."""
    plain = [*STILL, "--conv-stem", "off", "--patch-size", 7, "--no-test", "--clip-grad", 0]
    plain += ["--epochs", 1, "--warmup", 0.5]
    run(data, tmp_path / "one", *plain)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "nkat_vit.train",
        "--data-root",
        data,
        "--output",
        tmp_path / "two",
        *COMMON,
        *plain,
        *("--grad-accum", 2),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation") == 1  # one process speaks
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-4, msg=name)
    moved = (one["head.weight"] - start_of_head()).abs().max()
    assert moved > 1e-4  # control: training moves weights by more than the tolerance


def weights_after(
    train_set: ImageSet, folder: Path, compiled: bool = False, **more: object
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Of four steps without randomness, and how many pictures the model saw at a time."""
    values = {"dataset": "emnist-digits", "embed_dim": 32, "depth": 2, "heads": 4, "gauge_rank": 2, "crop": 0}
    values |= {"randaugment": (0, 0), "cutout": 0, "mixup": 0.2, "cutmix": 0.2, "dropout_attn": 0.0}
    values |= {"dropout_embed": 0.0, "batch_size": 24, "warmup": 0.0, "validation": 24, "smoothing": 0.1}
    train_part, held = split(train_set, 24, 0)
    world = World(0, 1, torch.device("cpu"))
    trainer = Trainer(make_recipe(values | more), train_part, held, world, folder, compiled=compiled)
    seen: list[int] = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    start = trainer.model.head.weight.detach().clone()
    for _ in range(4):
        trainer.train_step()
    assert (trainer.model.head.weight - start).abs().max() > 1e-4  # beyond the tolerance
    return trainer.model.state_dict(), seen


def test_parts_of_a_batch_are_the_batch(tmp_path: Path, data: Path) -> None:
    """But for BatchNorm, of which the control has some."""
    whole_set = load_images("emnist-digits", data, train=True)
    for model, equal in (({"conv_stem": "off", "patch_size": 7}, True), ({"conv_stem": "tiny"}, False)):
        one, seen = weights_after(whole_set, tmp_path, **model)
        assert seen == [24] * 4
        four, seen = weights_after(whole_set, tmp_path, **model, grad_accum=4)
        assert seen == [6] * 16
        furthest = max((one[name] - four[name]).abs().max().item() for name in one if one[name].is_floating_point())
        assert (furthest < 2e-5) == equal
    with pytest.raises(NKATError, match="grad_accum 5 does not divide the 24"):
        weights_after(whole_set, tmp_path, grad_accum=5)


@pytest.mark.parametrize(
    ("device", "processes", "parts", "mode"),
    [("cpu", 1, 1, None), ("cuda", 2, 1, None), ("cuda", 1, 4, None), ("cuda", 1, 1, "reduce-overhead")],
)
def test_a_gpu_alone_has_its_steps_recorded(
    monkeypatch: pytest.MonkeyPatch, device: str, processes: int, parts: int, mode: str | None
) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: asked.append(mode) or model)
    compile_model(torch.nn.Linear(1, 1), World(0, processes, torch.device(device)), parts)
    assert asked == [mode]


def test_a_compiled_run_learns_the_same(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a backend that runs the program as it was traced: the others take a minute and a C++ compiler."""
    whole = load_images("emnist-digits", data, train=True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, _ = weights_after(whole, tmp_path)
    traced, _ = weights_after(whole, tmp_path, compiled=True)
    torch.testing.assert_close(traced, plain, rtol=0, atol=2e-5)  # the names too: a checkpoint knows no compiler


def test_shorter_epochs_go_on_through_the_set_where_the_last_ended(tmp_path: Path, data: Path) -> None:
    train_set, held = split(load_images("emnist-digits", data, train=True), 24, 0)
    values = {"dataset": "emnist-digits", "embed_dim": 32, "depth": 1, "batch_size": 16, "warmup": 0.0}
    seen: dict[int, list[torch.Tensor]] = {}
    for epoch_size in (0, 40):
        recipe = make_recipe(values | {"epoch_size": epoch_size})
        trainer = Trainer(recipe, train_set, held, World(0, 1, torch.device("cpu")), tmp_path)
        assert trainer.epoch_steps == (epoch_size or len(train_set)) // 16
        seen[epoch_size] = []
        for trainer.step in range(len(train_set) // 16 + 3):
            seen[epoch_size].append(trainer._batch_index())
    assert len(seen[0]) > 6
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[40], strict=True))
    one_pass = torch.cat(seen[40][:-3])
    assert len(one_pass.unique()) == len(one_pass)  # no picture twice, over several short epochs
    assert len(torch.cat(seen[40]).unique()) < len(torch.cat(seen[40]))  # control: the next pass has them again
    with pytest.raises(NKATError, match="epoch_size 8 is less than one batch of 16"):
        make_recipe(values | {"epoch_size": 8})


def test_a_run_of_an_older_version_goes_on(tmp_path: Path, data: Path) -> None:
    """Without the settings and the columns that were added since."""
    run(data, tmp_path / "run", "--no-test")
    path = tmp_path / "run" / "last.pt"
    content = checkpoint.load(path, "run")
    content["recipe"] = {
        k: v for k, v in content["recipe"].items() if k not in ("grad_accum", "layer_decay", "epoch_size")
    }
    for row in content["history"]:
        del row["judged_per_second"]
    checkpoint.save(path, content)
    for _ in range(2):  # its rows stay alike
        done = run_module(
            "nkat_vit.train", "--resume", path.parent, "--data-root", data, "--extend-to", 4, "--json", "-"
        )
        assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert len(record["history"]) == 4
    assert record["judge_images_per_second"] is None
    assert "in judging" not in done.stdout


def start_of_head() -> torch.Tensor:
    values = {"dataset": "emnist-digits", "embed_dim": 32, "depth": 2, "heads": 4, "gauge_rank": 2}
    torch.manual_seed(0)
    return NKATViT(make_recipe(values | {"conv_stem": "off", "patch_size": 7}).model).head.weight.detach()


def test_the_loss_weighs_two_labels() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64)
    labels, others = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 3, 2, 0])
    weight = torch.tensor([1.0, 0.25, 0.5, 0.0], dtype=torch.float64)
    target = 0.9 * (weight[:, None] * torch.eye(5)[labels] + (1 - weight[:, None]) * torch.eye(5)[others]) + 0.1 / 5
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    batch = Batch(logits, labels, others, weight)
    torch.testing.assert_close(mixed_loss(logits, batch, 0.1), expected)
    assert not torch.isclose(mixed_loss(logits, batch, 0.0), expected)


def test_amp_is_measured_and_kept(tmp_path: Path, data: Path) -> None:
    record = run(data, tmp_path / "run", "--amp", "--no-test")
    assert record["recipe"]["amp"] in ("off", "bf16")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["amp"] == record["recipe"]["amp"]
    same_command = ["--data-root", data, "--output", tmp_path / "run", *COMMON, "--epochs", 3, "--amp", "--resume"]
    assert run_module("nkat_vit.train", *same_command, "--no-test").returncode == 0


def test_checkpoints_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for text in (b"nothing of the kind", b"", b"i"):
        path.write_bytes(text)
        with pytest.raises(NKATError, match="is not a checkpoint: it does not begin as"):
            checkpoint.load(path, "run")
    torch.save({"format": 1, "kind": "run", "evil": Path}, path)  # a global that is no tensor
    with pytest.raises(NKATError, match="could run code"):
        checkpoint.load(path, "run")
    torch.save([1, 2], path)
    with pytest.raises(NKATError, match="no checkpoint of nkat_vit"):
        checkpoint.load(path, "run")
    checkpoint.save(path, {"kind": "run"})
    with pytest.raises(NKATError, match=r"needed is best\.pt"):
        load_model(path)


def test_a_bad_test_set_is_found_before_the_first_step(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = data / "EMNIST" / "raw" / "emnist-digits-test-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-40])
    steps = []
    whole = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: steps.append(self.step) or whole(self))
    command = ["--data-root", data, "--output", tmp_path / "r", *COMMON, "--epochs", 2]
    done = run_module("nkat_vit.train", *command)
    assert done.returncode == 2
    assert f"{broken}: damaged" in done.stderr
    assert not steps
    assert run_module("nkat_vit.train", *command, "--no-test").returncode == 0  # it needs none
    assert steps


def test_too_few_pictures_for_a_batch(tmp_path: Path, data: Path) -> None:
    done = run_module(
        "nkat_vit.train", "--data-root", data, "--output", tmp_path / "r", *COMMON, "--batch-size", 100, "--epochs", 2
    )
    assert done.returncode == 2
    assert "fewer than one batch" in done.stderr
