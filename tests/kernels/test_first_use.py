"""The check at a kernel's first use: what it finds, what becomes of that, and when it is made again.

Kernels need a GPU, so torch stands in for them here; `tests/support/interpreted_kernels.py` checks the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType as QType
from torch import Tensor

from nkat.engine import step_check
from nkat.engine.decoder import make_decoder
from nkat.engine.eager import EagerDecoder
from nkat.engine.plan import TorchOps, decode_step, make_plan
from nkat.engine.step_check import check_step, step_works
from nkat.errors import NKATError
from nkat.kernels.cuda import first_use, linear, packing, planes
from nkat.kernels.cuda.packing import check_products, pack, random_weight
from nkat.kernels.cuda.planes import FileWeight, PlaneWeight
from nkat.kernels.cuda.step import TritonOps
from nkat.lm.load import load_model
from nkat.lm.transformer import Transformer
from nkat.theta.algebra import quantise_factors
from tests.kernels.test_cuda import FAMILIES, every_format, needs_triton, packed_weight, recorders, seven_billion
from tests.support.tiny_models import write_tiny_model

__all__ = ["recorders"]  # a fixture
CPU = torch.device("cpu")
MACHINE = dict.fromkeys((*first_use._DECIDES, "source"), "1") | {"device_name": "NVIDIA X"}


def vector(
    weight: PlaneWeight, x: Tensor, bias: Tensor | None, star: linear.Star, *, segments: tuple[int, ...]
) -> Tensor:
    natural = x.view(len(x), 2, 4, -1, 4).permute(0, 3, 1, 4, 2).reshape(x.shape)
    y = natural @ weight.dequantise().T + (0.0 if bias is None else bias.float())
    for i, (start, stop) in enumerate(pairwise((0, *segments, weight.shape[0]))):
        y[:, start:stop] += star.kappa[i] * star.inner[i].sum(dim=1) @ star.up[start:stop].float().T
    return y


def matrix(weight: PlaneWeight, x: Tensor, bias: Tensor | None, star: linear.Star) -> Tensor:
    y = x.float() @ weight.dequantise().T + star.kappa * star.inner @ star.up.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def rows(weight: PlaneWeight, ids: Tensor) -> Tensor:
    return weight.dequantise()[ids]


STAND_INS: dict[str, Callable[..., Tensor]] = {"vector": vector, "matrix": matrix, "rows": rows}
SAID = {"vector": "a product with one input", "matrix": "a product with many inputs", "rows": "a row"}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A device on which nothing was ever run."""
    monkeypatch.setenv("NKAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(first_use, "_made_for", lambda device: MACHINE)
    monkeypatch.setattr(first_use, "verdicts", {})


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for the kernels, and a GPU as far as `pack` asks for one."""
    for name, stand_in in STAND_INS.items():
        monkeypatch.setattr(linear, name, stand_in)
    monkeypatch.setattr(packing, "require_triton", lambda: None)
    monkeypatch.setattr(packing, "_check_capability", lambda device: None)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))


def spoil(name: str) -> Callable[..., Tensor]:
    """The stand-in with one number of its result 1 % of the largest off."""

    def wrong(*arguments: Any, **keywords: Any) -> Tensor:
        y = STAND_INS[name](*arguments, **keywords)
        y.view(-1)[-1] += 0.05 * y.abs().max()
        return y

    return wrong


# --- what a check finds


@every_format
def test_the_check_takes_what_is_right(kernels, qtype):
    for shape in ((100, 512), (20, 256)):  # with three segments, and too few rows for them
        for has_bias in (False, True):
            assert check_products(qtype, shape, CPU, has_bias) is None


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("how", ["wrong", "not finite", "raises"])
def test_a_wrong_kernel_is_found_and_replaced(kernels, monkeypatch, capsys, name, how):
    def not_finite(*arguments: Any, **keywords: Any) -> Tensor:
        y = STAND_INS[name](*arguments, **keywords)
        y.view(-1)[0] = float("nan")
        return y

    def raises(*arguments: Any, **keywords: Any) -> Tensor:
        raise RuntimeError("no code for sm_120\nand more lines")

    monkeypatch.setattr(linear, name, {"wrong": spoil(name), "not finite": not_finite, "raises": raises}[how])
    packed, values = packed_weight(QType.Q4_K, 16, 256)
    weight = pack(packed, QType.Q4_K, (16, 256))
    assert isinstance(weight, FileWeight)
    assert torch.allclose(linear.linear(weight, torch.eye(256)).double(), values.T, atol=1e-6)
    pack(packed, QType.Q4_K, (16, 256))
    said = capsys.readouterr().err
    assert said.count("\n") == 1  # for all weights of the format
    assert "the CUDA kernels for Q4_K are not used" in said
    assert ("RuntimeError: no code for sm_120;" if how == "raises" else f"{SAID[name]} differs") in said


def test_a_right_kernel_is_used_without_a_word(kernels, capsys):
    packed, _ = packed_weight(QType.Q4_K, 16, 256)
    assert isinstance(pack(packed, QType.Q4_K, (16, 256)), PlaneWeight)
    assert capsys.readouterr().err == ""


@every_format
def test_random_planes_are_such_as_files_give(qtype):
    packed, _ = packed_weight(qtype, 8, 512)
    expected = planes.pack(packed, qtype, (8, 512))
    found = random_weight(qtype, (8, 512), torch.Generator().manual_seed(0))
    for plane in ("low", "high", "d", "s"):
        ours, files = getattr(found, plane), getattr(expected, plane)
        assert (ours is None) == (files is None)
        assert ours is None or (ours.dtype, ours.shape) == (files.dtype, files.shape)
    assert found.dequantise().std() > 0.01


def made_from(launch: tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]) -> tuple[Any, ...]:
    """All of a launch that Triton compiles anew for."""
    _, arguments, keywords = launch
    kinds = [a.dtype if isinstance(a, Tensor) else (type(a), a % 16 == 0) for a in arguments]
    return (*kinds, *sorted(keywords.items(), key=str))


@needs_triton
def test_a_check_compiles_what_is_launched_later(recorders, monkeypatch):
    """Of the formats and sizes of a 7B model with Θ of rank 4: the check takes hardly longer than doing without it."""
    monkeypatch.setattr(first_use, "difference", lambda *_: None)
    model = seven_billion(1)
    with torch.inference_mode():
        where = torch.empty(1, dtype=torch.int64, device="meta")
        decode_step(make_plan(model, model.new_cache(1, 1024)), TritonOps(star=True), where, where)
        layer = model.blocks[0].linear("attn_q")
        weight = planes.pack(layer.file_bytes, layer.qtype, layer.shape)
        x = torch.empty(512, 4096, dtype=torch.bfloat16, device="meta")
        linear.linear(weight, x, None, layer.down, layer.up, torch.empty(1, device="meta"))
        linear.rows(weight, where)
    names = ("vector_kernel", "matrix_kernel", "rows_kernel")
    later = {name: {made_from(launch) for launch in recorders[name].launches} for name in names}
    for name in names:
        recorders[name].launches.clear()
    check_products(QType.Q4_K, (4096, 4096), CPU)
    assert all(made_from(launch) in later[name] for name in names for launch in recorders[name].launches)
    assert [len(recorders[name].launches) for name in names] == [1, 1, 1]
    check_products(QType.Q4_K, (4096, 4096), CPU, has_bias=True)  # which no layer of this model has
    assert made_from(recorders["vector_kernel"].launches[1]) not in later["vector_kernel"]


# --- what is kept


class Counted:
    """A check that says this, and how often it was asked."""

    def __init__(self, says: str | Exception | None) -> None:
        self.says, self.count = says, 0

    def __call__(self) -> str | None:
        self.count += 1
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


def asked_again(check: Counted, name: str = "x") -> bool:
    """What the next process would be told."""
    first_use.verdicts.clear()
    return first_use.works(name, "the kernels for X", CPU, check)


@pytest.mark.parametrize("says", [None, "a row differs"])
def test_a_result_is_kept(capsys, says):
    check = Counted(says)
    assert first_use.works("x", "the kernels for X", CPU, check) == (says is None)
    assert first_use.works("x", "the kernels for X", CPU, check) == (says is None)
    said = capsys.readouterr().err
    assert said.count("\n") == (says is not None)
    assert asked_again(check) == (says is None)
    assert check.count == 1
    assert capsys.readouterr().err == said
    assert asked_again(Counted("other"), "y") is False  # another check is made, and both are kept
    assert asked_again(check) == (says is None)
    assert check.count == 1


@pytest.mark.parametrize("what", MACHINE)
def test_a_result_holds_only_for_what_it_was_found_with(monkeypatch, what):
    check = Counted(None)
    asked_again(check)
    monkeypatch.setattr(first_use, "_made_for", lambda device: MACHINE | {what: "2"})
    asked_again(check)
    assert check.count == 2
    asked_again(check)
    assert check.count == 2


def test_a_check_that_came_to_no_end_is_made_again():
    check = Counted(RuntimeError("CUDA out of memory"))
    assert not asked_again(check)
    check.says = None
    assert asked_again(check)
    assert check.count == 2


def test_a_damaged_cache_is_no_result(tmp_path):
    check = Counted(None)
    for content in ("", "[]", '{"NVIDIA X": 1}', '{"NVIDIA X": {"made_for": {}, "found": {"x": ""}}}'):
        (tmp_path / "cache").mkdir(mode=0o700, exist_ok=True)
        (tmp_path / "cache/cuda_checks.json").write_text(content)
        before = check.count
        assert asked_again(check)
        assert check.count == before + 1


def test_a_machine_that_cannot_be_asked_is_one_line(monkeypatch, capsys):
    def fails(device: torch.device) -> dict[str, str]:
        raise OSError("no such device")

    monkeypatch.setattr(first_use, "_made_for", fails)
    assert not asked_again(Counted(None))
    assert capsys.readouterr().err.count("\n") == 1


def test_a_gpu_that_stopped_is_said_and_the_next_run_does_without_the_kernel(monkeypatch, capsys):
    dead = True

    def wait(device: torch.device) -> None:
        if dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(first_use, "_wait", wait)
    check = Counted(None)
    with pytest.raises(NKATError, match="run the command again") as caught:
        asked_again(check)
    assert "\n" not in str(caught.value)
    dead = False
    assert not asked_again(check)
    assert check.count == 1
    assert "illegal memory access" in capsys.readouterr().err


# --- a decode step


class PermutedOps(TorchOps):
    """Also gives the other order, as the kernels do."""

    def _input(self, x: Tensor, readers: Any) -> Any:
        found = super()._input(x, readers)
        whole = x[None, : len(x) // 32 * 32]
        return type(found)(found.natural, linear.permute(whole), found.inner)


class WrongOps(PermutedOps):
    """One operation's result is off."""

    wrong = ""

    def activate(self, gate_up: Tensor, gelu: bool, readers: Any) -> Any:
        found = super().activate(gate_up, gelu, readers)
        found.natural[3] += 0.01 * (self.wrong == "activate") * found.natural.abs().max()
        return found

    def attend(self, qkv: Tensor, attention: Any, position: Tensor, readers: Any) -> Any:
        found = super().attend(qkv, attention, position, readers)
        if self.wrong == "attend":
            found.natural[0] = float("nan")
        return found

    def norm(self, *arguments: Any) -> Any:
        total, found = super().norm(*arguments)
        if self.wrong == "norm, Θ" and found.inner is not None:
            found.inner[-1] *= 1.01
        return total, found


def model_on_planes(folder, arch: str = "llama", theta: bool = True, **options: Any) -> Transformer:
    path = write_tiny_model(folder / f"{arch}.gguf", arch, qtype=QType.Q8_0, **options)
    model = load_model(path, dtype=torch.float32).model
    for layer in model.star_linears().values():
        layer.device_weight = planes.pack(layer.file_bytes, layer.qtype, layer.shape)
    if theta:
        generator = torch.Generator().manual_seed(0)
        name, layer = next(iter(model.star_linears().items()))
        model.set_thetas({name: quantise_factors(*torch.randn(2, max(layer.shape), 3, generator=generator))})
    return model


@pytest.mark.parametrize(("arch", "options"), FAMILIES)
def test_right_operations_pass(tmp_path, monkeypatch, arch, options):
    monkeypatch.setattr(step_check, "TritonOps", PermutedOps)
    for theta in (False, True):
        model = model_on_planes(tmp_path, arch, theta, **options)
        assert check_step(model, 40, 6 if theta else 0) is None


@pytest.mark.parametrize("wrong", ["", "activate", "attend", "norm, Θ"])
def test_a_wrong_operation_is_found_and_nothing_is_recorded(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setattr(WrongOps, "wrong", wrong)
    monkeypatch.setattr(step_check, "TritonOps", WrongOps)
    model = model_on_planes(tmp_path)
    if not wrong:
        assert step_works(model, 40)
        return
    assert isinstance(make_decoder(model, 40), EagerDecoder)
    assert isinstance(make_decoder(model, 40), EagerDecoder)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"step are not used on this GPU: {wrong}" in said
    first_use.verdicts.clear()
    model.set_thetas({})  # other operations, so another check
    assert step_works(model, 40) == (wrong == "norm, Θ")


def test_a_step_of_weights_left_to_the_reference_is_not_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_check, "TritonOps", PermutedOps)
    model = model_on_planes(tmp_path)
    assert step_works(model, 40)
    layer = model.blocks[0].linears["attn_q"]
    layer.device_weight = FileWeight(layer.qtype, layer.shape, layer.file_bytes)
    assert isinstance(make_decoder(model, 40), EagerDecoder)
    assert capsys.readouterr().err == ""
