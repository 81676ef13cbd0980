"""A fit from end to end on models of a few thousand weights, by itself and through the converter."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from nkat.errors import NKATError
from nkat.lm import learning
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.operations import Operations
from nkat.measure.texts import default_text
from nkat.sources.fit import descent
from nkat.sources.fit import loss as fit_loss
from nkat.sources.fit.data import FitText, fit_text, split_validation
from nkat.sources.fit.descent import FitData, FitSettings, Progress, by_name, fit, to_thetas, zero_start
from nkat.sources.fit.state import FitState, load_state, run_identity, save_state
from nkat.theta.layers import adaptable_layers
from nkat.theta.modelfile import open_model_file
from nkat.theta.set import truncate_rank
from tests.conftest import ROOT, Script
from tests.support.tiny_models import FURTHER_FAMILIES, write_tiny_model

GAMMA = 0.97
QUICK = ["--fit-steps", "12", "--fit-batch", "2", "--fit-context", "48", "--fit-validate-every", "4"]
QUICK += ["--fit-start-steps", "1", "--fit-learning-rate", "0.02", "--fit-precision", "float32", "--no-cuda"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder / "tiny.gguf", "llama", blocks=2, qtype=gguf.GGMLQuantizationType.Q8_0)


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(default_text().content[:6000])
    return path


class Fixture:
    """A tiny model, its data, and fits on them that are quick enough to be run many times."""

    def __init__(self, path: Path) -> None:
        self.loaded = load_model(path)
        text = default_text()
        text = type(text)(text.name, text.content[:6000], text.sha256)
        learned, validation = split_validation(fit_text(self.loaded.tokenizer, text), text.name, 32)
        self.data = FitData(learned, validation.pick(slice(1)))
        self.names = adaptable_layers(self.loaded.tensors)
        self.shapes = [self.loaded.tensors[name].shape for name in self.names]

    def settings(self, **changes: object) -> FitSettings:
        values = {"rank": 2, "gamma": GAMMA, "steps": 8, "batch": 2, "context": 32, "warmup": 2, "learning_rate": 0.02}
        return FitSettings(**{**values, "validate_every": 4, **changes})

    def run(
        self,
        settings: FitSettings,
        *,
        data: FitData | None = None,
        state: FitState | None = None,
        stop_at: int | None = None,
        reference: torch.nn.Module | None = None,
        validator: torch.nn.Module | None = None,
        keep_activations: bool = False,
        loaded: LoadedModel | None = None,
    ) -> FitState:
        starts = {"zero": zero_start(self.shapes, settings.rank, settings.seed)}
        done: list[float] = []
        progress = Progress(lambda _, loss: done.append(loss), lambda: stop_at is not None and len(done) + 1 >= stop_at)
        return fit(
            (loaded or self.loaded).model,
            self.names,
            starts,
            data or self.data,
            settings,
            progress,
            state=state,
            reference=reference,
            validator=validator,
            keep_activations=keep_activations,
        )


@pytest.fixture(scope="module")
def tiny(model_path: Path) -> Fixture:
    return Fixture(model_path)


def validation_loss(tiny: Fixture, state: FitState, settings: FitSettings, rank: int | None = None) -> float:
    thetas = to_thetas(by_name(tiny.names, state.best_factors), settings.gamma)
    model = tiny.loaded.model
    if rank is not None:
        thetas = {name: type(t)(t.p[:, :rank], t.q[:, :rank], t.scale[:, :rank]) for name, t in thetas.items()}
    model.set_thetas(thetas)
    model.set_gamma(settings.gamma)
    loss = float(tiny.data.validation.score(model).mean())
    model.set_thetas({})
    return loss


@pytest.mark.isa
def test_a_fit_lowers_the_loss_on_text_it_has_not_seen(tiny: Fixture) -> None:
    settings = tiny.settings(steps=24)
    before = float(tiny.data.validation.score(tiny.loaded.model).mean())
    state = tiny.run(settings)
    after = validation_loss(tiny, state, settings)
    assert after < before - 0.3
    assert after == pytest.approx(state.best_nll, rel=1e-5)  # what was validated is what the file will hold
    assert [row["step"] for row in state.history] == list(range(4, 25, 4))
    assert float(tiny.data.validation.score(tiny.loaded.model).mean()) == before


@pytest.mark.parametrize(("arch", "options"), FURTHER_FAMILIES)
def test_every_kind_of_block_can_be_fitted(tmp_path: Path, arch: str, options: dict[str, Any]) -> None:
    """Caps, fused weights, keys of earlier blocks and the like have gradients, and every factor gets one."""
    tiny = Fixture(write_tiny_model(tmp_path / "tiny.gguf", arch, **options))
    settings = tiny.settings(steps=6, validate_every=6)
    state = tiny.run(settings)
    assert state.best_nll is not None
    assert state.best_nll < float(tiny.data.validation.score(tiny.loaded.model).mean()) - 0.02
    starts = [f for pair in zero_start(tiny.shapes, settings.rank, settings.seed) for f in pair]
    assert all(not torch.equal(a.cpu(), b) for a, b in zip(state.factors, starts, strict=True))


@pytest.mark.isa
def test_a_validator_finds_what_the_fitted_model_finds(tiny: Fixture) -> None:
    """The same steps and factors; its validations are those of the INT8 Θ, and of nothing else."""
    settings, validator = tiny.settings(), load_model(tiny.loaded)
    state, alone = tiny.run(settings, validator=validator.model), tiny.run(settings)
    assert all(torch.equal(a, b) for a, b in zip(state.factors, alone.factors, strict=True))
    found, expected = ([row["validation_nll"] for row in s.history] for s in (state, alone))
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found[-1] / found[0] - 1) > 1e-3
    assert float(tiny.data.validation.score(validator.model).mean()) == found[-1]
    validator.model.set_gamma(None)
    assert abs(float(tiny.data.validation.score(validator.model).mean()) - found[-1]) > 1e-3


@pytest.mark.isa
def test_a_fit_is_determined_by_its_seed(tiny: Fixture) -> None:
    first, again = (tiny.run(tiny.settings()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.factors, again.factors, strict=True))
    other = tiny.run(tiny.settings(seed=1))
    assert not torch.equal(first.factors[0], other.factors[0])


@pytest.mark.isa
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)])
def test_a_fit_by_kernels_learns_what_one_by_torch_learns(
    tiny: Fixture, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the losses, step after step; a fit from another seed is further away."""
    loaded = load_model(tiny.loaded, thetas={}, gamma=1.0, dtype=dtype)

    def losses(seed: int = 0) -> list[float]:
        state = tiny.run(tiny.settings(steps=6, validate_every=1, seed=seed), loaded=loaded)
        return [row[key] for row in state.history for key in ("loss", "validation_nll")]

    by_kernels, other = losses(), losses(seed=1)
    monkeypatch.setattr(learning, "operations_for", lambda x, dtype: Operations())
    monkeypatch.setattr(fit_loss, "_have_kernels", lambda *heads: False)
    by_torch = losses()
    assert by_kernels == pytest.approx(by_torch, rel=tolerance)
    assert by_kernels != by_torch
    assert other != pytest.approx(by_torch, rel=2 * tolerance)  # control


@pytest.mark.isa
def test_keeping_changes_no_bit(tiny: Fixture) -> None:
    """So that a fit may go on where there is another amount of room."""
    slow = tiny.run(tiny.settings())
    kept = load_model(tiny.loaded, thetas={}, gamma=1.0, dtype=tiny.loaded.model.output.dtype)
    for layer in kept.model.multipliers().values():
        layer.keep_weight()
    assert all(layer.dense is not None for layer in kept.model.star_linears().values())
    for fast in (tiny.run(tiny.settings(), keep_activations=True), tiny.run(tiny.settings(), loaded=kept)):
        assert all(torch.equal(a, b) for a, b in zip(slow.factors, fast.factors, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize("stop_at", [1, 5])
def test_going_on_is_bit_exact(tiny: Fixture, tmp_path: Path, stop_at: int) -> None:
    settings = tiny.settings()
    whole = tiny.run(settings)
    part = tiny.run(settings, stop_at=stop_at)
    assert part.step == stop_at
    save_state(tmp_path / "s", part, "id")
    resumed = tiny.run(settings, state=load_state(tmp_path / "s", "id"))
    assert resumed.step == whole.step
    assert all(torch.equal(a, b) for a, b in zip(resumed.factors, whole.factors, strict=True))
    assert not torch.equal(part.factors[0], whole.factors[0])  # control


@pytest.mark.isa
def test_gamma_only_scales_the_result(tiny: Fixture) -> None:
    weak, strong = tiny.settings(gamma=0.99), tiny.settings(gamma=0.90)
    a, b = tiny.run(weak), tiny.run(strong)
    assert all(torch.equal(x, y) for x, y in zip(a.factors, b.factors, strict=True))
    assert validation_loss(tiny, a, weak) == pytest.approx(validation_loss(tiny, b, strong), rel=1e-5)


def test_nested_ranks_are_better_when_cut(tiny: Fixture) -> None:
    """Of 16 learned columns the first alone is worth more when it was sometimes alone in training."""
    losses = {}
    for nested in (False, True):
        settings = tiny.settings(rank=16, steps=32, nested=nested, learning_rate=0.01)
        losses[nested] = validation_loss(tiny, tiny.run(settings), settings, rank=1)
    assert losses[True] < losses[False] - 0.02


def test_keeping_holds_the_model_on_the_second_text(tiny: Fixture) -> None:
    """Fitted on the text, held on random tokens: there the predictions stay nearer to the unmodified model's."""
    tokens = torch.randint(tiny.loaded.config.vocab_size, (600,), generator=torch.Generator().manual_seed(5))
    elsewhere = FitText(tokens, torch.zeros(600, dtype=torch.bool), None)
    probe = tokens[:128][None]
    model = tiny.loaded.model
    with torch.inference_mode():
        unmodified = model(probe).log_softmax(-1)
    divergence = {}
    for weight in (0.0, 3.0):
        settings = tiny.settings(steps=16, keep_weight=weight)
        state = tiny.run(settings, data=FitData(tiny.data.text, tiny.data.validation, elsewhere))
        model.set_thetas(to_thetas(by_name(tiny.names, state.best_factors), GAMMA))
        model.set_gamma(GAMMA)
        with torch.inference_mode():
            changed = model(probe).log_softmax(-1)
        model.set_thetas({})
        divergence[weight] = float((unmodified.exp() * (unmodified - changed)).sum(-1).mean())
    assert 0 < divergence[3.0] < 0.7 * divergence[0.0]


def test_a_reference_is_imitated(tiny: Fixture, tmp_path: Path) -> None:
    """The target is another model's prediction: the loss, its divergence, falls; imitating oneself changes nothing."""
    other = load_model(write_tiny_model(tmp_path / "o.gguf", "llama", seed=3, blocks=2)).model
    state = tiny.run(tiny.settings(steps=24, reference_share=1.0), reference=other)
    assert state.history[-1]["loss"] < state.history[0]["loss"] - 0.5
    same = tiny.run(tiny.settings(reference_share=1.0), reference=tiny.loaded.model)
    assert same.history[-1]["loss"] < 0.05 * state.history[0]["loss"]


def test_the_best_start_is_taken(tiny: Fixture) -> None:
    good = tiny.run(tiny.settings(steps=16))
    found = list(by_name(tiny.names, good.best_factors).values())
    settings = tiny.settings(start_steps=1)
    progress = Progress(lambda *_: None, lambda: False)
    starts = {"zero": zero_start(tiny.shapes, 2, 0), "found": found}
    assert fit(tiny.loaded.model, tiny.names, starts, tiny.data, settings, progress).start == "found"
    bad = [(100 * p, 100 * q) for p, q in found]
    starts = {"zero": zero_start(tiny.shapes, 2, 0), "found": bad}
    assert fit(tiny.loaded.model, tiny.names, starts, tiny.data, settings, progress).start == "zero"


@pytest.mark.isa
def test_the_start_that_is_taken_goes_on_from_its_trial(tiny: Fixture) -> None:
    settings = tiny.settings(start_steps=3)
    bad = [(1000 * p, q + 1000) for p, q in zero_start(tiny.shapes, 2, 0)]
    starts = {"bad": bad, "zero": zero_start(tiny.shapes, 2, 0)}
    steps: list[FitState | None] = []
    progress = Progress(lambda state, _: steps.append(state), lambda: False)
    tried = fit(tiny.loaded.model, tiny.names, starts, tiny.data, settings, progress)
    assert [state is None for state in steps] == [True] * 6 + [False] * 5  # three steps of eight are not done again
    alone = tiny.run(settings)
    assert all(map(torch.equal, tried.factors, alone.factors))
    assert not any(map(torch.equal, tried.factors, tiny.run(tiny.settings(seed=1)).factors))


def test_patience_ends_a_fit_that_no_longer_gains(tiny: Fixture) -> None:
    assert tiny.run(tiny.settings(steps=40, validate_every=1, patience=2, learning_rate=1e-9)).step < 12
    assert tiny.run(tiny.settings(steps=12, validate_every=1, patience=0, learning_rate=1e-9)).step == 12


def test_a_loss_that_is_no_number_ends_with_advice(tiny: Fixture) -> None:
    with pytest.raises(NKATError, match=r"not a finite number at step .*learning rate"):
        tiny.run(tiny.settings(learning_rate=1e30, clip=1e30, steps=40))


def test_state_of_another_fit_is_refused(tmp_path: Path) -> None:
    identity = run_identity({"steps": 1})
    assert identity != run_identity({"steps": 2})
    save_state(tmp_path / "s", FitState("zero", 0, [torch.zeros(2, 1), torch.zeros(2, 1)]), identity)
    assert load_state(tmp_path / "s", identity).start == "zero"
    with pytest.raises(NKATError, match="other files or settings"):
        load_state(tmp_path / "s", run_identity({"steps": 2}))
    (tmp_path / "s").write_bytes(b"no zip file")
    with pytest.raises(NKATError, match="is not the state of a fit: it does not begin as"):
        load_state(tmp_path / "s", identity)


def test_two_processes_are_one_with_the_doubled_batch(
    model_path: Path, text_path: Path, tmp_path: Path, script: Script
) -> None:
    """torchrun with two gloo processes of two sequences each, against one process with four, and with two."""
    common = ["--input", model_path, "--theta-only", "--theta-source", "fit", "--calibrate", text_path]
    common += ["--theta-rank", 2, *QUICK, "--fit-start", "zero", "--threads", 1]
    one, two, half = (tmp_path / name for name in ("one.bin", "two.bin", "half.bin"))
    assert script("nkat_gguf_converter.py", *common, "--fit-batch", 4, "--output", one).returncode == 0
    assert script("nkat_gguf_converter.py", *common, "--output", half).returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, ROOT / "nkat_gguf_converter.py", *common, "--output", two]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    first = [next(iter(open_model_file(path).theta.layers.values())).factors()[0] for path in (one, two, half)]
    rounding = 2 * float(first[0].abs().max()) / 127  # the sums' order differs, which can move an INT8 by one
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=rounding)
    assert not torch.allclose(first[0], first[2], rtol=0, atol=rounding)


def test_a_fit_records_itself_with_its_model_and_measures_no_more_than_asked(
    model_path: Path, text_path: Path, tmp_path: Path, script: Script, monkeypatch
) -> None:
    output, record = tmp_path / "fitted.nkat", tmp_path / "record.json"
    command = ("nkat_gguf_converter.py", "--input", model_path, "--theta-source", "fit", "--calibrate", text_path)
    command += ("--theta-rank", 2, "--json", record, *QUICK)

    def interrupted(*_: object) -> None:
        assert output.exists()
        fit = json.loads(record.read_text())["fit"]
        assert fit["heldout_change_percent"] < 0
        assert fit["heldout_divergence"]["kl"]["mean"] > 0
        raise KeyboardInterrupt

    monkeypatch.setattr("nkat.convert.job.measure_strengths", interrupted)
    done = script(*command, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "on the part of the text that was kept back" in done.stdout
    assert "KL divergence from the model without Θ" in done.stdout
    assert "report" not in json.loads(record.read_text())
    done = script(*command, "--output", output, "--force", "--strengths")
    assert done.returncode == 130
    said = done.stderr.splitlines()[-1]  # what Ctrl-C leaves is named
    assert said.startswith("interrupted; what was finished before is there: ")
    assert str(output) in said
    assert str(record) in said


def test_a_fit_follows_the_models_context(text_path: Path, tmp_path: Path, script: Script) -> None:
    short = write_tiny_model(tmp_path / "short.gguf", "llama", context=64)
    command = ("nkat_gguf_converter.py", "--input", short, "--output", tmp_path / "out.nkat", "--theta-source", "fit")
    command += ("--calibrate", text_path, "--theta-rank", 2, *QUICK[:4], *QUICK[6:])  # without its --fit-context
    done = script(*command, "--fit-context", 65)
    assert done.returncode == 2
    assert "--fit-context: 65 tokens are more than the 64 that the model was made for" in done.stderr
    done = script(*command, "--json", tmp_path / "record.json")
    assert "warning: the model was made for 64 tokens: chunks have as many" in done.stderr
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["fit"]["settings"]["context"] == 64
    assert record["fit"]["validation_tokens"] % 31 == 0  # of 64, the last 31 are scored


def test_the_converter_fits(model_path: Path, text_path: Path, tmp_path: Path, script: Script) -> None:
    output, record = tmp_path / "fitted.nkat", tmp_path / "record.json"
    done = script(
        *("nkat_gguf_converter.py", "--input", model_path, "--output", output, "--theta-source", "fit"),
        *(
            "--layout",
            "appended",
            "--calibrate",
            text_path,
            "--calibrate-ignore",
            "the",
            "--theta-rank",
            3,
            "--theta-gamma",
            GAMMA,
            "--json",
            record,
            "--strengths",
            *QUICK,
        ),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(record.read_text())
    assert result["fit"]["heldout_change_percent"] < -5
    assert result["fit"]["kept_step"] == result["metadata"]["nkat.fit.kept_step"]
    assert [row["gamma"] for row in result["report"]["gammas"]] == [round(0.9 + i / 100, 2) for i in range(10)] + [1.0]
    assert not output.with_name("fitted.nkat.fit").exists()
    thetas = open_model_file(output).theta
    assert thetas.source == "fit"
    made_for = next(row for row in result["report"]["gammas"] if row["gamma"] == GAMMA)
    # Two chunks were kept back: both figures are of the same tokens, those that are not ignored.
    assert made_for["change_percent"] == pytest.approx(result["fit"]["heldout_change_percent"], rel=1e-6)
    cut = tmp_path / "cut.nkat"
    done = script("nkat_gguf_converter.py", "--input", output, "--output", cut, "--truncate-rank", 2, "--theta-only")
    assert done.returncode == 0, done.stderr
    expected = truncate_rank(thetas, 2)
    found = open_model_file(cut).theta
    assert found.rank == 2
    assert "nkat.heldout.tokens" in thetas.notes  # measured with all columns, so not true of fewer
    assert not any(key.startswith("nkat.heldout") for key in found.notes)
    assert all(torch.equal(found.layers[name].p, theta.p) for name, theta in expected.layers.items())
    done = script(
        *(
            "nkat_inference_engine.py",
            "--model",
            output,
            "--perplexity",
            "--text",
            text_path,
            "--chunks",
            1,
            "--no-cuda",
        )
    )
    assert done.returncode == 2
    assert "was made from that very text" in done.stderr


def test_interrupted_fits_keep_the_best_and_go_on(
    model_path: Path, text_path: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C writes what there is; --resume goes on to what an uninterrupted fit would have made."""
    arguments = ["--input", model_path, "--theta-source", "fit", "--calibrate", text_path, "--theta-rank", 2]
    arguments += ["--theta-only", *QUICK, "--fit-start", "zero", "--threads", 1]
    arguments += ["--fit-steps", 60, "--fit-validate-every", 10]
    output, whole = tmp_path / "a.bin", tmp_path / "b.bin"
    steps, take_step = 0, descent.take_step

    def ctrl_c_in_step_17(*given: Any) -> bool:
        nonlocal steps
        steps += 1
        if steps == 17:
            signal.raise_signal(signal.SIGINT)
        return take_step(*given)

    monkeypatch.setattr(descent, "take_step", ctrl_c_in_step_17)
    first = script("nkat_gguf_converter.py", *arguments, "--output", output)
    assert first.returncode == 130, first.stderr
    assert open_model_file(output).theta.notes["nkat.fit.unfinished"]
    state = output.with_name("a.bin.fit")
    assert state.exists()
    kept = state.read_bytes()
    refused = script("nkat_gguf_converter.py", *arguments, "--output", output)
    assert refused.returncode == 2
    assert state.read_bytes() == kept
    for target, more in ((output, ["--resume"]), (whole, [])):
        done = script("nkat_gguf_converter.py", *arguments, "--output", target, *more)
        assert done.returncode == 0, done.stderr
    assert not state.exists()
    resumed, uninterrupted = (open_model_file(path).theta.layers for path in (output, whole))
    assert all(torch.equal(resumed[name].p, theta.p) for name, theta in uninterrupted.items())
    assert all(torch.equal(resumed[name].scale, theta.scale) for name, theta in uninterrupted.items())


def test_bad_input_leaves_the_previous_output(
    model_path: Path, text_path: Path, tmp_path: Path, script: Script
) -> None:
    def fails(*command: object) -> str:
        done = script(*command)
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr
        return done.stderr.rpartition("error: ")[2]  # behind what is left of a progress bar

    output, short, other = tmp_path / "x.nkat", tmp_path / "short.txt", tmp_path / "other.gguf"
    odd = tmp_path / "odd.txt"
    odd.write_text("and the " * 700 + "9QZ" * 330)  # what is learned from the first part misleads about the last
    output.write_bytes(b"what was there")
    short.write_text("too short")
    write_tiny_model(other, "llama", blocks=3)
    base = ["nkat_gguf_converter.py", "--input", model_path, "--output", output, "--force", *QUICK]
    base += ["--theta-source", "fit", "--calibrate"]
    assert "too short: it has" in fails(*base, short)
    assert "are the same text" in fails(*base, text_path, "--keep", text_path)
    assert "no such text file" in fails(*base, tmp_path / "none.txt")
    assert "is not the same model: block_count is 3" in fails(*base, text_path, "--reference", other)
    assert "coupling is 0" in fails(*base, text_path, "--theta-gamma", "1")
    assert "not a finite number" in fails(*base, text_path, "--fit-learning-rate", "1e30", "--fit-clip", "1e30")
    assert "no step of the fit beats" in fails(*base, odd, "--theta-gamma", "0.97", "--fit-learning-rate", "0.3")
    assert "there is no interrupted fit" in fails(*base, text_path, "--resume")
    assert "must lie between 0 and 1" in fails(*base, text_path, "--fit-int8-share", "2")
    assert output.read_bytes() == b"what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.txt", "other.gguf", "short.txt", "x.nkat"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--theta-source", "fit"], "needs --calibrate"),
        (["--fit-steps", "3"], "--fit-steps is for --theta-source fit"),
        (["--keep", "k.txt"], "--keep is for --theta-source fit"),
        (["--theta-source", "fit", "--calibrate", "c.txt", "--depth-decay"], "are not for --theta-source fit"),
        (["--theta-source", "fit", "--calibrate", "c.txt", "--fit-reference-share", "1"], "needs --reference"),
        (["--truncate-rank", "2", "--theta-rank", "4"], "--truncate-rank write a Θ that there is"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: list[str], message: str, model_path: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    assert message in fails("nkat_gguf_converter.py", "--input", model_path, "--output", tmp_path / "o", *flags)


def test_truncating_needs_a_theta_of_that_rank(model_path: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    command = ["nkat_gguf_converter.py", "--input", model_path, "--output", tmp_path / "o", "--truncate-rank", "2"]
    assert "holds no Θ" in fails(*command)
