"""The layer benchmark: what it groups, runs and counts; and one run through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch

from nkat.host.tables import as_text
from nkat.lm.linear import StarLinear
from nkat.lm.load import LoadedModel, load_model
from nkat.measure import layer_speed
from nkat.measure.layer_speed import GemmRow, bench_gemm, copy_speed, gemm_table, layer_kinds
from nkat.measure.speed import PairedOverhead, Timings
from tests.support.tiny_models import write_tiny_model

ENGINE, CONVERTER = "nkat_inference_engine.py", "nkat_gguf_converter.py"


@pytest.fixture
def nkat(script, tmp_path: Path) -> Path:
    base = write_tiny_model(tmp_path / "tiny.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)
    path = tmp_path / "tiny.nkat"
    assert script(CONVERTER, "--input", base, "--output", path, "--theta-rank", 2).returncode == 0
    return path


@pytest.fixture
def loaded(nkat: Path) -> LoadedModel:
    return load_model(nkat)


def test_kinds_hold_every_layer_once(loaded: LoadedModel) -> None:
    kinds = layer_kinds(loaded.model)
    layers = [layer for kind in kinds for layer in kind.layers]
    assert len(layers) == len(set(map(id, layers))) == 3 * 7 + 1
    assert set(map(id, layers)) == set(map(id, loaded.model.star_linears().values()))
    for kind in kinds:
        assert {(layer.shape, layer.qtype) for layer in kind.layers} == {(kind.shape, kind.layers[0].qtype)}
        assert all((0 if layer.theta is None else layer.theta.rank) == kind.rank for layer in kind.layers)
    by_name = {name: kind for kind in kinds for name in kind.names}
    assert by_name["attn_q"] is by_name["attn_output"]  # 64x64 both
    assert by_name["attn_q"] is not by_name["attn_k"]
    assert by_name["output"].rank == 0  # no Θ by default, so it is not of any other layer's kind
    assert by_name["ffn_up"].rank == 2


@pytest.mark.isa
def test_layers_take_turns_and_both_arms_run(loaded: LoadedModel, monkeypatch) -> None:
    calls: list[tuple[int, float, torch.Tensor]] = []
    forward = StarLinear.forward

    def watched(self: StarLinear, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        calls.append((id(self), self.kappa, y))
        return y

    monkeypatch.setattr(StarLinear, "forward", watched)
    rows = bench_gemm(loaded.model, 0.9, repetitions=4, batches=(2,))
    kind = next(row.kind for row in rows if "ffn_down" in row.kind.names)
    of_kind = [call for call in calls if call[0] in {id(layer) for layer in kind.layers}]
    assert len(of_kind) == 2 * 5  # one pair warms up
    assert {call[0] for call in of_kind} == {id(layer) for layer in kind.layers}
    for first, second in zip(of_kind[::2], of_kind[1::2], strict=True):
        assert first[0] == second[0]
        assert sorted([first[1], second[1]]) == [0.0, pytest.approx(0.045)]
        assert not torch.equal(first[2], second[2])
    assert all(layer.kappa == pytest.approx(0.045) for layer in loaded.model.star_linears().values())
    calls.clear()
    bench_gemm(loaded.model, 1.0, repetitions=1, batches=(2,))  # the control: γ = 1 is no Θ
    of_kind = [call for call in calls if call[0] == id(kind.layers[0])]
    assert torch.equal(of_kind[0][2], of_kind[1][2])


@pytest.mark.isa
@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("int8", [False, True])
def test_programs_of_compiled_layers_compute_what_the_layers_do(nkat: Path, batch: int, int8: bool) -> None:
    model = load_model(nkat, int8_activations=int8, repack=True).model
    for kind in layer_kinds(model):
        x = torch.randn(batch, kind.shape[1])
        prepare = layer_speed._compiled_layers(kind, x)
        results = {}
        for gamma in (None, 0.5):
            for layer in kind.layers:
                layer.set_gamma(gamma)
            y = prepare(kind.layers)()
            results[gamma] = torch.from_numpy(y[:batch, : kind.shape[0]].copy())
            assert torch.allclose(results[gamma], kind.layers[-1](x), rtol=1e-5, atol=1e-5)
            assert len(kind.layers) == 1 or not torch.allclose(results[gamma], kind.layers[0](x), atol=1e-2)
        assert torch.equal(results[None], results[0.5]) == (kind.rank == 0)


def test_compiled_layers_are_timed_together_and_counted_one_by_one(nkat: Path, monkeypatch) -> None:
    """By a clock that ticks once a reading, a program of 16 tokens' layers takes a sixteenth of a tick for each."""
    model = load_model(nkat, int8_activations=True, repack=True).model
    now = iter(range(100_000))
    monkeypatch.setattr(layer_speed, "perf_counter", lambda: float(next(now)))
    rows = bench_gemm(model, 0.9, repetitions=3, batches=(1, 8, 512))
    assert {row.batch: row.without.median for row in rows} == {1: 1 / 16, 8: 1 / 2, 512: 1.0}
    for row in rows:
        compiled = row.kind.layers[0].compiled
        assert row.nbytes_with_theta - row.nbytes == (0 if compiled.star is None else compiled.star.nbytes)
        rows, columns = compiled.padded_rows, compiled.shape[1]
        assert row.nbytes - 4 * row.batch * sum(row.kind.shape) == rows * columns // 32 * 34  # Q8_0, as in the file


def test_bytes_are_counted_once(loaded: LoadedModel) -> None:
    rows = bench_gemm(loaded.model, 0.9, repetitions=1, batches=(1, 8))
    for row in rows:
        m, n = row.kind.shape
        assert row.nbytes == m * n // 32 * 34 + 4 * row.batch * (m + n)  # Q8_0: 34 bytes for 32 weights
        assert row.nbytes_with_theta - row.nbytes == 4 * 2 * row.kind.rank * (m + n)  # two float32 factors
    plain = bench_gemm(loaded.model, None, repetitions=1, batches=(1,))
    assert all(row.with_theta is None for row in plain)
    assert all(row.record(1e9)["overhead"] is None for row in plain)


def test_shares_and_speeds_are_of_the_median(loaded: LoadedModel) -> None:
    kind = layer_kinds(loaded.model)[0]
    row = GemmRow(
        kind, 1, Timings((1e-3, 2e-3, 9e-3)), 4_000_000, Timings((2e-3, 2e-3, 9e-3)), 6_000_000,
        PairedOverhead((2e-3, 2e-3, 9e-3), (1e-3, 2e-3, 9e-3)),
    )  # fmt: skip
    record = row.record(copy_speed=8e9)
    assert record["without"]["gb_per_second"] == pytest.approx(2.0)
    assert record["without"]["bandwidth_share"] == pytest.approx(0.25)
    assert record["with_theta"]["gb_per_second"] == pytest.approx(3.0)
    assert record["overhead"]["percentage"] == pytest.approx(0.0)
    line = as_text(gemm_table([record])).splitlines()[2]
    assert "2,000" in line
    assert "25%" in line


def test_a_copy_is_counted_as_read_and_written(monkeypatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(layer_speed, "perf_counter", lambda: 0.5 * next(now))
    monkeypatch.setattr(layer_speed, "_LARGE_BYTES", 1 << 20)
    assert copy_speed(torch.device("cpu"), 3) == 2 * (1 << 20) / 0.5


def test_a_slow_layer_is_timed_less_often(loaded: LoadedModel, monkeypatch) -> None:
    now = iter(range(100_000))
    monkeypatch.setattr(layer_speed, "perf_counter", lambda: float(next(now)))
    rows = bench_gemm(loaded.model, 0.9, repetitions=50, batches=(1,))
    assert {len(row.without.seconds) for row in rows} == {3}


def test_through_the_command_line(script, nkat: Path, tmp_path: Path) -> None:
    done = script(ENGINE, "--model", nkat, "--gemm", "--repetitions", 2, "--no-cuda", "--json", "-")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["copy_gb_per_second"] > 0
    assert {row["batch"] for row in record["rows"]} == {1, 8, 512}
    assert sum(row["count"] for row in record["rows"] if row["batch"] == 1) == 3 * 7 + 1
    assert all((row["theta_rank"] == 2) == (row["with_theta"] is not None) for row in record["rows"])
    assert all(row["without"]["bandwidth_share"] > 0 for row in record["rows"])
    assert "what Θ costs" in done.stdout
    plain = script(ENGINE, "--model", tmp_path / "tiny.gguf", "--gemm", "--repetitions", 1, "--no-cuda")
    assert plain.returncode == 0
    assert "has no Θ" in plain.stderr
