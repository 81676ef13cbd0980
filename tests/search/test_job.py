"""The search over Θ: what a trial measures, and the optimiser as a user runs it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gguf
import optuna
import psutil
import pytest
import torch

from nkat.engine.scoring import KeptScorer, make_scorer
from nkat.lm.load import load_model
from nkat.measure.judge import Judge
from nkat.measure.perplexity import paired, score_chunks
from nkat.measure.texts import Text, default_text
from nkat.measure.tpe import byte_ratio, tpe
from nkat.search.objective import (
    GUIDE_DEFAULT,
    OverheadLimit,
    Setting,
    SettingJudge,
    Space,
    apply_setting,
    log_tpe,
    make_objective,
    patterns_of,
)
from nkat.search.report import what_came_out
from nkat.sources.make import describe_theta_set, make_thetas
from nkat.sources.options import ThetaOptions
from nkat.study.space import key
from nkat.theta.layers import select_layers
from nkat.theta.modelfile import open_model_file
from nkat.theta.set import ThetaSet
from tests.conftest import ROOT
from tests.support.processes import words_of
from tests.support.tiny_models import write_tiny_model

OPTIMIZER = "nkat_auto_optimizer.py"


def make_set(path: Path, rank: int) -> ThetaSet:
    model = open_model_file(path)
    names = select_layers(model.base.tensors, None)
    options = ThetaOptions(rank=rank)
    return describe_theta_set(model, make_thetas(model.base.file, names, options), options, "0" * 64)


@pytest.fixture(scope="module")
def judge(stories: Path) -> SettingJudge:
    loaded = load_model(stories)
    text = "Once upon a time there was a little dog. He liked to play with a red ball in the garden. " * 150
    return SettingJudge(Judge.open(loaded, Text("dogs", text, ""), 6), make_set(stories, 8))


@pytest.mark.isa
def test_a_trial_measures_what_the_written_model_would(judge: SettingJudge) -> None:
    setting = Setting(rank=4, gamma=0.93, layers="attention", depth_decay=True)
    measured = judge.measure(setting)
    chosen = apply_setting(judge.theta_set, setting)
    assert all("attn_" in name for name in chosen.layers)
    assert chosen.rank == 4
    by_hand = load_model(judge.judge.loaded.gguf.path, thetas=chosen.layers, gamma=0.93)
    nll = score_chunks(by_hand.model, judge.judge.passages.chunks)
    torch.testing.assert_close(measured.perplexity.nll, nll, atol=1e-5, rtol=4e-6)
    other = judge.measure(Setting(4, 0.93, "attention", depth_decay=False))
    assert not torch.allclose(other.perplexity.nll, nll, atol=1e-5)  # control
    assert measured.change.percent == paired(judge.base().perplexity, measured.perplexity).percent


def test_decay_scales_blocks_by_powers_of_gamma(judge: SettingJudge) -> None:
    plain = apply_setting(judge.theta_set, Setting(8, 0.9, "both", False)).layers
    decayed = apply_setting(judge.theta_set, Setting(8, 0.9, "both", True))
    for name, theta in decayed.layers.items():
        block = int(name.split(".")[1])
        torch.testing.assert_close(theta.factors()[0], plain[name].factors()[0] * 0.9**block)
        assert torch.equal(theta.factors()[1], plain[name].factors()[1])
    assert decayed.notes["nkat.theta.depth_decay"] == 0.9


def test_chunk_scores_average_to_the_trials_score(judge: SettingJudge) -> None:
    """What the pruner compares must be the objective: the mean of ln TPE over chunks is ln TPE."""
    reported = []
    setting = Setting(2, 0.95, "ffn", False)
    measured = judge.measure(setting, lambda chunk, value: reported.append((chunk, value)))
    ratio = byte_ratio(judge.judge.loaded.tensors, apply_setting(judge.theta_set, setting).nbytes)
    score = torch.tensor([value for _, value in reported], dtype=torch.float64).mean().exp()
    assert float(score) == pytest.approx(tpe(measured.perplexity.ppl, ratio), rel=1e-9)
    assert [chunk for chunk, _ in reported] == judge.order
    assert sorted(judge.order) == list(range(6)) != judge.order
    assert log_tpe(2.0, 1.0) == -2.0 > log_tpe(2.0, 1.1)


def test_another_strength_makes_nothing_anew(judge: SettingJudge, monkeypatch) -> None:
    made: list[int] = []

    def counting(model, batch: int, context: int):
        made.append(batch)
        return make_scorer(model, batch, context)

    monkeypatch.setattr("nkat.engine.scoring.make_scorer", counting)
    own = SettingJudge(Judge(judge.judge.loaded, judge.judge.passages, make=KeptScorer(4)), judge.theta_set)
    assert own.base().tpe == judge.base().tpe
    made.clear()
    first = own.score(Setting(4, 0.97, "both", depth_decay=False))
    again = own.score(Setting(4, 0.93, "both", depth_decay=False))
    assert made == [4]  # for 6 chunks in two groups, and two strengths
    assert first.tpe != again.tpe
    for setting, found in ((Setting(4, 0.97, "both", False), first), (Setting(4, 0.93, "both", False), again)):
        assert judge.score(setting).tpe == pytest.approx(found.tpe, rel=1e-12)  # the chunks in another order
    own.score(Setting(4, 0.93, "both", depth_decay=True))
    assert made[0] == 4
    assert len(made) == 2


def test_hopeless_trials_stop_early_and_good_ones_do_not(judge: SettingJudge) -> None:
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.WilcoxonPruner(n_startup_steps=3))

    def run_one(gamma: float, strength: float) -> optuna.trial.FrozenTrial:
        layers = {name: replace(t, scale=strength * t.scale) for name, t in judge.theta_set.layers.items()}
        own = SettingJudge(judge.judge, replace(judge.theta_set, layers=layers))
        study.enqueue_trial({**GUIDE_DEFAULT, "gamma": gamma})
        study.optimize(make_objective(own, Space()), n_trials=1)
        return study.trials[-1]

    assert run_one(0.90, 40.0).state.name == "COMPLETE"  # ruins the model, but there is nothing to compare it with
    assert run_one(0.97, 1.0).state.name == "COMPLETE"  # better than that
    hopeless = run_one(0.91, 40.0)
    assert hopeless.state.name == "PRUNED"
    assert len(hopeless.intermediate_values) < len(judge.order)


def test_the_overhead_is_a_constraint(judge: SettingJudge) -> None:
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial(GUIDE_DEFAULT)
    limit = OverheadLimit(-99.0, judge.judge.loaded.model, judge.judge.passages.chunks[0, :16])  # nobody can be so fast
    study.optimize(make_objective(judge, Space(), limit), n_trials=1)
    trial = study.trials[0]
    assert trial.constraints["overhead"] == pytest.approx(trial.user_attrs["overhead_percent"] + 99)
    assert trial.constraints["overhead"] > 0


def run(script, *arguments: object) -> tuple[dict, str]:
    done = script(OPTIMIZER, *arguments, "--chunks", 2, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_quick_writes_the_guides_files(script, tmp_path: Path, stories: Path) -> None:
    out = tmp_path / "quick"
    record, stdout = run(script, "--model", stories, "--mode", "quick", "--output-dir", out, "--force")
    history = json.loads((out / "optimization_history.json").read_text())["trials"]
    assert len(history) == 12
    assert history[0]["parameters"] == {}
    assert history[0]["change_percent"] == 0
    assert history[1]["parameters"] == GUIDE_DEFAULT
    for row in history:
        if row["state"] == "COMPLETE":
            assert row["tpe"] == pytest.approx(row["value"]) == tpe(row["perplexity"], row["byte_ratio"])
            assert row["seconds"] > 0
    assert json.loads((out / "optuna_study.json").read_text())["held_out"] == record["held_out"]
    assert (out / "optimization_results.png").read_bytes().startswith(b"\x89PNG")
    page, card = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    assert base64.b64encode((out / "optimization_results.png").read_bytes()).decode() in page
    assert record["optimal"]["command"] in html.unescape(page)
    assert record["model_sha256"] in page
    assert record["optimal"]["sha256"] == hashlib.sha256(Path(record["optimal"]["file"]).read_bytes()).hexdigest()
    held = record["optimal"]["held_out"]
    gain = f"{held['change_percent']:+.3f} % ± {held['change_percent_stderr']:.3f}"
    assert gain in card
    assert "no text was learned" in card
    assert card.count("Not measured") == 1  # without a text to learn from there is no guard
    assert record["gamma_range"] == [0.9, 0.99]
    assert ("was searched (0.90 to 0.99)" in stdout) == (record["optimal"]["setting"]["gamma"] in (0.9, 0.99))
    assert record["held_out_chunks"] == 4
    assert "divergence" not in record["held_out"]["base"]
    for row in record["held_out"]["best"]:
        kl = row["divergence"]["kl"]
        assert kl["mean"] > 0
        assert f"{kl['mean']:.5f} ± {kl['stderr']:.5f}" in stdout
        assert 0 < row["divergence"]["same_top_percent"] <= 100
    assert stdout.index("held-out:") < stdout.index("trials completed")

    optimal = record["optimal"]
    setting = optimal["setting"]
    path = out / f"optimal_rank{setting['rank']}_gamma{setting['gamma']:.2f}.nkat"
    assert path == Path(optimal["file"])
    assert json.loads(path.with_suffix(".json").read_text()) == optimal
    # One trial has one figure, which is that of the file.
    assert record["held_out"]["best"][0] == {"trial": optimal["trial"], **optimal["held_out"]}
    assert f"{optimal['held_out']['tpe']:.6f}" in stdout
    same = out / "optimal.nkat"
    assert str(same) == optimal["same_file"]
    assert same.samefile(path)
    assert json.loads((out / "optimal.json").read_text()) == optimal
    # The command runs as it is recorded, from any folder.
    before = path.read_bytes()
    path.write_bytes(b"")
    done = subprocess.run(optimal["command"], shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == before


def test_a_seed_gives_the_same_search(script, tmp_path: Path, stories: Path) -> None:
    def trials(name: str, seed: int) -> list:
        arguments = ("--mode", "custom", "--trials", 6, "--output-dir", tmp_path / name, "--seed", seed)
        run(script, "--model", stories, *arguments)
        rows = json.loads((tmp_path / name / "optimization_history.json").read_text())["trials"]
        return [(row["parameters"], row["value"], row["state"]) for row in rows]

    assert trials("a", 3) == trials("b", 3) != trials("c", 4)


def test_targets_fix_one_and_search_the_rest(script, tmp_path: Path, stories: Path) -> None:
    for flag, value, name in (("--target-rank", 6, "rank"), ("--target-gamma", 0.95, "gamma")):
        out = tmp_path / name
        run(script, "--model", stories, "--mode", "custom", "--trials", 6, flag, value, "--output-dir", out)
        rows = json.loads((out / "optimization_history.json").read_text())["trials"][1:]
        assert {row["parameters"][name] for row in rows} == {value}
        other = "gamma" if name == "rank" else "rank"
        assert len({row["parameters"][other] for row in rows}) > 1


def test_resume_continues_and_nothing_is_replaced_unasked(script, fails, tmp_path: Path, stories: Path) -> None:
    common = ["--model", stories, "--output-dir", tmp_path / "o", "--mode", "custom"]
    run(script, *common, "--trials", 3)
    message = fails(OPTIMIZER, *common, "--trials", 5, "--chunks", 2)
    assert "exists already with 3 trials: give --resume" in message
    record, _ = run(script, *common, "--trials", 5, "--resume")
    assert sum(record["trials"].values()) == 5
    refused = script(OPTIMIZER, *common, "--trials", 6, "--resume", "--chunks", 3)
    assert (refused.returncode, "was made with another chunks" in refused.stderr) == (2, True)


def test_workers_share_a_study_and_try_nothing_twice(script, tmp_path: Path, stories: Path) -> None:
    out = tmp_path / "o"
    run(script, "--model", stories, "--mode", "custom", "--trials", 100, "--workers", 2, "--output-dir", out)
    rows = json.loads((out / "optimization_history.json").read_text())["trials"]
    assert [row["number"] for row in rows] == list(range(len(rows)))
    finished = [row for row in rows if row["state"] in ("COMPLETE", "PRUNED")]
    assert len(finished) >= 100
    assert len({row["worker"] for row in finished}) == 2
    assert len({tuple(row["parameters"].items()) for row in finished}) == len(finished)


def test_a_small_space_is_used_up_and_the_search_says_so(script, tmp_path: Path, stories: Path) -> None:
    common = ["--model", stories, "--output-dir", tmp_path, "--mode", "full", "--chunks", 2]
    done = script(OPTIMIZER, *common, "--target-rank", 2, "--target-gamma", 0.95)
    assert "every setting that may be tried was tried" in done.stderr
    summary = json.loads((tmp_path / "optuna_study.json").read_text())
    assert summary["space_used_up"] is True
    rows = json.loads((tmp_path / "optimization_history.json").read_text())["trials"]
    assert [row["state"] for row in rows].count("REPEATED") == 0
    assert len({tuple(row["parameters"].items()) for row in rows}) == len(rows) == 1 + 3 * 2  # layers and decay


def test_an_end_of_the_range_is_known_where_there_is_one() -> None:
    assert [Space().edge(gamma) for gamma in (0.90, 0.91, 0.99)] == ["lowest", None, "highest"]
    assert Space(gamma=0.9).edge(0.9) is None  # the user's choice, and no end
    assert Space.of_learned((8,), None).edge(0.995) == "highest"


def test_the_list_of_settings_is_what_trials_draw_from() -> None:
    learned = Space.of_learned((2, 4, 6, 8), None)
    assert len(learned.first()) == 4
    assert Space.of_learned((8,), 0.97).first() == [{**GUIDE_DEFAULT, "rank": 8}]
    spaces = ((Space(), 4 * 10 * 3 * 2), (Space((2,), None), 60), (Space(gamma=0.905), 24), (learned, 4 * 10 * 3 * 2))
    for space, count in spaces:
        listed = {key(point) for point in space.points()}
        assert len(listed) == count
        study = optuna.create_study()
        for _ in range(30):
            trial = study.ask()
            space.suggest(trial)
            assert key(trial.params) in listed
        assert all(key(point) in listed for point in space.first())
        assert space.first()[0] == space.guide_default()


def test_the_layers_of_a_group_are_all_layers_of_its_kind(tmp_path: Path) -> None:
    """Also of a model with other blocks; a pattern that matches nothing, which the converter refuses, is left out."""
    for arch, attention in (("qwen35", 3 * 3 + 4), ("llama", 3 * 4)):
        tensors = open_model_file(write_tiny_model(tmp_path / "m.gguf", arch)).require_base().tensors
        names = select_layers(tensors, None)
        chosen = {layers: select_layers(tensors, patterns_of(layers, names)) for layers in ("attention", "ffn", "both")}
        assert len(chosen["attention"]) == attention
        assert {*chosen["attention"], *chosen["ffn"]} == {*chosen["both"]} == {*names}
        assert not {*chosen["attention"]} & {*chosen["ffn"]}


def test_another_models_reports_are_not_replaced_unasked(script, fails, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(default_text().content[:20000], encoding="utf-8")
    first, second = (write_tiny_model(tmp_path / f"{name}.gguf", "llama") for name in ("first", "second"))
    common = ["--text", text, "--chunks", 2, "--mode", "custom", "--trials", 2, "--output-dir", out]
    assert script(OPTIMIZER, "--model", first, *common, "--force").returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "optimal_rank4_gamma0.97.nkat" in before
    message = fails(OPTIMIZER, "--model", second, *common)
    assert "holds another search, 'nkat-first'; give another --output-dir, or --force" in message
    assert "there is no study 'nkat-second' to resume" in fails(OPTIMIZER, "--model", second, *common, "--resume")
    elsewhere = ["--storage", tmp_path / "elsewhere.journal"]  # the same name, and yet another search
    assert "holds another search" in fails(OPTIMIZER, "--model", first, *common, *elsewhere)
    (out / "optuna_study.json").write_text("{")
    assert "holds another search, 'unknown'" in fails(OPTIMIZER, "--model", first, *common, *elsewhere)
    (out / "optuna_study.json").write_bytes(before["optuna_study.json"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    moved = out.rename(tmp_path / "moved")  # its own reports it may replace, wherever they are
    done = script(OPTIMIZER, "--model", first, *common[:-1], moved, "--resume")
    assert done.returncode == 0, done.stderr
    optimal = moved / "optimal_rank4_gamma0.97.nkat"
    assert f"note: {optimal} is from an earlier report, and not the best any more" in done.stderr  # without --force


def test_there_must_be_something_to_resume(fails, tmp_path: Path) -> None:
    model, out = write_tiny_model(tmp_path / "tiny.gguf", "llama"), tmp_path / "out"
    message = fails(OPTIMIZER, "--model", model, "--output-dir", out, "--resume")
    assert f"{out / 'study.journal'}: there is no study 'nkat-tiny' to resume" in message
    assert not out.exists()
    text = tmp_path / "short.txt"
    text.write_text("too short")
    assert "too short" in fails(OPTIMIZER, "--model", model, "--output-dir", out / "deeper", "--text", text)
    assert not out.exists()  # what was made for nothing is gone again


def test_other_machines_join_by_the_studys_name(script, tmp_path: Path, stories: Path) -> None:
    shared = ("--storage", f"sqlite:///{tmp_path}/shared.db", "--study-name", "s", "--mode", "custom")
    run(script, "--model", stories, *shared, "--trials", 3, "--output-dir", tmp_path / "here")
    record, _ = run(script, "--model", stories, *shared, "--trials", 5, "--output-dir", tmp_path / "there")
    assert record["trials"]["COMPLETE"] + record["trials"]["PRUNED"] == 5
    assert not (tmp_path / "there" / "study.journal").exists()


def test_no_theta_that_loses_is_written(script, fails, tmp_path: Path, stories: Path) -> None:
    """γ = 0.99 and every byte counted: on this model Θ costs more than it gives."""
    out = tmp_path / "o"
    arguments = ("--mode", "custom", "--trials", 3, "--target-rank", 8, "--target-gamma", 0.99)
    record, stdout = run(script, "--model", stories, *arguments, "--output-dir", out)
    assert record["optimal"] is None
    assert "no Θ beats the model without it: none was written" in stdout
    assert [path.name for path in out.glob("optimal*")] == ["optimal.json"]
    said = fails("nkat_inference_engine.py", "--model", out / "optimal_rank4_gamma0.97.nkat", "--compare")
    assert said.endswith(f"the search in {out} wrote none, because no Θ beats the model without it")
    assert (out / "optimization_history.json").exists()


def test_ctrl_c_ends_at_once_and_says_what_there_is(script, tmp_path: Path, stories: Path) -> None:
    out = tmp_path / "o"
    words = ["--model", stories, "--mode", "custom", "--chunks", 2, "--output-dir", out]
    command = [sys.executable, str(ROOT / OPTIMIZER), *map(str, words), "--trials", "5000"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = out / "study.journal"
    while child.poll() is None and not (journal.exists() and '"worker"' in journal.read_text()):
        child.stderr.read(1)
    child.send_signal(signal.SIGINT)
    stdout, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    assert f"interrupted; finished trials are in {journal}, --resume goes on from there" in errors
    assert "nothing was written" not in errors
    assert "held-out:" not in stdout
    assert "no Θ beats" not in stdout
    assert ("best so far: trial" in stdout) != ("no Θ was measured to its end yet" in stdout)
    summary = json.loads((out / "optuna_study.json").read_text())
    assert (summary["interrupted"], summary["held_out"], summary["optimal"]) == (True, None, None)
    rows = json.loads((out / "optimization_history.json").read_text())["trials"]
    assert not any(row["state"] == "RUNNING" for row in rows)
    record, _ = run(script, *words[:6], "--output-dir", out, "--trials", len(rows) + 2, "--resume")
    assert record["interrupted"] is False
    finished = json.loads((out / "optimization_history.json").read_text())["trials"]
    tried = [tuple(row["parameters"].items()) for row in finished if row["state"] in ("COMPLETE", "PRUNED")]
    assert len(tried) == len(set(tried)) == len(rows) + 2
    assert () in tried  # the model without Θ, whenever it was interrupted


def test_ctrl_c_while_judging_and_once_more(script, tmp_path: Path, monkeypatch) -> None:
    """The trials are reported without a judgement; and a second one says what there is, too."""
    model, text = write_tiny_model(tmp_path / "tiny.gguf", "llama"), tmp_path / "text.txt"
    text.write_text(default_text().content[:20000], encoding="utf-8")
    out = tmp_path / "out"
    common = ["--model", model, "--text", text, "--chunks", 2, "--mode", "custom", "--trials", 2, "--output-dir", out]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nkat.search.job.judge_best", interrupt)
    done = script(OPTIMIZER, *common, "--json", tmp_path / "record.json")
    assert done.returncode == 130
    assert "best so far: trial 1, rank 4, gamma 0.97, both: TPE" in done.stdout
    assert json.loads((tmp_path / "record.json").read_text())["best_trial"] is not None
    monkeypatch.setattr("nkat.search.job.write_records", interrupt)
    done = script(OPTIMIZER, *common, "--resume")
    assert done.returncode == 130
    said = f"interrupted; finished trials are in {out / 'study.journal'}, --resume goes on from there"
    assert done.stderr.splitlines()[-1] == said


def test_the_winner_is_explained_where_another_looks_better() -> None:
    def row(trial: int, value: float) -> dict:
        setting = Setting(2, 0.9, "both", False).parameters()
        figures = {"perplexity": 9.0, "perplexity_stderr": 0.1, "change_percent": -1.0, "change_percent_stderr": 0.1}
        return {"trial": trial, "setting": setting, "tpe": value, **figures}

    def said(base: float, best: list[float], won: bool, tried: bool = True, turned_away: int = 0) -> str:
        rows = [row(5 + i, value) for i, value in enumerate(best)]
        optimal = {"file": "x.nkat", "same_file": "optimal.nkat", "trial": 5, "held_out": rows[0]} if won else None
        counts = {"trials": {"COMPLETE": 4, "PRUNED": 0, "FAIL": 0}, "search_seconds": 1.0}
        counts |= {"turned_away": turned_away, "gamma_edge": None}
        base_row = {name: value for name, value in row(0, base).items() if name != "setting"}
        record = {"held_out_chunks": 4, "text": "t", "held_out": {"base": base_row, "best": rows}, "optimal": optimal}
        record |= counts
        return "\n".join(what_came_out(record, won, tried))

    better = said(0.1, [0.2, 0.15, 0.3], won=True)
    assert "on the held-out text trial 7 comes out ahead of trial 5; the trials' own chunks alone decide" in better
    assert "ahead of" not in said(0.1, [0.3, 0.2], won=True)  # control
    lost = said(0.25, [0.2, 0.3, 0.4], won=False)
    assert "trials 6 and 7 come out ahead" in lost
    assert "the best of the trials does not beat the model without it: none was written" in lost
    assert "no Θ beats the model without it: none was written" in said(0.5, [0.2], won=False)
    turned = said(0.5, [0.2], won=False, turned_away=2)
    assert "no Θ that the guard admits beats the model without it (2 trials were better at home; --no-guard" in turned
    assert "no Θ was tried, only the model without it" in said(0.1, [], won=False, tried=False)


def test_mistakes(fails, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", "llama")
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time there was a dog. " * 50)
    long = tmp_path / "long.txt"
    long.write_text(default_text().content[:20000], encoding="utf-8")
    common = ["--model", model, "--output-dir", tmp_path / "o"]
    assert "no such file" in fails(OPTIMIZER, "--model", tmp_path / "no.gguf", "--output-dir", tmp_path / "o")
    assert "too short" in fails(OPTIMIZER, *common, "--text", text)
    assert "--mode custom needs it" in fails(OPTIMIZER, *common, "--mode", "custom")
    assert "--trials goes with --mode custom" in fails(OPTIMIZER, *common, "--trials", 3)
    assert "needs --reference" in fails(OPTIMIZER, *common, "--theta-source", "residual")
    assert "needs --calibrate" in fails(OPTIMIZER, *common, "--theta-source", "fit")
    assert "--no-guard is for --theta-source fit" in fails(OPTIMIZER, *common, "--no-guard")
    assert "--calibrate are for" in fails(OPTIMIZER, *common, "--theta-source", "weight", "--calibrate", text)
    same = fails(OPTIMIZER, *common, "--calibrate", long, "--text", long)
    assert "the text to learn from and the text to judge on are the same" in same
    assert "Θ rank 100 is impossible" in fails(OPTIMIZER, *common, "--target-rank", 100)
    assert "gamma" in fails(OPTIMIZER, *common, "--target-gamma", 1.5)
    assert "storage" in fails(OPTIMIZER, *common, "--storage", "nosuch://x")
    assert "cannot be made a folder" in fails(OPTIMIZER, "--model", model, "--output-dir", text)
    assert "exists already; give --force" in fails(OPTIMIZER, *common, "--json", text)


def test_a_search_is_not_joined_with_another_reference(script, tmp_path: Path) -> None:
    """Trials on Θ from two references could not be compared; nor with another calibration text."""
    low = write_tiny_model(tmp_path / "low.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q4_0)
    high, other = (write_tiny_model(tmp_path / f"{seed}.gguf", "llama", seed=seed) for seed in (0, 1))
    text = tmp_path / "text.txt"
    text.write_text(default_text().content[:20000], encoding="utf-8")
    common = ["--model", low, "--theta-source", "residual", "--text", text, "--chunks", 2, "--mode", "custom"]
    common += ["--trials", 2, "--output-dir", tmp_path / "out", "--reference"]
    assert script(OPTIMIZER, *common, high).returncode == 0
    refused = script(OPTIMIZER, *common, other, "--resume")
    assert (refused.returncode, "reference_sha256" in refused.stderr) == (2, True)
    assert script(OPTIMIZER, *common, high, "--resume").returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_workers_end_with_a_main_process_that_is_killed(tmp_path: Path) -> None:
    model, text = write_tiny_model(tmp_path / "tiny.gguf", "llama"), tmp_path / "text.txt"
    text.write_text(default_text().content[:20000], encoding="utf-8")
    command = [sys.executable, ROOT / OPTIMIZER, "--model", model, "--text", text, "--chunks", 2, "--mode", "custom"]
    command += ["--trials", 100000, "--workers", 2, "--threads", 1, "--output-dir", tmp_path / "out"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([str(word) for word in command], **quiet) as main:
        deadline = time.monotonic() + 120
        worker: psutil.Process | None = None
        while worker is None and main.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            workers = psutil.Process(main.pid).children()
            worker = next((child for child in workers if "--join" in words_of(child)), None)
        assert worker is not None
        time.sleep(3)  # time to import, and to begin to watch
        assert worker.is_running()  # control: it does not end by itself
        main.kill()
    worker.wait(60)  # raises TimeoutExpired
