"""The forms that `benchmarks.forms` compares are what it says, and take the bytes it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import scipy.linalg
import torch

from benchmarks import forms
from benchmarks.low_rank import apply_terms
from nkat.host.tables import as_text
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.texts import default_text
from nkat.sources.fit.descent import FitSettings
from nkat.sources.fit.layers import fitted_layers
from nkat.theta.layers import adaptable_layers
from tests.support.tiny_models import write_tiny_model

SMOLLM2 = {"attn_q": (576, 576), "attn_k": (192, 576), "attn_v": (192, 576), "attn_output": (576, 576)}
SMOLLM2 |= {"ffn_gate": (1536, 576), "ffn_up": (1536, 576), "ffn_down": (576, 1536)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama", blocks=2))


def shapes_of(loaded: LoadedModel) -> dict[str, tuple[int, int]]:
    return {name: loaded.tensors[name].shape for name in adaptable_layers(loaded.tensors)}


@pytest.mark.parametrize("strength", [0.1, 1.0, 3.0])
def test_a_rotation_is_the_exponential_of_theta(strength: float) -> None:
    generator = torch.Generator().manual_seed(0)
    u = strength * torch.randn(20, 6, generator=generator, dtype=torch.float64) / math.sqrt(20)
    p, q = u[:, :3], u[:, 3:]
    exact = torch.from_numpy(scipy.linalg.expm((p @ q.T - q @ p.T).numpy()))
    one = torch.eye(20, dtype=torch.float64)
    turned = one + u @ forms.rotation_core(u) @ u.T
    torch.testing.assert_close(turned, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned @ turned.T, one, rtol=0, atol=1e-12)  # it keeps norms
    # Controls: the transpose turns the other way, and the first order neither is the exponential nor keeps norms.
    assert not torch.allclose(turned.T, exact, atol=1e-5)
    first = one + p @ q.T - q @ p.T
    assert not torch.allclose(first, exact, atol=1e-5)
    assert not torch.allclose(first @ first.T, one, atol=1e-5)


def test_the_gradient_goes_through_the_exponential() -> None:
    u = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: u @ forms.rotation_core(u) @ u.T, u)


def test_forms_have_equal_bytes() -> None:
    """On SmolLM2's shapes; half the bytes of the additive form are enough for a rotation of its rank."""
    shapes = {f"blk.{block}.{name}.weight": shape for block in range(2) for name, shape in SMOLLM2.items()}
    plans = {form: forms.make_plan(form, shapes) for form in forms.RATES}
    whole = plans["additive"].nbytes
    assert whole == 2 * (4 * 4 * (576 * 2 + 8) + 3 * 4 * (1536 * 2 + 8))
    for plan in plans.values():
        assert abs(plan.nbytes / whole - 1) < 0.1
    assert set(plans["ffn"].additive.values()) == {6}
    assert {name.split(".")[2] for name in plans["ffn"].additive} == {"ffn_gate", "ffn_up", "ffn_down"}
    turning = plans["rotation"].rotation
    assert [turning[f"blk.0.{name}.weight"] for name in SMOLLM2] == [8, 0, 0, 8, 8, 0, 8]
    same_rank = sum((2 * n + 8) * 4 for name, (_, n) in shapes.items() if turning[name])
    assert same_rank / whole == pytest.approx(0.47, abs=0.005)


@pytest.mark.parametrize("form", forms.RATES)
def test_what_is_fitted_is_what_is_judged(tiny: LoadedModel, form: str) -> None:
    """The layers of the fit, rounded, and the low-rank terms that an adapter would hold predict the same."""
    plan = forms.make_plan(form, shapes_of(tiny))
    generator = torch.Generator().manual_seed(2)
    factors = {}
    for name, start in zip(plan.shapes, plan.starts(0), strict=True):
        # rows beyond the input stay zero, as their gradient does
        factors[name] = tuple(0.1 * torch.randn(f.shape, generator=generator) for f in start)
    tokens = torch.randint(40, (2, 9), generator=generator)
    layers = tiny.model.star_linears()
    names = {id(layers[name]): name for name in plan.shapes}
    with torch.inference_mode():
        before = tiny.model(tokens)
        with fitted_layers(tiny.model, factors, plan.kind(names)) as (_, mode):
            mode.rounded = True
            fitted = tiny.model.hidden(tokens)
        apply_terms(tiny.model, plan.terms(tiny.model, factors))
        judged = tiny.model.hidden(tokens)
        tiny.model.set_thetas({})
        tiny.model.set_gamma(None)
        assert torch.equal(tiny.model(tokens), before)
        plain = tiny.model.hidden(tokens)
    torch.testing.assert_close(judged, fitted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, fitted, atol=0.05)


@pytest.mark.parametrize("form", forms.RATES)
def test_every_form_starts_at_nothing(tiny: LoadedModel, form: str) -> None:
    plan = forms.make_plan(form, shapes_of(tiny))
    factors = dict(zip(plan.shapes, plan.starts(0), strict=True))
    for down, up in plan.terms(tiny.model, factors).layers.values():
        torch.testing.assert_close(up @ down, torch.zeros(len(up), down.shape[1]), rtol=0, atol=1e-7)


def test_a_case_is_fitted_and_judged_on_other_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation learns; the same seed gives the same figures, another one others."""
    path = write_tiny_model(tmp_path / "tiny.gguf", "llama", blocks=1)
    monkeypatch.setattr(forms, "cached", lambda _: path)
    monkeypatch.setattr(forms, "IGNORED", [])
    content = default_text().content
    for i, name in enumerate((forms.CALIBRATION, forms.HOME, *forms.ELSEWHERE)):
        (tmp_path / name).write_text(content[6000 * i : 6000 * (i + 1)])
    settings = FitSettings(4, 0.97, steps=12, batch=2, context=48, warmup=2, nested=False, validate_every=12)
    chunks = dict.fromkeys((forms.HOME, *forms.ELSEWHERE), 1)

    def run(seed: int) -> dict:
        return forms.Bench(tmp_path, tmp_path, settings, chunks, torch.device("cpu")).run("tiny", "both", 0.02, seed)

    first, again, other = run(0), run(0), run(1)
    assert first["texts"] == again["texts"] != other["texts"]
    home = first["texts"][forms.HOME]
    assert home["change_percent"] < -10
    assert 0 < home["kl"] < 10
    rows = forms.summaries([first, other])
    mean = (home["change_percent"] + other["texts"][forms.HOME]["change_percent"]) / 2
    assert rows[0]["home"]["mean"] == pytest.approx(mean)
    assert as_text(forms.table(rows)).count("±") == 7
