"""The forward pass: against llama.cpp's logits, and the symmetries it must have, each with a control that must fail."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from nkat.engine.plan import make_plan
from nkat.errors import NKATError
from nkat.gguf.formats import UnsupportedTypeError
from nkat.lm import transformer
from nkat.lm.attention import rope_frequencies, rotate
from nkat.lm.keys import ConfigError
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.rope import Rope
from nkat.lm.tokenizer import Tokenizer
from nkat.lm.transformer import Transformer
from nkat.theta.algebra import Theta, quantise_factors
from tests.support.golden import kept, read_golden
from tests.support.random_blocks import UNKNOWN
from tests.support.tiny_models import ARCHITECTURES, FURTHER_FAMILIES, MIXTURE_FAMILIES, write_tiny_model

pytestmark = pytest.mark.isa

TINY = read_golden("tiny_logits")
SWA = {"blocks": 7, "sliding_window": 4}
FAMILIES = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma3", {}),
    ("gemma3", SWA),
    *FURTHER_FAMILIES,
    *MIXTURE_FAMILIES,
]
IDS = torch.tensor([[(29 * i + 5) % 200 for i in range(12)]])

Tiny = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """Loads a tiny model: tiny(arch, options of write_tiny_model, **options of load_model)."""
    folder, serial = tmp_path_factory.mktemp("tiny"), itertools.count()

    def load(arch: str, options: dict[str, Any] | None = None, **load_options: Any) -> LoadedModel:
        path = write_tiny_model(folder / f"{next(serial)}.gguf", arch, **(options or {}))
        return load_model(path, **load_options)

    return load


@torch.inference_mode()
def run(model: Transformer, ids: torch.Tensor, steps: list[int] | None = None) -> torch.Tensor:
    """Logits of all positions: in one pass, or through the KV cache in passes of so many tokens."""
    if steps is None:
        return model(ids)
    cache = model.new_cache(len(ids), ids.shape[1])
    return torch.cat([model(part, cache) for part in ids.split(steps, dim=1)], dim=1)


def changed(ids: torch.Tensor, position: int) -> torch.Tensor:
    other = ids.clone()
    other[:, position] += 1
    return other


def make_thetas(model: Transformer, scale: float = 1.0) -> dict[str, Theta]:
    generator = torch.Generator().manual_seed(0)
    thetas = {}
    for name, layer in model.star_linears().items():
        p, q = scale * torch.randn(2, max(layer.shape), 4, generator=generator)
        thetas[name] = quantise_factors(p, q)
    return thetas


# --- against llama.cpp


@pytest.mark.parametrize("variant", TINY["variants"])
def test_logits_equal_llama_cpp(tiny, variant):
    golden = TINY["variants"][variant]
    model = tiny(golden["arch"], {"seed": golden["seed"], **golden["options"]}).model
    logits = kept(golden, run(model, torch.tensor([TINY["ids"]]))[0, TINY["positions"]])
    assert (logits - torch.tensor(golden["logits"])).abs().max() < 2e-4  # logits have a standard deviation of 3


def test_golden_variants_differ_so_that_equality_means_something():
    same = [
        {"llama", "llama_scaling_none"},
        {"llama_linear", "llama_linear_untyped"},
        {"glm4", "glm4_draft"},
        {"qwen35", "qwen35_draft"},
    ]
    for a, b in itertools.combinations(TINY["variants"], 2):
        difference = (
            (torch.tensor(TINY["variants"][a]["logits"]) - torch.tensor(TINY["variants"][b]["logits"])).abs().max()
            if len(TINY["variants"][a]["logits"][0]) == len(TINY["variants"][b]["logits"][0])
            else math.inf
        )
        assert (difference == 0) if {a, b} in same else (difference > 0.02), (a, b)


# --- KV cache


@pytest.mark.parametrize(("arch", "options"), FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-11)])
@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 1, 3, 2], [11, 1]])
def test_decoding_through_the_cache_equals_one_pass(tiny, arch, options, dtype, tolerance, steps):
    """float64 says whether it is the same; what float32 loses grows where short vectors are made unit ones."""
    model = tiny(arch, options, dtype=dtype).model
    ids = torch.cat([IDS, IDS.flip(1)])
    whole = run(model, ids)
    assert whole.dtype == dtype
    assert (run(model, ids, steps) - whole).abs().max() < tolerance
    forgetful = run(model, ids[:, -1:])  # the same last token without what came before it
    assert (forgetful - whole[:, -1:]).abs().max() > 0.1


def test_shortening_the_cache_forgets(tiny):
    model = tiny("gemma3", SWA).model
    cache = model.new_cache(1, 12)
    with torch.inference_mode():
        model(IDS[:, :6], cache)
        first = model(IDS[:, 6:8], cache)
        cache.length = 6
        model(changed(IDS, 6)[:, 6:9], cache)
        cache.length = 6
        assert torch.equal(model(IDS[:, 6:8], cache), first)


def test_cache_refuses_what_does_not_fit(tiny):
    model = tiny("llama").model
    cache = model.new_cache(1, 8)
    run_in_cache = torch.inference_mode()(model)
    run_in_cache(IDS[:, :6], cache)
    with pytest.raises(NKATError, match="holds 8 tokens; 6 are in it and 3 more do not fit"):
        run_in_cache(IDS[:, :3], cache)
    with pytest.raises(NKATError, match="made for 1 sequences, not 2"):
        run_in_cache(IDS[:, :1].expand(2, 1), cache)
    assert cache.length == 6
    assert cache.nbytes == 2 * 3 * 8 * 2 * 16 * 4  # K and V, blocks, tokens, KV heads, head size, float32


# --- what a token can see


@pytest.mark.parametrize(("arch", "options"), FAMILIES)
def test_a_token_changes_nothing_before_it(tiny, arch, options):
    model = tiny(arch, options).model
    before, after = run(model, IDS)[0], run(model, changed(IDS, 7))[0]
    if model.config.mixture is None:
        assert torch.equal(before[:7], after[:7])
    else:  # an expert multiplies the tokens that go to it together: how many they are changes the order of sums
        assert (before[:7] - after[:7]).abs().max() < 1e-3
    assert ((before[7:] - after[7:]).abs().amax(dim=1) > 1e-3).all()


@pytest.mark.parametrize(("blocks", "reach"), [(1, 4), (2, 7)])
def test_a_sliding_window_hides_what_lies_behind_it(tiny, blocks, reach):
    """With window w, n blocks carry a token n (w − 1) positions further and not one more."""
    windowed = tiny("gemma3", {"blocks": blocks, "sliding_window": 4}).model
    for steps in (None, [12], [1] * 12, [6, 6]):
        difference = (run(windowed, IDS, steps) - run(windowed, changed(IDS, 0), steps))[0].abs().amax(dim=1)
        assert (difference[:reach] > 0).all()
        assert (difference[reach:] == 0).all()
    unlimited = tiny("gemma3", {"blocks": blocks}).model
    assert ((run(unlimited, IDS) - run(unlimited, changed(IDS, 0)))[0].abs().amax(dim=1) > 0).all()


def test_sequences_of_a_batch_do_not_mix(tiny):
    model = tiny("qwen2", dtype=torch.float64).model
    other = IDS.flip(1)
    together = run(model, torch.cat([IDS, other]))
    assert (together[0] - run(model, IDS)[0]).abs().max() < 1e-12
    assert (together[1] - run(model, other)[0]).abs().max() < 1e-12
    assert (together[0] - together[1]).abs().max() > 0.1


def test_keys_that_nobody_reads_change_nothing(tiny):
    """The last blocks use an earlier one's; a file may have weights for them all the same, and a Θ may act on those."""
    plain, idle = tiny("gemma4").model, tiny("gemma4", {"idle_kv": True}).model
    assert idle.star_linears().keys() - plain.star_linears().keys() == {
        f"blk.{block}.attn_{part}.weight" for block in (4, 5) for part in "kv"
    }
    expected = run(plain, IDS)
    assert torch.equal(run(idle, IDS), expected)
    idle.set_thetas({name: theta for name, theta in make_thetas(idle).items() if name.startswith("blk.4.attn_k")})
    idle.set_gamma(0.9)
    assert torch.equal(run(idle, IDS), expected)
    with pytest.raises(NKATError, match="blocks that a recorded step does not know of"):
        make_plan(plain, plain.new_cache(1, 8))


# --- RoPE


def rope(interleaved: bool, dimensions: int = 16, **changes: Any) -> Rope:
    values = {"base": 1e4, "scale": 1.0, "yarn": False, "original_context": 512, "magnitude": 1.0}
    return Rope(interleaved=interleaved, dimensions=dimensions, **{**values, **changes})


def rotated(x: torch.Tensor, positions: list[int], rope: Rope) -> torch.Tensor:
    angles = torch.tensor(positions)[:, None] * rope_frequencies(rope)
    return rotate(x, angles.cos(), angles.sin(), rope.interleaved)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dimensions", [16, 10])
def test_scores_depend_on_the_distance_only(interleaved, dimensions):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(q_position: int, k_position: int) -> float:
        kind = rope(interleaved, dimensions)
        return float((rotated(q, [q_position], kind) * rotated(k, [k_position], kind)).sum())

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-11)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    assert abs(score(7, 3) - score(3, 7)) > 1e-3  # the sign of the distance counts


def test_the_two_kinds_pair_different_elements():
    x = torch.randn(1, 3, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.arange(16).view(8, 2).T.reshape(16)  # 0 2 4 ... 1 3 5 ...
    halves, pairs = rotated(x[..., order], [0, 5, 9], rope(False)), rotated(x, [0, 5, 9], rope(True))
    assert torch.allclose(halves, pairs[..., order], atol=1e-14)
    assert not torch.allclose(rotated(x, [0, 5, 9], rope(False)), pairs, atol=0.1)


def test_pairs_turn_as_complex_numbers():
    x = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = 5 * 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    turned = torch.view_as_complex(x.view(8, 2)) * torch.polar(torch.ones_like(angles), angles)
    assert torch.allclose(rotated(x, [5], rope(True)).view(8, 2), torch.view_as_real(turned), atol=1e-14)


def test_elements_beyond_the_rotated_ones_pass_unchanged():
    x = torch.randn(1, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    for interleaved in (True, False):
        turned = rotated(x, [1, 2, 3, 4], rope(interleaved, 10))
        assert torch.equal(turned[..., 10:], x[..., 10:])
        assert not torch.equal(turned[..., :10], x[..., :10])


def test_yarn_leaves_fast_pairs_and_scales_slow_ones():
    plain, linear = rope_frequencies(rope(False, 64)), rope_frequencies(rope(False, 64, scale=1 / 8))
    yarn = rope_frequencies(rope(False, 64, scale=1 / 8, yarn=True))
    turns = 512 * plain / (2 * math.pi)
    assert torch.equal(yarn[turns > 40], plain[turns > 40])
    assert torch.allclose(yarn[turns < 0.7], linear[turns < 0.7], rtol=1e-12)
    between = (turns < 25) & (turns > 1.5)
    assert ((yarn < plain) & (yarn > linear))[between].all()
    assert torch.equal(rope_frequencies(rope(False, 64, yarn=True)), plain)  # a factor of 1 does nothing


def test_frequency_factors_divide():
    factors = torch.linspace(1, 8, 8)
    kind = rope(True)
    assert torch.allclose(rope_frequencies(kind, factors) * factors, rope_frequencies(kind), rtol=1e-12)


# --- Θ


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_theta_absent_zero_and_gamma_one_change_no_bit(tiny, arch):
    model = tiny(arch, {"tied": False}).model
    plain = run(model, IDS)
    model.set_thetas(make_thetas(model, scale=0.0))
    model.set_gamma(0.97)
    assert torch.equal(run(model, IDS), plain)
    model.set_thetas(make_thetas(model))
    assert (run(model, IDS) - plain).abs().max() > 1e-2
    for gamma in (1.0, None):
        model.set_gamma(gamma)
        assert torch.equal(run(model, IDS), plain)
    model.set_gamma(0.97)
    model.set_thetas({})
    assert torch.equal(run(model, IDS), plain)


def test_every_layer_can_carry_theta(tiny):
    model = tiny("gemma3", SWA).model
    plain = run(model, IDS)
    thetas = make_thetas(model)
    model.set_gamma(0.9)
    for name in ("output.weight", *(f"blk.6.{n}.weight" for n in ("attn_q", "attn_k", "attn_v", "attn_output"))):
        model.set_thetas({name: thetas[name]})
        assert not torch.equal(run(model, IDS), plain), name
    assert len(thetas) == 7 * 7 + 1
    with pytest.raises(NKATError, match=r"'blk\.7\.attn_q\.weight', but the model has no such linear layer"):
        model.set_thetas({"blk.7.attn_q.weight": thetas["output.weight"]})


def test_thetas_given_at_load(tiny):
    options = {"tied": False}
    plain = tiny("qwen3", options)
    assert plain.gamma is None
    thetas = make_thetas(plain.model)
    loaded = tiny("qwen3", options, thetas=thetas, gamma=0.95)
    assert loaded.gamma == 0.95
    plain.model.set_thetas(thetas)
    plain.model.set_gamma(0.95)
    assert torch.equal(run(loaded.model, IDS), run(plain.model, IDS))
    with pytest.raises(ValueError, match="without gamma"):
        tiny("qwen3", options, thetas=thetas)


# --- what comes out


def test_two_loads_give_the_same_bits(tiny):
    assert torch.equal(run(tiny("llama").model, IDS), run(tiny("llama").model, IDS))
    assert not torch.equal(run(tiny("llama").model, IDS), run(tiny("llama", {"seed": 1}).model, IDS))


def test_logits_of_some_positions(tiny):
    model = tiny("llama", dtype=torch.float64).model
    with torch.inference_mode():
        everything = model(IDS)
        assert torch.allclose(model(IDS, logits="last"), everything[:, -1:], rtol=0, atol=1e-12)
        assert torch.allclose(model(IDS, logits=slice(3, 9, 2)), everything[:, 3:9:2], rtol=0, atol=1e-12)


def test_trace_names_every_block_and_changes_nothing(tiny):
    model = tiny("gemma3", SWA).model
    trace: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        assert torch.equal(model(IDS, trace=trace), model(IDS))
        assert torch.equal(model.output(trace["output_norm"]), model(IDS))
    assert list(trace) == [*(f"blk.{i}" for i in range(7)), "output_norm"]
    assert not torch.equal(trace["blk.0"], trace["blk.1"])


@pytest.mark.parametrize("tile", [1 << 10, 1 << 22])
def test_nll_in_tiles_equals_the_log_softmax(tiny, monkeypatch, tile):
    monkeypatch.setattr(transformer, "_TILE_ELEMENTS", tile)  # 1 << 10: the 272 tokens take two tiles
    model = tiny("llama", dtype=torch.float64).model
    targets = torch.tensor([0, 1, 255, 256, 257, 271, 3, 100, 30, 2, 128, 270])
    with torch.inference_mode():
        hidden = model.hidden(IDS)[0]
        expected = -model.output(hidden).log_softmax(dim=-1)[torch.arange(12), targets]
        assert (model.nll(hidden, targets) - expected).abs().max() < 1e-12
        assert (model.nll(hidden, targets.flip(0)) - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("arch", "options"),
    [family for family in FAMILIES if family not in MIXTURE_FAMILIES],  # there a rounding may choose another expert
)
def test_half_precision_stays_close(tiny, arch, options, dtype):
    exact, half = (run(tiny(arch, options, dtype=d).model, IDS) for d in (torch.float32, dtype))
    assert half.dtype == torch.float32
    error = (half - exact).std() / exact.std()
    assert 0 < error < (0.05 if dtype == torch.bfloat16 else 0.007)  # eight times the mantissa


def test_keep_dense_changes_no_bit(tiny):
    assert torch.equal(run(tiny("qwen3", keep_dense=True).model, IDS), run(tiny("qwen3").model, IDS))


# --- loading


def test_loading_refuses_what_it_cannot_run(tmp_path, monkeypatch):
    path = write_tiny_model(tmp_path / "unknown.gguf", "llama", embedding=256, feed_forward=256, qtype=UNKNOWN)
    with pytest.raises(UnsupportedTypeError, match=r"unknown\.gguf: tensor token_embd\.weight has the type Q8_K"):
        load_model(path)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"other\.gguf: architecture 'mamba' is not supported"):
        load_model(tmp_path / "other.gguf")
    path = write_tiny_model(tmp_path / "fine.gguf", "llama")
    tokenizer = load_model(path).tokenizer
    tokenizer.vocab_size += 1
    monkeypatch.setattr(Tokenizer, "from_metadata", lambda metadata: tokenizer)
    with pytest.raises(ConfigError, match=r"fine\.gguf: the vocabulary has 273 tokens but token_embd\.weight 272 rows"):
        load_model(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("arch", "options"), FAMILIES)
def test_cuda_equals_cpu(tiny, arch, options):
    cpu = tiny(arch, options, dtype=torch.float32).model
    cuda = tiny(arch, options, dtype=torch.float32, device="cuda").model
    thetas = make_thetas(cpu)
    for model in (cpu, cuda):
        model.set_thetas(thetas)
        model.set_gamma(0.97)
    expected = run(cpu, IDS)
    for steps in (None, [1] * 12, [6, 6]):
        assert (run(cuda, IDS.cuda(), steps).cpu() - expected).abs().max() < 1e-3


# --- real models, against llama.cpp


@pytest.fixture(scope="module")
def real_golden() -> dict[str, Any]:
    return read_golden("models")


def test_greedy_text_of_a_real_model_equals_llama_cpp(stories, real_golden):
    golden = real_golden["stories"]["float32"]
    model = load_model(stories).model
    ids = torch.tensor([golden["prompt_ids"]])
    expected = golden["greedy"]["ids"]
    cache = model.new_cache(1, ids.shape[1] + len(expected))
    generated = []
    with torch.inference_mode():
        for _ in expected:
            ids = model(ids, cache, logits="last")[0, -1].argmax().view(1, 1)
            generated.append(int(ids))
    assert generated == expected


@pytest.mark.parametrize("name", ["stories", "smollm2", "gemma3", "qwen"])
def test_logits_of_real_models_equal_llama_cpp(name, request, real_golden):
    """With the same float32 weights; and near its usual run, which rounds activations to 8 bits."""
    model = load_model(request.getfixturevalue(name)).model
    golden = real_golden[name]
    with torch.inference_mode():
        logits = model(torch.tensor([golden["float32"]["prompt_ids"]]), logits=slice(-3, None))[0]
    for setting, tolerance in (("float32", 1e-3), ("default", 0.8)):
        for row, top in zip(logits, golden[setting]["top_logits"], strict=True):
            ids, values = zip(*top, strict=True)
            assert (row[list(ids)] - torch.tensor(values)).abs().max() < tolerance, setting
            assert int(row.argmax()) == ids[0], setting
