"""Recipes, optimisers and averaged weights: the plan's command line, precedence, Muon against the SVD, schedules."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nkat.errors import NKATError
from nkat_vit.metrics import lambda_theory
from nkat_vit.model import NKATViT, ViTConfig, count_parameters
from nkat_vit.muon import Muon, orthogonalise
from nkat_vit.optim import Average, lr_factor, make_optimizers, set_lr
from nkat_vit.recipe import PRESETS, Recipe, TrainConfig, make_recipe, read_config
from nkat_vit.train_options import given_values, parse_arguments

# STAGE2's command, as it stands.
COMMAND = """--dataset cifar10 --conv_stem tiny --patch_size 2 --embed_dim 384 --depth 7
      --temperature 0.65 --top_k 6 --top_p 0.80 --nkat_strength 0.0024 --nkat_decay 0.99
      --dropout_attn 0.17 --dropout_embed 0.08 --mixup 0.1 --cutmix 0.2 --randaugment 2 9
      --lr 2e-4 --epochs 40 --warmup 5 --ema 0.9995 --clip_grad 1.0"""
TINY = {"dataset": "emnist-digits", "embed_dim": 32, "depth": 2, "heads": 4, "gauge_rank": 2}


def parse(command: str) -> dict:
    return given_values(parse_arguments(shlex.split(command)))


def test_the_plans_command_is_the_preset() -> None:
    given = parse(COMMAND)
    assert len(given) == 20
    assert make_recipe(given) == make_recipe(PRESETS["stage2"] | {"dataset": "cifar10"})
    assert make_recipe(given) == make_recipe(parse("--dataset cifar10 --preset stage2"))
    hyphens = re.sub(r"(?<=\w)_(?=\w)", "-", COMMAND)
    assert hyphens != COMMAND
    assert parse(hyphens) == given
    assert make_recipe(given) != make_recipe(parse("--dataset cifar10 --preset strong"))


def test_file_beats_preset_and_flags_beat_both(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"epochs": 7, "lr": 1e-3, "dataset": "mnist"}))
    recipe = make_recipe(parse(f"--preset strong --config {path} --lr 5e-4"))
    assert (recipe.train.epochs, recipe.train.lr, recipe.dataset) == (7, 5e-4, "mnist")
    assert recipe.train.opt == "muon"


def test_a_recipe_survives_json() -> None:
    for name in ("cifar10", "mnist"):
        recipe = make_recipe(PRESETS["strong"] | {"dataset": name, "limit_train": 5})
        assert make_recipe(json.loads(json.dumps(recipe.values()))) == recipe


def test_grey_sets_have_no_colours_and_letters_no_mirror_image() -> None:
    mnist, fashion, cifar = (make_recipe({"dataset": n}) for n in ("mnist", "fashion", "cifar10"))
    assert (mnist.model.color_norm, mnist.model.split_heads) == ("off", False)
    assert (mnist.augment.flip, fashion.augment.flip, cifar.augment.flip) == (False, True, True)
    for name, judged in (("mnist", "none"), ("cifar10", "flip")):
        recipe = make_recipe(PRESETS["strong"] | {"dataset": name})
        assert recipe.train.tta == judged
        assert make_recipe(recipe.values()) == recipe
    with pytest.raises(NKATError, match="three channels"):
        make_recipe({"dataset": "mnist", "split_heads": True})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no data set"),
        ({"dataset": "imagenet"}, "there is no data set"),
        ({"dataset": "mnist", "epoch": 3}, r"unknown setting\(s\): epoch"),
        ({"dataset": "mnist", "lr": -1.0}, "lr must be positive"),
        ({"dataset": "mnist", "lr": "fast"}, "lr must be of type float"),
        ({"dataset": "mnist", "epochs": 2.5}, "epochs must be of type int"),
        ({"dataset": "mnist", "depth": True}, "depth must be of type int"),
        ({"dataset": "mnist", "randaugment": 2}, "two numbers"),
        ({"dataset": "mnist", "opt": "sgd"}, "adamw, muon"),
        ({"dataset": "mnist", "ema": 1.0}, "ema"),
        ({"dataset": "mnist", "layer_decay": 0.0}, "layer_decay"),
        ({"dataset": "mnist", "grad_accum": 0}, "grad_accum"),
        ({"dataset": "mnist", "channel_shuffle": 0.5}, "channel_shuffle 0.5 needs three channels"),
        ({"dataset": "mnist", "patch_size": 16}, "one token of a picture of 28 pixels"),
    ],
)
def test_impossible_recipes_are_refused(values: dict, message: str) -> None:
    with pytest.raises(NKATError, match=message):
        make_recipe(values)


def test_unreadable_configs_are_refused(tmp_path: Path) -> None:
    for content, message in (("{", "no JSON"), ("[1]", "one JSON object")):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(NKATError, match=message):
            read_config(tmp_path / "c.json")
    with pytest.raises(NKATError, match="cannot be read"):
        read_config(tmp_path / "absent.json")


def test_strong_has_the_size_of_the_baseline() -> None:
    strong, stage2 = (make_recipe(PRESETS[p] | {"dataset": "cifar10"}).model for p in ("strong", "stage2"))
    assert count_parameters(strong) == pytest.approx(count_parameters(stage2), rel=0.02)
    assert strong.tokens >= 64


def test_fast_is_gauge_attention_behind_whitened_convolutions() -> None:
    recipe = make_recipe(PRESETS["fast"] | {"dataset": "cifar10"})
    model, train = NKATViT(recipe.model), recipe.train
    widths = [m.weight.shape[0] for m in model.stem.modules() if isinstance(m, torch.nn.Conv2d)]
    assert widths == [64, 64, 128, 128, 256, 256]
    assert (recipe.model.tokens, recipe.model.embed_dim, recipe.model.depth) == (16, 256, 2)
    assert all(block.attention.gauge is not None for block in model.blocks)
    assert (train.opt, train.muon_lr, train.lr, train.ema, train.batch_size) == ("muon", 0.2, 0.012, 0.99, 512)
    assert (train.muon_momentum, train.muon_steps) == (0.7, 3)
    convolutions = sum(p.numel() for p in model.stem.parameters())  # the whitening's filters are counted too
    assert convolutions > 1_100_000
    shallow = count_parameters(replace(recipe.model, conv_stem="off", patch_size=8)) - (192 - 256) * 256
    assert lambda_theory(count_parameters(recipe.model)) == pytest.approx(
        20 * (shallow + convolutions) / count_parameters(ViTConfig())
    )
    letters = make_recipe(PRESETS["fast"] | {"dataset": "mnist"})
    assert (letters.model.tokens, letters.augment.flip, letters.train.tta) == (16, False, "none")


@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (24, 96)])
def test_orthogonalise_against_the_svd(shape: tuple[int, int]) -> None:
    for scale in (1.0, 1e-3, 50.0):
        matrix = torch.randn(*shape) * scale
        got = orthogonalise(matrix).float()
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.linalg.svdvals(got)
        assert (values[s > 0.1 * s[:1]] > 0.5).all()
        assert values.max() < 1.35
        cosine = (got * (u @ vh)).sum() / (got.norm() * (u @ vh).norm())
        assert cosine > 0.95
        raw = (matrix * (u @ vh)).sum() / (matrix.norm() * (u @ vh).norm())
        assert raw < cosine  # control: without it the direction is another


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize(("momentum", "steps"), [(0.95, 5), (0.6, 3)])
def test_muon_on_batches_of_matrices_is_torchs_on_one_after_the_other(momentum: float, steps: int) -> None:
    start = [torch.randn(shape) for shape in ((24, 24), (48, 24), (24, 96), (1, 8), (24, 48), (24, 24), (48, 24))]
    gradients = [[torch.randn_like(matrix) for matrix in start] for _ in range(3)]
    ended = []
    for kind in (torch.optim.Muon, Muon):
        matrices = [matrix.clone() for matrix in start]
        optimizer = kind(matrices, lr=0.02, weight_decay=0.05, momentum=momentum, ns_steps=steps)
        for row in gradients:
            for matrix, gradient in zip(matrices, row, strict=True):
                matrix.grad = gradient
            optimizer.step()
        ended.append(matrices)
    for theirs, ours, before in zip(*ended, start, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3 * 0.02 * 2**-7, rtol=0)  # a product in bfloat16 rounds anyhow
        assert (theirs - before).abs().max() > 0.005  # control: they moved by more


def test_muons_momentum_and_steps_are_settings() -> None:
    model, recipe = small("muon")
    other = replace(recipe.train, muon_momentum=0.5, muon_steps=3)
    for config, expected in ((recipe.train, (0.95, 5)), (other, (0.5, 3))):
        group = make_optimizers(model, config)[1].param_groups[0]
        assert (group["momentum"], group["ns_steps"]) == expected


def test_muon_moves_packed_maps_apart_and_convolutions_too() -> None:
    model, recipe = small("muon")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        if name.endswith("kv.weight"):
            parameter.grad[: len(parameter) // 2] *= 100  # keys and values of unlike size: each gets its own length
    for optimizer in make_optimizers(model, recipe.train):
        optimizer.step()

    def direction(gradient: torch.Tensor) -> torch.Tensor:
        matrix = gradient.flatten(1)
        rows, columns = matrix.shape
        return orthogonalise(matrix * (1 - 0.95**2)) * max(1, rows / columns) ** 0.5

    config = recipe.train
    for name in ("stem.0.weight", "embed.weight", "blocks.1.attention.kv.weight", "blocks.0.mlp_in.weight"):
        parameter = model.get_parameter(name)
        parts = 2 if "kv" in name else 1
        expected = torch.cat([direction(part) for part in parameter.grad.chunk(parts)]).view_as(parameter)
        kept = before[name] * (1 - config.muon_lr * config.weight_decay)
        torch.testing.assert_close((kept - parameter.detach()) / config.muon_lr, expected.float(), atol=0.02, rtol=0.02)
    moved = (model.head.weight.detach() - before["head.weight"]).abs().max()
    assert moved < 2 * config.lr  # AdamW's step


def small(opt: str) -> tuple[NKATViT, Recipe]:
    recipe = make_recipe(TINY | {"opt": opt})
    torch.manual_seed(0)
    return NKATViT(recipe.model), recipe


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_every_parameter_has_one_optimiser_and_vectors_do_not_decay(opt: str) -> None:
    model, recipe = small(opt)
    optimizers = make_optimizers(model, recipe.train)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    owned = [p for group in groups for p in group["params"]]
    assert sum(p.numel() for p in owned) == sum(p.numel() for p in model.parameters())
    places = {p.data_ptr() for p in owned}
    assert len(places) == len(owned)
    assert {p.data_ptr() for p in model.parameters()} <= places
    assert len(optimizers) == (2 if opt == "muon" else 1)
    for group in groups:
        assert all(p.ndim >= 2 for p in group["params"]) or group["weight_decay"] == 0
    if opt == "muon":  # of each block six, keys and values being two; of the stem two, and the patches' embedding
        assert len(optimizers[1].param_groups[0]["params"]) == 6 * recipe.model.depth + 3
    set_lr(optimizers, 0.25)
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.25 * o.param_groups[0]["peak_lr"] for o in optimizers]


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_layers_learn_and_decay_by_their_depth(opt: str) -> None:
    """With gradients of zero a step is weight decay alone, which shows the rate that it is multiplied by."""
    model, recipe = small(opt)
    config = replace(recipe.train, layer_decay=0.5, weight_decay=0.1, lr=0.02, muon_lr=0.03)
    steps = {"blocks.0.": 0.25, "blocks.1.": 0.5, "norm.": 1.0, "head.": 1.0}  # 0.5 ** (depth + 1 - layer)
    optimizers = make_optimizers(model, config)
    assert optimizers[0].param_groups[0]["lr"] == config.lr  # what the log shows is the head's
    set_lr(optimizers, 0.5)
    place = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
    seen = set()
    for optimizer, lr in zip(optimizers, (config.lr, config.muon_lr), strict=False):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = place[parameter.untyped_storage().data_ptr()]
                share = next((share for start, share in steps.items() if name.startswith(start)), 0.125)
                assert group["lr"] == pytest.approx(0.5 * lr * share), name
                seen.add(name)
    assert seen == {name for name, _ in model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for name, share in (("blocks.0.mlp_in.weight", 0.25), ("embed.weight", 0.125), ("head.weight", 1.0)):
        lr = config.muon_lr if opt == "muon" and name != "head.weight" else config.lr
        expected = before[name] * (1 - 0.5 * lr * share * 0.1)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, atol=1e-8, rtol=1e-6)
        assert not torch.allclose(before[name] * (1 - 0.5 * lr * 0.1), expected, atol=1e-8, rtol=1e-6) or share == 1
    usual = make_optimizers(model, replace(config, layer_decay=1.0))  # off: as if there were no layers
    assert [len(optimizer.param_groups) for optimizer in usual] == ([2, 1] if opt == "muon" else [2])


def test_learning_rate_rises_and_falls() -> None:
    factors = [lr_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == max(factors) == 1.0
    assert factors[55] == pytest.approx(0.5, abs=1e-9)
    assert factors[-1] < 1e-3
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert lr_factor(0, 1, 0) == 1.0


def test_average_is_the_recursion_written_out() -> None:
    model, _ = small("adamw")
    average = Average(model, decay=0.5)
    names = ("head.weight", "stem.1.running_mean", "stem.1.running_var")  # BatchNorm's belong to the weights
    expected = {name: model.state_dict()[name].clone() for name in names}
    for n in range(12):
        with torch.no_grad():
            model.head.weight.add_(torch.randn_like(model.head.weight))
            model.stem[1].running_mean.add_(1.0)
            model.stem[1].running_var.mul_(1.5)
            model.stem[1].num_batches_tracked.add_(1)
        average.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = {name: decay * value + (1 - decay) * model.state_dict()[name] for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(average.weights[name], value)
    assert average.weights["stem.1.num_batches_tracked"] == 12
    other = Average(model, decay=0.5)
    other.restore(average.state())
    assert other.updates == 12
    assert all(torch.equal(other.weights[name], average.weights[name]) for name in average.weights)


def test_no_norm_is_decayed() -> None:
    model = NKATViT(ViTConfig(color_norm="concat"))
    groups = [group for optimizer in make_optimizers(model, TrainConfig()) for group in optimizer.param_groups]
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    norms = [p for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)]
    assert decayed
    assert id(model.color_norm.weight) in map(id, norms)
    assert not decayed & set(map(id, norms))
