"""Divergence statistics against NumPy and by hand, llama-perplexity's base files, and the judge that measures them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nkat.engine.log_probs import row_words
from nkat.errors import NKATError
from nkat.host.tables import as_text
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.base_file import open_base_file, write_base_file
from nkat.measure.compare import check_base, save_base
from nkat.measure.divergence import CHANGE_QUANTILES, KL_QUANTILES, Divergence, divergence_table
from nkat.measure.judge import Judge, Passages, text_passages
from nkat.measure.perplexity import scored_tokens
from nkat.theta.set import ThetaSet
from tests.measure.test_judge import CHUNKS, TEXT, judge, loaded, theta  # noqa: F401
from tests.support.tiny_models import write_tiny_model


def test_statistics_against_numpy() -> None:
    generator = np.random.default_rng(0)
    kl = generator.gamma(0.3, 0.5, 999)
    base_nll, nll = generator.gamma(2.0, 1.0, (2, 999))
    same = generator.random(999) < 0.8
    record = Divergence.of(*map(torch.from_numpy, (base_nll, nll, kl, same))).record()
    change = 100.0 * (np.exp(-nll) - np.exp(-base_nll))
    n = len(kl)

    def error(x: np.ndarray) -> float:
        return float(np.sqrt(((x**2).mean() - x.mean() ** 2) / (n - 1)))

    found = record["kl"]
    assert found["mean"] == pytest.approx(kl.mean(), rel=1e-12)
    assert found["stderr"] == pytest.approx(error(kl), rel=1e-9)
    assert (found["min"], found["max"]) == (kl.min(), kl.max())
    assert list(found["quantiles"].values()) == pytest.approx(np.quantile(kl, np.array(KL_QUANTILES) / 100))
    assert record["same_top_percent"] == pytest.approx(100 * same.mean())
    share = same.mean()
    assert record["same_top_percent_stderr"] == pytest.approx(100 * np.sqrt(share * (1 - share) / (n - 1)))
    moved = record["delta_p_percent"]
    assert moved["mean"] == pytest.approx(change.mean())
    assert moved["stderr"] == pytest.approx(error(change))
    rms = np.sqrt((change**2).mean())
    assert moved["rms"] == pytest.approx(rms)
    assert moved["rms_stderr"] == pytest.approx(error(change**2) / (2 * rms))
    assert list(moved["quantiles"].values()) == pytest.approx(np.quantile(change, np.array(CHANGE_QUANTILES) / 100))
    assert moved["quantiles"]["1"] < 0 < moved["quantiles"]["99"]


def test_nothing_that_differs() -> None:
    zero = torch.zeros(12, dtype=torch.float64)
    record = Divergence.of(zero + 2.0, zero + 2.0, zero, torch.ones(12, dtype=torch.bool)).record()
    assert record["kl"]["mean"] == record["kl"]["max"] == record["delta_p_percent"]["rms"] == 0.0
    assert record["delta_p_percent"]["rms_stderr"] == 0.0
    assert record["same_top_percent"] == 100.0
    table = divergence_table({"with Θ": record})
    assert "KL divergence      0.000000 ± 0.000000" in as_text(table)
    assert table.records()[0]["kl_p99"] == 0.0
    better = Divergence.of(zero + 2.0, zero + 1.0, zero, torch.ones(12, dtype=torch.bool)).record()
    assert better["delta_p_percent"]["mean"] == pytest.approx(100 * (np.exp(-1) - np.exp(-2)))


# --- base files


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    """Of two chunks of 9 tokens, a vocabulary of 5."""
    rows = np.zeros((2 * scored_tokens(9), row_words(5)), np.uint16)
    rows[:, :4] = np.array([[1e-4, -8.0]], np.float32).view(np.uint16)
    rows[:, 4:9] = np.arange(5) * 1000
    path = tmp_path / "base.kld"
    write_base_file(path, torch.arange(18).view(2, 9) % 5, 5, [rows[:3], rows[3:]])
    return path


def test_a_base_file_byte_by_byte(base_file: Path) -> None:
    raw = base_file.read_bytes()
    assert raw[:20] == b"_logits_" + struct.pack("<3i", 9, 5, 2)
    assert struct.unpack("<18i", raw[20:92]) == tuple(i % 5 for i in range(18))
    assert len(raw) == 92 + 2 * 4 * (8 + 2 * 6)  # chunks, scored tokens, two float32 and five numbers made even
    assert raw[92:112] == struct.pack("<2f6H", 1e-4, -8.0, 0, 1000, 2000, 3000, 4000, 0)
    opened = open_base_file(base_file)
    assert opened.tokens.tolist() == (torch.arange(18).view(2, 9) % 5).tolist()
    assert opened.vocabulary == 5
    assert opened.rows(0, 2).tobytes() == raw[92:]
    assert opened.rows(1, 1).tobytes() == raw[92 + 4 * 20 :]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw: raw[:-1], "has 251 bytes, and 2 chunks of 9 tokens are 252"),
        (lambda raw: raw + b"\0", "has 253 bytes"),
        (lambda raw: raw[:7], "not a file of log-probabilities"),
        (lambda raw: b"GGUF" + raw[4:], "not a file of log-probabilities"),
        (lambda raw: raw[:8] + struct.pack("<i", -1) + raw[12:], "damaged: has 2 chunks of -1 tokens"),
        (lambda raw: raw[:12] + struct.pack("<i", 1 << 30) + raw[16:], "of a vocabulary of 1073741824"),
        (lambda raw: raw[:16] + struct.pack("<i", 0) + raw[20:], "damaged: has 0 chunks"),
        (lambda raw: raw[:24] + struct.pack("<i", 5) + raw[28:], "token id 5 lies outside its vocabulary of 5"),
        (lambda raw: raw[:24] + struct.pack("<i", -1) + raw[28:], "token id -1"),
    ],
)
def test_damaged_base_files(base_file: Path, change: Callable[[bytes], bytes], problem: str) -> None:
    base_file.write_bytes(change(base_file.read_bytes()))
    with pytest.raises(NKATError, match=problem):
        open_base_file(base_file)


@pytest.mark.parametrize("numbers", [(float("nan"), -8.0), (1e-4, float("inf")), (-1e-4, -8.0)])
def test_rows_that_are_no_log_probabilities(base_file: Path, numbers: tuple[float, float]) -> None:
    raw = bytearray(base_file.read_bytes())
    at = 92 + 4 * 20 + 20
    raw[at : at + 8] = struct.pack("<2f", *numbers)
    base_file.write_bytes(raw)
    opened = open_base_file(base_file)
    opened.rows(0, 1)
    with pytest.raises(NKATError, match="log-probabilities of chunk 1 are no numbers"):
        opened.rows(0, 2)


def test_a_base_file_is_whole_or_not_there(tmp_path: Path, base_file: Path) -> None:
    with pytest.raises(NKATError, match="no such file"):
        open_base_file(tmp_path / "none")
    with pytest.raises(NKATError, match="this is a folder"):
        open_base_file(tmp_path)
    path = tmp_path / "half.kld"
    with pytest.raises(ValueError, match="were given"):
        write_base_file(path, torch.zeros((2, 9), dtype=torch.int64), 5, [np.zeros((4, 10), np.uint16)])
    assert not path.exists()
    opened = open_base_file(base_file)
    base_file.write_bytes(base_file.read_bytes()[:-30])
    with pytest.raises(NKATError, match="was cut short while it was read"):
        opened.rows(0, 2)


# --- the judge


def test_the_judge_measures_what_theta_moves(loaded: LoadedModel, theta: ThetaSet) -> None:  # noqa: F811
    """The score itself is the same with and without a divergence; a second Θ does not compute the base again."""
    plain = Judge.open(loaded, TEXT, CHUNKS)
    judge = Judge.open(loaded, TEXT, CHUNKS, diverging=True)  # noqa: F811
    score, without = judge.score(theta), plain.score(theta)
    assert torch.equal(score.perplexity.nll, without.perplexity.nll)
    assert score.change == without.change
    assert without.divergence is None
    assert "divergence" not in without.record()
    divergence = score.divergence
    assert divergence is not None
    assert divergence.kl.numel() == score.perplexity.tokens
    assert divergence.mean > 1e-4
    assert score.record()["divergence"] == divergence.record()
    weaker, again = judge.score(theta, 0.99), judge.score(theta)
    assert weaker.divergence is not None
    assert 0 < weaker.divergence.mean < divergence.mean
    assert again.divergence is not None
    assert torch.equal(again.divergence.kl, divergence.kl)
    assert judge.score(theta, 1.0).divergence.mean == pytest.approx(0.0, abs=1e-7)  # type: ignore[union-attr]


def test_only_the_tokens_that_count(loaded: LoadedModel, theta: ThetaSet) -> None:  # noqa: F811
    passages = text_passages(loaded, TEXT, CHUNKS)
    counted = torch.arange(255).expand(CHUNKS, 255) % 3 == 0
    some = Judge(loaded, Passages(passages.chunks, counted, "some"), diverging=True).score(theta).divergence
    every = Judge(loaded, passages, diverging=True).score(theta).divergence
    assert some is not None
    assert every is not None
    assert torch.equal(some.kl, every.kl.view(CHUNKS, 255)[counted])


def test_bases_of_other_vocabularies_are_refused(
    tmp_path: Path,
    loaded: LoadedModel,  # noqa: F811
    base_file: Path,
) -> None:
    judge = Judge.open(loaded, TEXT, CHUNKS)  # noqa: F811
    with pytest.raises(NKATError, match="vocabulary of 5, and"):
        judge.beside(open_base_file(base_file))
    other = load_model(write_tiny_model(tmp_path / "other.gguf", "llama"))  # other tokens, as many
    if other.config.vocab_size == loaded.config.vocab_size:
        check_base(loaded, other)
    spm = load_model(write_tiny_model(tmp_path / "spm.gguf", "gemma2"))
    with pytest.raises(NKATError, match="vocabulary"):
        check_base(loaded, spm)


def test_a_saved_base_is_the_base(tmp_path: Path, loaded: LoadedModel, theta: ThetaSet) -> None:  # noqa: F811
    """Against a model, and against what it left in a file: the same within what 16 bits cost."""
    other = load_model(write_tiny_model(tmp_path / "other.gguf", "qwen3", 5))
    passages = text_passages(loaded, TEXT, CHUNKS)
    path = tmp_path / "other.kld"
    nll = save_base(path, other.model, passages.chunks, batch=4)
    base = open_base_file(path)
    assert torch.equal(base.tokens, passages.chunks)
    judge = Judge(loaded, passages)  # noqa: F811
    direct_base, direct = judge.beside(other, theta)
    assert torch.equal(direct_base.nll, nll)
    stored_base, stored = judge.beside(base, theta)
    assert stored_base.ppl == pytest.approx(direct_base.ppl, rel=5e-3)  # what is very unlikely is kept as likelier
    assert stored_base.ppl < direct_base.ppl
    assert len(direct) == len(stored) == 2
    for a, b in zip(direct, stored, strict=True):
        assert torch.equal(a.perplexity.nll, b.perplexity.nll)
        assert b.divergence.mean == pytest.approx(a.divergence.mean, rel=1e-3)
        assert b.divergence.mean > 0.01
        assert b.divergence.agreement == pytest.approx(a.divergence.agreement, abs=0.01)
        assert a.change.log_ratio == pytest.approx(float((a.perplexity.nll - direct_base.nll).mean()))
    assert direct[0].divergence.mean != direct[1].divergence.mean
