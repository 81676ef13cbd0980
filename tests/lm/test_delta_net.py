"""The gated delta net: many tokens together against one after another, and the states that are kept of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nkat.lm.cache import KVCache, State
from nkat.lm.delta_net import CHUNK, delta_rule, step, unit
from nkat.lm.load import load_model
from tests.support.tiny_models import write_tiny_model

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

IDS = torch.tensor([[(29 * i + 5) % 200 for i in range(3 * CHUNK + 7)]])


def inputs(count: int, dtype: torch.dtype = torch.float64, decay: float = 0.3) -> Inputs:
    """q, k, v, g and β of so many tokens, two sequences, three heads of 8 elements."""
    generator = torch.Generator().manual_seed(count)
    q, k, v = torch.randn(3, 2, 3, count, 8, generator=generator, dtype=torch.float64).to(dtype)
    g, beta = torch.rand(2, 2, 3, count, generator=generator, dtype=torch.float64).to(dtype)
    return unit(q, 1e-6), unit(k, 1e-6), v, -decay * g, beta


def one_by_one(tokens: Inputs, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    for i in range(tokens[0].shape[2]):
        q, k, v, g, beta = (t[:, :, i] for t in tokens)
        out, memory = step(q, k, v, g, beta, memory)
        outputs.append(out)
    return torch.stack(outputs, dim=2), memory


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 32, 45])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_chunks_equal_one_token_after_another(count: int, dtype: torch.dtype, tolerance: float) -> None:
    tokens = inputs(count, dtype)
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    expected, memory = one_by_one(tokens, start)
    found, after = delta_rule(*tokens, start, chunk=16)
    assert found.dtype == dtype
    assert gap(found, expected) < tolerance
    assert gap(after, memory) < tolerance
    assert gap(delta_rule(*tokens, torch.zeros_like(start), chunk=16)[0], expected) > 0.1  # the control


@pytest.mark.parametrize("decay", [0.0, 500.0])
def test_a_memory_that_keeps_or_forgets_everything(decay: float) -> None:
    """Numbers stay finite, gradients too, where exp of a difference would overflow."""
    tokens = tuple(t.requires_grad_() for t in inputs(40, decay=decay))
    start = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    found, _ = delta_rule(*tokens, start, chunk=16)
    assert gap(found, one_by_one(tokens, start)[0]) < 1e-12
    found.square().sum().backward()
    gradients = [t.grad for t in tokens]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_gradients_equal_those_of_one_token_after_another() -> None:
    """To what the tokens are, and to the memory before them."""
    gradients = []
    for rule in (lambda tokens, start: delta_rule(*tokens, start, chunk=16), one_by_one):
        tokens = tuple(t.requires_grad_() for t in inputs(37))
        start = torch.ones(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        out, memory = rule(tokens, start)
        (out.sin().sum() + memory.cos().sum()).backward()
        gradients.append([t.grad for t in (*tokens, start)])
    for chunked, plain in zip(*gradients, strict=True):
        assert plain.abs().max() > 1e-3
        assert gap(chunked, plain) < 1e-12


@pytest.mark.parametrize("arch", ["qwen35", "qwen3next"])
def test_a_long_text_through_the_cache_equals_one_pass(tmp_path: Path, arch: str) -> None:
    """Chunks begin elsewhere then, and decoding goes on from any place in one."""
    model = load_model(write_tiny_model(tmp_path / "tiny.gguf", arch), dtype=torch.float64).model
    with torch.inference_mode():
        whole = model(IDS)
        for steps in ([CHUNK, CHUNK + 1, 1, CHUNK + 5], [5, 1, 2 * CHUNK, CHUNK + 1]):
            cache = model.new_cache(1, IDS.shape[1])
            parts = [model(part, cache) for part in IDS.split(steps, dim=1)]
            assert gap(torch.cat(parts, dim=1), whole) < 1e-11


def test_sequences_of_a_batch_do_not_mix(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / "tiny.gguf", "qwen35"), dtype=torch.float64).model
    with torch.inference_mode():
        together = model(torch.cat([IDS, IDS.flip(1)]))
        assert gap(together[0], model(IDS)[0]) < 1e-11
        assert gap(together[1], model(IDS.flip(1))[0]) < 1e-11


# --- what is kept


def filled(cache: KVCache, tokens: int) -> None:
    """As a pass of so many tokens does, with the new length as every state's numbers."""
    for block in (0, 1):
        numbers = torch.full((1,), float(cache.length + tokens))
        cache.put_state(block, State(numbers, numbers))
    cache.advance(tokens)


def test_a_cache_goes_back_to_where_states_were_kept(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / "tiny.gguf", "qwen35")).model
    cache = model.new_cache(1, 100)
    assert cache.state(0) is None
    for tokens in (10, 5, 5):
        filled(cache, tokens)
        cache.keep_state(most=2)
    filled(cache, 3)
    assert [cache.reach(length) for length in (23, 22, 20, 19, 15, 14, 0)] == [23, 20, 20, 15, 15, 0, 0]
    with pytest.raises(ValueError, match="state after 19 tokens was not kept"):
        cache.length = 19
    cache.length = 15
    state = cache.state(1)
    assert state is not None
    assert float(state.memory) == 15
    assert cache.reach(100) == 15  # what came after is forgotten
    filled(cache, 1)
    cache.length = 15
    cache.length = 0
    assert cache.state(0) is None


def test_a_pass_that_was_interrupted_leaves_the_states_as_they_were(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / "tiny.gguf", "qwen35"), dtype=torch.float64).model
    cache = model.new_cache(1, 60)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.inference_mode():
        model(IDS[:, :20], cache)
        hook = model.blocks[3].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS[:, 30:40], cache)
        hook.remove()
        assert cache.length == 20
        assert gap(model(IDS[:, 20:30], cache), model(IDS[:, :30])[:, 20:]) < 1e-11


def test_its_bytes_are_those_of_keys_values_and_states(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / "tiny.gguf", "qwen35")).model
    cache = model.new_cache(1, 40)
    keys_and_values = 2 * 40 * 2 * 24 * 4  # of the one block with attention
    assert cache.nbytes == keys_and_values
    state = 3 * 4 * (3 * 128 + 4 * 16 * 16)  # blocks, float32: inputs before the convolution, memories
    with torch.inference_mode():
        model(IDS[:, :9], cache)
        assert cache.nbytes == keys_and_values + state
        cache.keep_state()
        assert cache.nbytes == keys_and_values + state  # the same one
        model(IDS[:, 9:10], cache)
        assert cache.nbytes == keys_and_values + 2 * state


def test_computing_a_block_again_changes_no_gradient(tmp_path: Path) -> None:
    """As a fit does it where the activations of all blocks have no room."""
    model = load_model(write_tiny_model(tmp_path / "tiny.gguf", "qwen35", blocks=2), dtype=torch.float64).model
    decay = model.blocks[0].delta_net
    assert decay is not None
    decay.decay.requires_grad_()
    gradients = []
    for recompute in (False, True):
        hidden = model.hidden(IDS[:, :20], recompute=recompute)
        gradients.append(torch.autograd.grad(hidden.sin().sum(), decay.decay)[0])
    assert float(gradients[0].abs().max()) > 1e-4
    assert gap(gradients[1], gradients[0]) < 1e-12
