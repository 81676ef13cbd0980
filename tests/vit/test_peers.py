"""The image model's peers: what they are, that they learn, and the benchmark that runs them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import vit_peers
from benchmarks.vit_cnn import PlainCNN, whitening
from benchmarks.vit_peers import PEERS, Judged, PeerRun, planned, whole_epochs
from nkat.errors import NKATError
from nkat_vit import data
from nkat_vit.data import ImageSet, find_dataset
from tests.support.vit_data import run_module, squares, write_cifar


def pictures(count: int) -> ImageSet:
    images, labels = squares(count, 32, 3, 10, 3)
    return ImageSet("cifar10", torch.from_numpy(images), torch.from_numpy(labels).long(), "")


def test_whitened_patches_are_uncorrelated() -> None:
    """Of pictures with structure; the patches themselves are far from it."""
    noise = torch.randn(64, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    smooth = (F.avg_pool2d(noise, 2, stride=1) + noise.mean(dim=1, keepdim=True)[..., 1:, 1:]) / 8 + 0.5
    facts = find_dataset("cifar10")
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (facts.mean, facts.std))
    normal = (smooth - mean) / std

    def moments(x: torch.Tensor) -> torch.Tensor:
        flat = x.transpose(0, 1).flatten(1).double()
        return flat @ flat.T / flat.shape[1]

    filters = whitening(smooth)
    torch.testing.assert_close(filters[12:], -filters[:12], rtol=0, atol=0)
    found = moments(F.conv2d(normal, filters[:12]))
    torch.testing.assert_close(found, torch.eye(12).double(), rtol=0, atol=0.05)
    plain = moments(F.unfold(normal, 2).view(64, 12, -1))
    largest = plain.diagonal().max()
    assert (plain - plain.diag().diag()).abs().max() > 0.5 * largest
    assert largest < 0.3


def test_a_peer_learns_and_the_same_seed_is_the_same_run() -> None:
    train = pictures(120)
    facts = find_dataset("cifar10")

    def losses(seed: int) -> list[float]:
        torch.manual_seed(seed)
        model = Judged(PlainCNN.for_pictures(train), torch.tensor(facts.mean), torch.tensor(facts.std)).train()
        run = PeerRun(model, replace(PEERS["cnn"][1], batch=24), train, seed, steps=12)
        return [float(run.advance()) for _ in range(12)]

    first = losses(0)
    assert first == losses(0) != losses(1)
    assert sum(first[-3:]) < 0.95 * sum(first[:3])


def test_the_benchmark_keeps_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CONTENTS", {})
    make, recipe = PEERS["cnn"]
    monkeypatch.setitem(PEERS, "cnn", (make, replace(recipe, batch=24)))
    root, out = write_cifar(tmp_path / "data"), tmp_path / "out"
    arguments = ["--data-root", root, "--output-dir", out, "--minutes", 0.05, "--only", "cnn"]
    arguments += ["--seeds", 1, "--validation", 24, "--threads", 1]
    done = run_module("benchmarks.vit_peers", *arguments)
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout.splitlines()[-1])["runs"]["cnn"][0]
    assert run["epochs"] == len(run["rows"]) >= 1
    assert run["rows"][-1]["minutes"] > run["rows"][0]["minutes"] / 2 > 0
    assert 0.0 <= run["test"] <= 1.0
    assert (out / "minutes.png").stat().st_size > 1000
    monkeypatch.setattr(vit_peers, "one_run", lambda *_: pytest.fail("made again"))
    assert run_module("benchmarks.vit_peers", *arguments).returncode == 0


def test_what_cannot_be_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NKATError, match=r"an epoch takes 2\.0 minutes here, and --minutes gives 1"):
        whole_epochs(1.0, 120.0)
    assert whole_epochs(10.0, 119.0) == 5
    monkeypatch.setattr(vit_peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NKATError, match="pip install vit-pytorch"):
        vit_peers.compact_transformer(pictures(10))


def test_peers_may_have_fewer_seeds() -> None:
    assert planned(["fast", "cnn"], 2, 2) == [("fast", 0), ("cnn", 0), ("fast", 1), ("cnn", 1)]
    assert planned(["fast", "cnn", "cct"], 3, 1) == [("fast", 0), ("cnn", 0), ("cct", 0), ("fast", 1), ("fast", 2)]
