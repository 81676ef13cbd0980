"""Θ in files: round trips in every layout, the base given back exactly, damage recognised."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from nkat.errors import NKATError
from nkat.gguf.file import GGUFError, GGUFFile
from nkat.gguf.writer import BaseView, sha256_of_parts, write_gguf
from nkat.theta import inplace
from nkat.theta.algebra import Theta, quantise_factors
from nkat.theta.modelfile import (
    BOUNDARY,
    ModelFile,
    appended_parts,
    embedded_parts,
    open_model_file,
    theta_for,
    theta_only_parts,
)
from nkat.theta.set import ThetaSet
from tests.conftest import ROOT
from tests.support.tiny_models import write_tiny_model

NAMES = ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.1.ffn_down.weight")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base.gguf", "llama")


def make_set(path: Path, rank: int = 3, seed: int = 0) -> ThetaSet:
    generator = torch.Generator().manual_seed(seed)
    thetas = {}
    for name in NAMES:
        size = max(GGUFFile.open(path).tensors[name].shape)
        thetas[name] = quantise_factors(*torch.randn(2, size, rank, generator=generator))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ThetaSet(
        thetas, 0.97, "weight", seed, digest, "tiny", path.stat().st_size, notes={"nkat.theta.target_size": 9}
    )


def same_set(a: ThetaSet, b: ThetaSet) -> bool:
    return replace(a, layers={}) == replace(b, layers={}) and all(
        torch.equal(getattr(a.layers[n], part), getattr(b.layers[n], part))
        for n in NAMES
        for part in ("p", "q", "scale")
    )


def write_layout(base: Path, out: Path, layout: str, theta_set: ThetaSet) -> ModelFile:
    view = BaseView.whole(GGUFFile.open(base))
    parts = {
        "tensors": lambda: embedded_parts(theta_set, view),
        "appended": lambda: [base.read_bytes(), *appended_parts(theta_set, base.stat().st_size)],
        "theta-only": lambda: theta_only_parts(theta_set),
    }[layout]()
    write_gguf(out, parts, force=True)
    return open_model_file(out)


@pytest.mark.parametrize("layout", ["tensors", "appended", "theta-only"])
def test_round_trip(tmp_path: Path, base: Path, layout: str) -> None:
    theta_set = make_set(base)
    found = write_layout(base, tmp_path / "out.nkat", layout, theta_set)
    assert found.layout == layout
    assert same_set(found.theta, theta_set)
    assert not same_set(found.theta, make_set(base, seed=1))
    if layout != "theta-only":
        assert sha256_of_parts(found.base_parts()) == theta_set.base_sha256
        assert found.base_size == base.stat().st_size
        assert list(found.base.tensors) == list(GGUFFile.open(base).tensors)


def test_layout_tensors_is_plain_gguf_to_gguf_py(tmp_path: Path, base: Path) -> None:
    theta_set = make_set(base)
    write_layout(base, tmp_path / "out.nkat", "tensors", theta_set)
    reader = gguf.GGUFReader(tmp_path / "out.nkat")
    tensors = {t.name: t for t in reader.tensors}
    for name in NAMES:
        stem = name.removesuffix(".weight")
        assert tensors[f"{stem}.theta_p"].tensor_type == gguf.GGMLQuantizationType.I8
        assert np.array_equal(tensors[f"{stem}.theta_p"].data, theta_set.layers[name].p.numpy())
        assert np.array_equal(tensors[f"{stem}.theta_q"].data, theta_set.layers[name].q.numpy())
        assert np.array_equal(tensors[f"{stem}.theta_scale"].data, theta_set.layers[name].scale.numpy())
    values = {key: reader.fields[key].contents() for key in reader.fields if key.startswith("nkat.")}
    assert values == theta_set.metadata()


def test_layout_appended_keeps_the_base_bytes_and_its_promises(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out.nkat"
    write_layout(base, out, "appended", make_set(base))
    raw = out.read_bytes()
    assert raw.startswith(base.read_bytes())
    magic, offset, length = raw[-64:-56], *np.frombuffer(raw[-48:-32], "<u8")
    assert magic == b"NKATTHTA"
    assert offset % BOUNDARY == 0
    assert offset + length == len(raw) - 64
    assert hashlib.sha256(raw[offset : offset + length]).digest() == raw[-32:]
    (tmp_path / "part.gguf").write_bytes(raw[offset : offset + length])
    assert len(gguf.GGUFReader(tmp_path / "part.gguf").tensors) == 3 * len(NAMES)
    assert len(gguf.GGUFReader(out).tensors) == len(gguf.GGUFReader(base).tensors)


@pytest.mark.parametrize("unpadded", [False, True])
def test_an_append_cut_at_any_byte_opens_as_the_base_and_is_repaired(
    tmp_path: Path, base: Path, unpadded: bool
) -> None:
    if unpadded:  # some writers do not pad the last tensor; make it end off the alignment
        raw = base.read_bytes()
        short = raw[: GGUFFile.open(base).data_end]
        base.write_bytes(short)
    whole = base.read_bytes()
    theta_set = make_set(base)
    target = tmp_path / "target.gguf"
    target.write_bytes(whole)
    inplace.append(target, len(whole), appended_parts(theta_set, len(whole)))
    complete = target.read_bytes()
    cuts = {
        *range(len(whole) + 1, len(whole) + 40),
        *range(len(whole), len(complete), 997),
        *range(len(complete) - 70, len(complete)),
    }
    for cut in sorted(cuts):
        target.write_bytes(complete[:cut])
        found = open_model_file(target)
        assert (found.layout, found.theta) == ("plain", None)
        assert found.unfinished is (cut > len(whole))
        assert found.base.data_end == len(whole), cut
        inplace.append(target, found.base.data_end, appended_parts(theta_set, found.base.data_end))
        assert target.read_bytes() == complete
    inplace.truncate(target, open_model_file(target).base.data_end)
    assert target.read_bytes() == whole


def after_a_power_cut(complete: bytes, size: int) -> dict[str, bytes]:
    """What a disk may hold of an append: pages reach it in any order, and those that did not are zeros."""
    end, boundary = len(complete), size + 16 + -(size + 16) % BOUNDARY
    cases = {"the marker's page": (size, boundary), "the marker": (size, size + 16), "all": (size, end)}
    cases |= {"all but the footer": (size, end - 64), "the footer": (end - 64, end), "Θ": (boundary, end - 64)}
    cases |= {"from Θ on": (boundary, end), "behind the marker": (size + 16, end), "Θ's end": (end - 900, end - 64)}
    found = {name: complete[:a] + bytes(b - a) + complete[b:] for name, (a, b) in cases.items()}
    found["the marker's page and the footer"] = complete[:size] + bytes(boundary - size) + complete[boundary:-64]
    found["only the marker's length"] = complete[:size] + bytes(16)
    found["a marker and zeros"] = complete[: size + 16] + bytes(5000)
    return found


def test_an_append_that_a_power_cut_tore_opens_as_the_base_and_is_repaired(tmp_path: Path, base: Path) -> None:
    whole = base.read_bytes()
    theta_set = make_set(base)
    target = tmp_path / "target.gguf"
    target.write_bytes(whole)
    inplace.append(target, len(whole), appended_parts(theta_set, len(whole)))
    complete = target.read_bytes()
    for name, content in after_a_power_cut(complete, len(whole)).items():
        assert content != complete, name
        target.write_bytes(content)
        found = open_model_file(target)
        assert (found.layout, found.theta, found.unfinished, found.foreign_tail) == ("plain", None, True, False), name
        assert sha256_of_parts(found.base_parts()) == theta_set.base_sha256, name
        inplace.truncate(target, found.base.data_end)
        assert target.read_bytes() == whole, name


def test_zeros_of_others_are_no_torn_append(base: Path) -> None:
    """The control for the test above."""
    raw = base.read_bytes()
    boundary = -len(raw) % BOUNDARY
    for tail in (bytes(15), bytes(17), bytes(boundary), bytes(boundary + 64) + b"1" + bytes(9000)):
        base.write_bytes(raw + tail)
        found = open_model_file(base)
        assert not found.unfinished
        assert sha256_of_parts(found.base_parts()) == hashlib.sha256(raw + tail).hexdigest()


def test_the_marker_is_on_the_disk_before_the_rest(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, synced = base.stat().st_size, []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), real(handle)))
    inplace.append(base, size, appended_parts(make_set(base), size))
    assert synced == [size + 16, base.stat().st_size]


def test_one_process_at_a_time_changes_a_file(base: Path) -> None:
    content, size = base.read_bytes(), base.stat().st_size
    program = (
        "import sys, time; from pathlib import Path; from nkat.theta import inplace\n"
        "with inplace.exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(base)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        parts = appended_parts(make_set(base), size)
        for change in (lambda: inplace.append(base, size, parts), lambda: inplace.truncate(base, size - 1)):
            with pytest.raises(NKATError, match="another process is changing this file"):
                change()
        assert base.read_bytes() == content
        other.kill()  # the lock ends with its holder
        other.wait()
        with inplace.exclusive(base):  # and holds nobody up in the process that has it
            inplace.append(base, size, parts)
    assert open_model_file(base).layout == "appended"


def test_bytes_of_others_behind_the_last_tensor_belong_to_the_base(tmp_path: Path, base: Path) -> None:
    """The control for the test above: not everything behind a base is the remains of an append."""
    raw = base.read_bytes()
    for tail in (bytes(64), b"NKATBASE" + bytes(8) + bytes(50), b"somebody's notes" * 4):
        base.write_bytes(raw + tail)
        found = open_model_file(base)
        assert not found.unfinished
        assert found.foreign_tail
        assert sha256_of_parts(found.base_parts()) == hashlib.sha256(raw + tail).hexdigest()


def test_a_damaged_appended_theta_is_not_used(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out.nkat"
    write_layout(base, out, "appended", make_set(base))
    raw = bytearray(out.read_bytes())
    raw[-200] ^= 1
    out.write_bytes(raw)
    found = open_model_file(out)
    assert found.unfinished
    assert found.theta is None
    assert sha256_of_parts(found.base_parts()) == hashlib.sha256(base.read_bytes()).hexdigest()
    raw[-200] ^= 1
    raw[-48:-40] = (1 << 40).to_bytes(8, "little")
    out.write_bytes(raw)
    with pytest.raises(GGUFError, match="impossible"):
        open_model_file(out)


@pytest.mark.parametrize("layout", ["tensors", "theta-only"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nkat.version": 2}, "nkat.version 2 is not supported"),
        ({"nkat.theta.gamma": 1.5}, "gamma"),
        ({"nkat.theta.gamma": "0.97"}, "nkat.theta.gamma is missing or is not of type float"),
        ({"nkat.theta.count": 2}, "nkat.theta.count does not agree"),
        ({"nkat.base.sha256": 5}, "nkat.base.sha256"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path: Path, base: Path, layout: str, change: dict, message: str) -> None:
    theta_set = make_set(base)
    with pytest.raises(GGUFError, match=message) if "gamma" not in message else pytest.raises(Exception, match=message):
        write_layout(base, tmp_path / "out.nkat", layout, replace(theta_set, notes=change))


def test_theta_that_does_not_fit_is_refused(tmp_path: Path, base: Path) -> None:
    theta_set = make_set(base)
    odd = dict(theta_set.layers)
    odd["blk.9.attn_q.weight"] = odd[NAMES[0]]
    with pytest.raises(GGUFError, match=r"'blk.9.attn_q.weight', which the base model does not have"):
        write_layout(base, tmp_path / "a.nkat", "tensors", replace(theta_set, layers=odd))
    odd = {**theta_set.layers, NAMES[0]: quantise_factors(*torch.randn(2, 1000, 3))}
    with pytest.raises(GGUFError, match="size 1000 does not fit"):
        write_layout(base, tmp_path / "b.nkat", "appended", replace(theta_set, layers=odd))
    bad = Theta(*(getattr(theta_set.layers[NAMES[0]], part) for part in ("p", "q")), torch.full((2, 3), float("nan")))
    with pytest.raises(GGUFError, match="theta_scale holds NaN"):
        write_layout(
            base, tmp_path / "c.nkat", "tensors", replace(theta_set, layers={**theta_set.layers, NAMES[0]: bad})
        )


def test_a_theta_file_is_only_used_with_its_own_model(tmp_path: Path, base: Path) -> None:
    theta_set = make_set(base)
    write_layout(base, tmp_path / "theta.bin", "theta-only", theta_set)
    assert same_set(theta_for(open_model_file(base), tmp_path / "theta.bin"), theta_set)
    other = write_tiny_model(tmp_path / "other.gguf", "llama", seed=1)
    with pytest.raises(GGUFError, match="was made for another model"):
        theta_for(open_model_file(other), tmp_path / "theta.bin")
    with pytest.raises(GGUFError, match="holds no Θ"):
        theta_for(open_model_file(base), other)


def test_theta_goes_behind_a_base_without_its_last_padding(tmp_path: Path, base: Path) -> None:
    file = GGUFFile.open(base)
    base.write_bytes(base.read_bytes()[: file.data_end])
    theta_set = make_set(base)
    for layout in ("tensors", "appended"):
        found = write_layout(base, tmp_path / f"{layout}.nkat", layout, theta_set)
        assert same_set(found.theta, theta_set)
        assert sha256_of_parts(found.base_parts()) == theta_set.base_sha256


@pytest.mark.parametrize("layout", ["tensors", "appended"])
def test_a_rank_beyond_the_layers_is_refused(tmp_path: Path, base: Path, layout: str) -> None:
    """A corner of one row may not carry millions of columns, which every row of the weight would get."""
    theta_set = make_set(base)
    for size, rank in ((1, 10_000), (64, 33), (4, 5)):  # attn_k is 32 x 64
        thetas = {**theta_set.layers, NAMES[1]: quantise_factors(*torch.randn(2, size, rank))}
        with pytest.raises(GGUFError, match=f"Θ of rank {rank} for 'blk.0.attn_k.weight': it must be from 1 to"):
            write_layout(base, tmp_path / "a.nkat", layout, replace(theta_set, layers=thetas))
        fits = quantise_factors(*torch.randn(2, size, min(32, size)))
        assert write_layout(base, tmp_path / "b.nkat", layout, replace(theta_set, layers={NAMES[1]: fits})).theta


@pytest.mark.parametrize(
    ("key", "value"),
    [("nkat.base.gguf_version", 1 << 32), ("nkat.base.gguf_version", 0), ("nkat.theta.gamma", float("nan"))],
)
def test_numbers_out_of_range_in_thetas_metadata(tmp_path: Path, base: Path, key: str, value: float) -> None:
    from nkat.errors import NKATError

    with pytest.raises(NKATError, match=key.rpartition(".")[2]):
        write_layout(base, tmp_path / "a.nkat", "tensors", replace(make_set(base), notes={key: value}))
