"""Perplexity: llama.cpp's convention and figures, the paired comparison, and errors."""

import math

import pytest
import torch

from nkat.errors import NKATError
from nkat.host import console
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.perplexity import Perplexity, paired, score_chunks, scored_tokens, text_chunks
from nkat.theta.algebra import quantise_factors
from tests.support.golden import read_golden
from tests.support.perplexity import measure
from tests.support.tiny_models import write_tiny_model

TEXT = "the rain in a tin and the other one: 1, 2, 3.\n" * 30


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> LoadedModel:
    """A tiny model whose vocabulary adds no BOS."""
    return load_model(write_tiny_model(tmp_path_factory.mktemp("ppl") / "llama.gguf", "llama"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> LoadedModel:
    """A tiny model with a sliding window, whose vocabulary adds BOS."""
    path = tmp_path_factory.mktemp("ppl") / "gemma.gguf"
    return load_model(write_tiny_model(path, "gemma3", sliding_window=8))


# --- the convention


def test_chunks_of_512_score_their_last_255_predictions(llama):
    assert scored_tokens(512) == 255
    cut = text_chunks(llama.tokenizer, TEXT * 2, context=512)
    assert score_chunks(llama.model, cut[:1]).shape == (1, 255)


def test_text_is_cut_without_overlap_and_without_the_rest(llama):
    ids = llama.tokenizer.encode(TEXT.removesuffix("\n"))
    cut = text_chunks(llama.tokenizer, TEXT, context=64)
    assert len(ids) % 64 != 0
    assert cut.flatten().tolist() == ids[: len(ids) // 64 * 64]
    assert torch.equal(text_chunks(llama.tokenizer, TEXT, chunks=2, context=64), cut[:2])
    assert len(text_chunks(llama.tokenizer, TEXT, chunks=10**6, context=64)) == len(cut)


def test_bos_takes_the_place_of_each_first_token_where_the_vocabulary_adds_one(llama, gemma):
    ids = gemma.tokenizer.encode(TEXT.removesuffix("\n"), add_special=True)
    cut = text_chunks(gemma.tokenizer, TEXT, context=64)
    assert gemma.tokenizer.adds_bos
    assert (cut[:, 0] == gemma.tokenizer.bos_id).all()
    assert cut[1, 1:].tolist() == ids[65:128]
    assert not llama.tokenizer.adds_bos
    assert (text_chunks(llama.tokenizer, TEXT, context=64) != llama.tokenizer.bos_id).all()


@pytest.mark.isa
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_scores_are_the_log_softmax_of_the_second_half(family, request):
    loaded = request.getfixturevalue(family)
    cut = text_chunks(loaded.tokenizer, TEXT, chunks=3, context=32)
    with torch.inference_mode():
        log_p = loaded.model(cut).double().log_softmax(dim=-1)
    expected = -log_p[:, 16:31].gather(2, cut[:, 17:, None])[..., 0]
    # in float32 a logit of 14 has steps of 1e-6, and each kernel adds in an order of its own
    torch.testing.assert_close(score_chunks(loaded.model, cut), expected, atol=1e-5, rtol=4e-6)
    shifted = -log_p[:, 15:30].gather(2, cut[:, 16:31, None])[..., 0]
    assert (score_chunks(loaded.model, cut) - shifted).abs().max() > 0.1


def test_ppl_and_its_error_by_their_formulas():
    nll = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6
    result = Perplexity(nll)
    values = nll.flatten().tolist()
    mean = sum(values) / 15
    variance = sum(v * v for v in values) / 15 - mean * mean
    assert result.ppl == pytest.approx(math.exp(mean))
    assert result.stderr == pytest.approx(math.exp(mean) * math.sqrt(variance / 14))
    assert (result.chunks, result.tokens) == (3, 15)
    assert result.chunk_nll.tolist() == pytest.approx([sum(values[i : i + 5]) / 5 for i in (0, 5, 10)])


@pytest.mark.isa
def test_batches_do_not_change_the_result(llama):
    cut = text_chunks(llama.tokenizer, TEXT, chunks=5, context=64)
    one, three, again = (score_chunks(llama.model, cut, batch=batch) for batch in (1, 3, 3))
    assert torch.equal(three, again)
    assert (one - three).abs().max() < 1e-4
    assert (one - three.roll(1, 0)).abs().max() > 0.1


def test_progress_goes_to_stderr_only_when_asked_for(llama, capsys, monkeypatch):
    monkeypatch.setattr(console, "FIRST_LINE_SECONDS", 0.0)  # no wait before the first line
    cut = text_chunks(llama.tokenizer, TEXT, chunks=2, context=64)
    score_chunks(llama.model, cut)
    assert capsys.readouterr() == ("", "")
    score_chunks(llama.model, cut, progress="without Θ")
    output = capsys.readouterr()
    assert output.out == ""
    assert "without Θ" in output.err


# --- paired comparison


@pytest.mark.isa
def test_a_pair_of_equals_is_exactly_zero(llama):
    a, b = (measure(llama.model, llama.tokenizer, TEXT, chunks=3, context=64) for _ in range(2))
    change = paired(a, b)
    assert (change.log_ratio, change.log_ratio_stderr, change.percent, change.percent_stderr) == (0.0, 0.0, 0.0, 0.0)


def test_sign_size_and_error_of_a_change():
    generator = torch.Generator().manual_seed(0)
    a = Perplexity(torch.rand(8, 255, generator=generator, dtype=torch.float64) * 8)
    noise = 0.1 * torch.randn(8, 255, generator=generator, dtype=torch.float64)
    worse = Perplexity(a.nll + 0.05 + noise)
    change = paired(a, worse)
    assert change.percent == pytest.approx(100 * (worse.ppl / a.ppl - 1))
    assert change.percent > 3 * change.percent_stderr > 0
    assert change.log_ratio_stderr == pytest.approx(0.1 / math.sqrt(8 * 255), rel=0.05)
    assert paired(worse, a).log_ratio == -change.log_ratio
    unpaired = math.hypot(a.stderr / a.ppl, worse.stderr / worse.ppl)
    assert change.log_ratio_stderr < unpaired / 10


def test_a_spoilt_model_is_reported_as_worse(stories, shared_text):
    loaded = load_model(stories)
    text = shared_text("alice29.txt").read_text()
    plain = measure(loaded.model, loaded.tokenizer, text, chunks=8, context=128)
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: quantise_factors(*(0.5 * torch.randn(2, max(layer.shape), 8, generator=generator)))
        for name, layer in loaded.model.star_linears().items()
    }
    loaded.model.set_thetas(noise)
    loaded.model.set_gamma(0.9)
    spoilt = measure(loaded.model, loaded.tokenizer, text, chunks=8, context=128)
    change = paired(plain, spoilt)
    assert change.percent > 5 * change.percent_stderr > 0
    loaded.model.set_gamma(1.0)
    assert paired(plain, measure(loaded.model, loaded.tokenizer, text, chunks=8, context=128)).log_ratio == 0.0


# --- errors


def test_texts_that_cannot_be_measured(llama):
    for empty in ("", "\n", " \n\t\n"):
        with pytest.raises(NKATError, match="the text is empty"):
            text_chunks(llama.tokenizer, empty)
    with pytest.raises(NKATError, match=r"too short: it has \d+ tokens, and one chunk needs 512"):
        text_chunks(llama.tokenizer, "a short text")
    with pytest.raises(NKATError, match="number of chunks must be at least 1, got 0"):
        text_chunks(llama.tokenizer, TEXT, chunks=0)
    with pytest.raises(NKATError, match="context must be at least 8 tokens, got 2"):
        text_chunks(llama.tokenizer, TEXT, context=2)


def test_exactly_one_chunk_is_enough(llama):
    ids = llama.tokenizer.encode(TEXT)[:64]
    text = llama.tokenizer.decode(ids)
    assert llama.tokenizer.encode(text) == ids
    assert text_chunks(llama.tokenizer, text, context=64).shape == (1, 64)
    with pytest.raises(NKATError, match="it has 64 tokens, and one chunk needs 65"):
        text_chunks(llama.tokenizer, text, context=65)


def test_scoring_refuses_bad_arguments(llama):
    cut = text_chunks(llama.tokenizer, TEXT, chunks=2, context=64)
    with pytest.raises(NKATError, match="batch must be at least 1 chunk, got 0"):
        score_chunks(llama.model, cut, batch=0)
    vocabulary = llama.config.vocab_size
    for bad in (-1, vocabulary):
        spoilt = cut.clone()
        spoilt[1, 5] = bad
        with pytest.raises(NKATError, match=f"token id {bad} lies outside the vocabulary of {vocabulary}"):
            score_chunks(llama.model, spoilt)
    a, b = (Perplexity(torch.ones(n, 5, dtype=torch.float64)) for n in (2, 3))
    with pytest.raises(NKATError, match="needs the same chunks"):
        paired(a, b)


def test_predictions_that_are_not_numbers_are_an_error(tmp_path):
    loaded = load_model(write_tiny_model(tmp_path / "nan.gguf", "llama"))
    loaded.model.output_norm[3] = math.nan
    with pytest.raises(NKATError, match="predictions for chunk 0 are not finite"):
        measure(loaded.model, loaded.tokenizer, TEXT, chunks=2, context=64)


# --- against llama.cpp on the same text


@pytest.mark.isa
@pytest.mark.parametrize(("name", "chunks"), [("stories", 8), ("smollm2", 2)])
def test_perplexity_equals_llama_cpp(name, chunks, request, shared_text):
    """By chunk: with the same float32 weights; and near its usual run, which rounds activations to 8 bits."""
    golden = read_golden("models")[name]
    loaded = load_model(request.getfixturevalue(name))
    text = shared_text("wiki.test.raw").read_text(encoding="utf-8")
    result = measure(loaded.model, loaded.tokenizer, text[: len(text) // 20], chunks=chunks)
    for setting, tolerance in (("float32", 2e-4), ("default", 0.02)):
        expected = golden[setting]["perplexity"]
        chunk_nll = torch.tensor(expected["chunk_nll"][:chunks], dtype=torch.float64)
        assert (result.chunk_nll - chunk_nll).abs().max() < tolerance, setting
        if chunks == len(expected["chunk_nll"]):
            assert result.stderr == pytest.approx(expected["ppl_error"], rel=1e-3), setting


def test_rounded_activations_come_nearer_to_llama_cpps_usual_run(smollm2, shared_text):
    """llama.cpp multiplies by activations of 8 bits; rounding ours likewise removes most of the difference."""
    expected = read_golden("models")["smollm2"]["default"]["perplexity"]["chunk_nll"][:2]
    text = shared_text("wiki.test.raw").read_text(encoding="utf-8")[:20_000]
    distance = {}
    for rounded in (False, True):
        loaded = load_model(smollm2, int8_activations=rounded)
        nll = measure(loaded.model, loaded.tokenizer, text, chunks=2).chunk_nll
        distance[rounded] = float((nll - torch.tensor(expected, dtype=torch.float64)).abs().mean())
    assert distance[True] < 0.01
    assert distance[True] != distance[False]
