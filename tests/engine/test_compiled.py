"""Compiled decoding against the model's own forward pass, and against llama.cpp's text."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from nkat.engine.compiled import PREFILL_TOKENS, CompiledDecoder
from nkat.engine.decoder import make_decoder
from nkat.engine.eager import EagerDecoder
from nkat.errors import NKATError
from nkat.lm.load import LoadedModel, load_model
from nkat.theta.algebra import quantise_factors
from tests.support.golden import read_golden
from tests.support.tiny_models import FURTHER_FAMILIES, MIXTURE_FAMILIES, write_tiny_model

pytestmark = pytest.mark.isa

GOLDEN, TINY = read_golden("models"), read_golden("tiny_logits")
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
FAMILIES = {
    "llama": ("llama", {}),
    "llama factors": ("llama", {"rope_factors": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {}),
    "gemma3 window": ("gemma3", {"blocks": 7, "sliding_window": 20}),
    "odd heads": ("llama", {"heads": 6, "kv_heads": 3, "embedding": 72, "head_dim": 12, "feed_forward": 100}),
    "one head": ("qwen3", {"heads": 1, "kv_heads": 1}),
    **{f"{arch} {i}": (arch, options) for i, (arch, options) in enumerate(FURTHER_FAMILIES)},
    **{f"{arch} mixture {i}": (arch, options) for i, (arch, options) in enumerate(MIXTURE_FAMILIES)},
}
IDS = [(29 * i + 5) % 200 for i in range(2 * PREFILL_TOKENS + 40)]

CAPACITY = 700

every_family = pytest.mark.parametrize("family", FAMILIES)


def load(folder: Path, family: str = "llama", **options: Any) -> LoadedModel:
    arch, changes = FAMILIES[family]
    path = write_tiny_model(folder / "tiny.gguf", arch, **changes)
    return load_model(path, **{"repack": True, **options})


def decoder(loaded: LoadedModel, capacity: int = CAPACITY) -> CompiledDecoder:
    made = make_decoder(loaded.model, capacity)
    assert isinstance(made, CompiledDecoder)
    return made


def eager(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    """Logits after the last of these tokens."""
    with torch.inference_mode():
        return EagerDecoder(loaded.model, CAPACITY).prefill(ids)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return float((a - b).abs().max()) < tolerance


def add_theta(loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    loaded.model.set_thetas(
        {
            name: quantise_factors(*torch.randn(2, max(layer.shape), 3, generator=generator))
            for name, layer in loaded.model.star_linears().items()
        }
    )


# --- the same function


@every_family
@pytest.mark.parametrize("count", [1, 2, 40])
def test_prefill_equals_the_forward_pass(tmp_path, family, count):
    loaded = load(tmp_path, family)
    assert close(decoder(loaded).prefill(IDS[:count]), eager(loaded, IDS[:count]))
    assert not close(eager(loaded, [*IDS[: count - 1], 7]), eager(loaded, IDS[:count]), 0.01)


@every_family
def test_steps_equal_the_forward_pass(tmp_path, family):
    loaded = load(tmp_path, family)
    steps = decoder(loaded, 64)
    for i in range(50):
        logits = steps.step(IDS[i])
        if i in (0, 1, 15, 16, 17, 31, 49):
            assert close(logits, eager(loaded, IDS[: i + 1])), i


@pytest.mark.parametrize("family", ["llama", "gemma3 window"])
def test_a_long_prompt_in_parts(tmp_path, family):
    """Longer than one pass of the program, then continued by a second prompt and by steps."""
    loaded = load(tmp_path, family)
    whole = eager(loaded, IDS)
    one, parts = decoder(loaded), decoder(loaded)
    assert close(one.prefill(IDS), whole)
    parts.prefill(IDS[:100])
    parts.prefill(IDS[100:-2])
    parts.step(IDS[-2])
    assert close(parts.step(IDS[-1]), whole)


def test_block_quantised_weights(tmp_path):
    path = write_tiny_model(tmp_path / "q.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)
    loaded = load_model(path, repack=True)
    assert close(decoder(loaded).prefill(IDS[:30]), eager(loaded, IDS[:30]))


@pytest.mark.parametrize("count", [1, 30])
def test_rounded_inputs_stay_near_the_exact_ones(tmp_path, count):
    """INT8 activations and the float16 cache move logits a little: by some per cent here, and not by nothing."""
    path = write_tiny_model(tmp_path / "q.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)
    exact = eager(load_model(path), IDS[:count])
    rounded = decoder(load_model(path, int8_activations=True, repack=True)).prefill(IDS[:count])
    assert 1e-4 < float((rounded - exact).abs().max()) < 0.1 * float(exact.abs().max())


# --- Θ


@pytest.mark.parametrize("family", ["llama", "gemma3 window"])
def test_strength_follows_the_model(tmp_path, family):
    loaded = load(tmp_path, family)
    plain = decoder(loaded).prefill(IDS[:20]).clone()
    add_theta(loaded)
    made = decoder(loaded)
    for gamma in (None, 0.999, 1.0, 0.99):
        for prompt in (IDS[:20], IDS[:1]):
            made.length = 0
            made.set_gamma(gamma)
            result = made.prefill(prompt).clone()
            assert close(result, eager(loaded, prompt), 3e-4)
            if prompt == IDS[:20]:
                assert torch.equal(result, plain) == (gamma in (None, 1.0))


def test_a_decoder_of_an_older_theta_is_refused(tmp_path):
    loaded = load(tmp_path)
    made = decoder(loaded)
    add_theta(loaded)
    with pytest.raises(NKATError, match="make a new one"):
        made.step(1)


# --- the cache


def test_rewinding_forgets(tmp_path):
    made = decoder(load(tmp_path))
    first = made.prefill(IDS[:10]).clone()
    after = made.step(3).clone()
    made.prefill(IDS[50:80])
    made.length = 10
    assert torch.equal(made.step(3), after)
    made.length = 0
    assert torch.equal(made.prefill(IDS[:10]), first)


def test_what_does_not_fit_is_refused(tmp_path):
    made = decoder(load(tmp_path), 10)
    with pytest.raises(NKATError, match="holds 10 tokens; 0 are in it and 11 more"):
        made.prefill(IDS[:11])
    made.prefill(IDS[:10])
    with pytest.raises(NKATError, match="1 more do not fit"):
        made.step(1)
    with pytest.raises(NKATError, match="no token"):
        made.prefill([])
    made.length = 0
    for wrong in (-1, 1 << 20):
        with pytest.raises(NKATError, match="outside the vocabulary"):
            made.prefill([1, wrong])


def test_threads_change_no_bit(tmp_path):
    loaded = load(tmp_path, "gemma3 window", int8_activations=True)
    results = []
    for threads in (1, 2, 3):
        made = CompiledDecoder(loaded.model, 100, threads)
        results.append(torch.cat([made.prefill(IDS[:60]), made.step(3), made.step(4)]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_without_repacking_the_model_itself_decodes(tmp_path):
    assert isinstance(make_decoder(load(tmp_path, repack=False).model, 8), EagerDecoder)


# --- real models


@pytest.mark.parametrize("name", ["stories", "smollm2", "gemma3", "qwen"])
def test_greedy_text_equals_llama_cpp(name, request):
    """64 tokens of llama.cpp with the same float32 weights; its closest call among them is a margin of 0.015."""
    golden = GOLDEN[name]["float32"]
    made = decoder(load_model(request.getfixturevalue(name), repack=True), 128)
    logits, text = made.prefill(golden["prompt_ids"]), []
    for _ in golden["greedy"]["ids"]:
        text.append(int(logits.argmax()))
        logits = made.step(text[-1])
    assert text == golden["greedy"]["ids"]


@pytest.mark.parametrize("variant", [name for name, golden in TINY["variants"].items() if "greedy" in golden])
def test_greedy_ids_of_tiny_models_equal_llama_cpp(tmp_path, variant):
    """What it chose after the variant's ids, as far as no choice hangs on rounding."""
    golden = TINY["variants"][variant]
    path = write_tiny_model(tmp_path / "tiny.gguf", golden["arch"], golden["seed"], **golden["options"])
    made = make_decoder(load_model(path, repack=True).model, 64)  # which has no scales beside weights
    logits, chosen = made.prefill(TINY["ids"]), []
    for _ in golden["greedy"]:
        chosen.append(int(logits.argmax()))
        logits = made.step(chosen[-1])
    assert chosen == golden["greedy"]
    assert len(chosen) > 3


@pytest.mark.parametrize("name", ["stories", "smollm2", "gemma3", "qwen"])
def test_rounded_logits_are_as_near_to_llama_cpp_as_its_own_rounding_is(name, request):
    """llama.cpp's usual run rounds inputs too; which of them tip over differs from build to build."""
    usual, float32 = (dict(GOLDEN[name][setting]["top_logits"][-1]) for setting in ("default", "float32"))
    loaded = load_model(request.getfixturevalue(name), int8_activations=True, repack=True)
    logits = decoder(loaded, 128).prefill(GOLDEN[name]["default"]["prompt_ids"])
    both = usual.keys() & float32.keys()
    own = max(abs(usual[i] - float32[i]) for i in both)
    assert max(abs(float(logits[i]) - usual[i]) for i in usual) < 2.5 * own + 0.01
    assert int(logits.argmax()) == next(iter(usual))


# --- the cache grows


@pytest.mark.parametrize("family", ["llama", "gemma3 window"])
@pytest.mark.parametrize("int8_activations", [False, True])
def test_a_cache_that_grew_holds_the_same(tmp_path, monkeypatch, family, int8_activations):
    """Steps and prompts across the places where it grows, and back before them."""
    loaded = load(tmp_path, family, int8_activations=int8_activations)
    whole = decoder(loaded, 600)
    monkeypatch.setattr("nkat.engine.compiled.FIRST_ROOM", 16)
    growing = decoder(loaded, 600)
    small = growing.cache_nbytes
    for count in (1, 14, 3, 300, 1, 1, 2, 260):
        ids = IDS[growing.length : growing.length + count]
        assert torch.equal(growing.prefill(ids).clone(), whole.prefill(ids))
    assert 30 * small < growing.cache_nbytes <= whole.cache_nbytes
    growing.length = whole.length = 20
    assert torch.equal(growing.step(7).clone(), whole.step(7))


def test_the_model_s_own_cache_grows_too(tmp_path, monkeypatch):
    loaded = load(tmp_path, "gemma3 window", repack=False)
    whole = EagerDecoder(loaded.model, 600)
    monkeypatch.setattr("nkat.lm.cache.FIRST_ROOM", 16)
    growing = EagerDecoder(loaded.model, 600)
    small = growing.cache_nbytes
    for count in (1, 14, 3, 300, 1, 1):
        ids = IDS[growing.length : growing.length + count]
        assert torch.equal(growing.prefill(ids), whole.prefill(ids))
    assert 10 * small < growing.cache_nbytes <= whole.cache_nbytes


@pytest.mark.parametrize("repack", [False, True])
def test_tokens_beyond_memory_are_refused_when_they_are_reached(tmp_path, repack):
    loaded = load(tmp_path, repack=repack)
    steps = make_decoder(loaded.model, 10**11)
    before = steps.step(1).clone()
    with pytest.raises(NKATError, match=r"no memory for a KV cache of \d+ tokens: give fewer"):
        if repack:
            steps.prefill(range(10**11 - 1))
        else:
            steps.cache.check_room(1, 10**11 - 1)
    steps.length = 0
    assert torch.equal(steps.step(1), before)
