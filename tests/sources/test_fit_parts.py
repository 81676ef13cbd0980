"""What a fit is made of: its losses, its layers, its batches."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
import torch.nn.functional as F

from nkat.errors import NKATError
from nkat.gguf.formats import dequantise
from nkat.lm.linear import StarLinear
from nkat.lm.load import load_model
from nkat.measure.chats import Conversation
from nkat.measure.judge import Passages
from nkat.measure.texts import Text, default_text
from nkat.sources.fit import loss as fit_loss
from nkat.sources.fit.data import (
    FitText,
    batch_at,
    chat_starts,
    chat_text,
    fit_text,
    split_chats,
    split_text,
    split_validation,
)
from nkat.sources.fit.descent import FitSettings, theta_start, to_thetas, visible_columns, zero_start
from nkat.sources.fit.layers import FittedLinear, ThetaMode, fitted_layers
from nkat.sources.fit.loss import Head, Teacher, vocabulary_loss
from nkat.sources.fit.rate import rate_scale
from nkat.sources.fit.state import FitState, check_place, load_state, save_state
from nkat.theta.algebra import quantise_factors
from nkat.theta.set import ThetaSet, truncate_rank
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.isa

N, D, V = 7, 12, 50
GAMMA = 0.97


def random_head(width: int, bias: bool, cap: float) -> Head:
    weight = torch.randn(V, width, dtype=torch.float64)
    return Head(weight, torch.randn(V, dtype=torch.float64) if bias else None, cap)


def reference_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden @ head.weight.T + (0.0 if head.bias is None else head.bias)
    return head.cap * torch.tanh(logits / head.cap) if head.cap else logits


def reference_loss(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor | None, teacher: Teacher | None
) -> torch.Tensor:
    logits = reference_logits(hidden, head)
    share = 0.0 if teacher is None else teacher.share
    loss = hidden.new_zeros(())
    if targets is not None:
        loss = loss + (1.0 - share) * F.cross_entropy(logits, targets, reduction="sum")
    if teacher is not None:
        wanted = F.softmax(reference_logits(teacher.hidden, teacher.head), dim=-1)
        loss = loss + share * F.kl_div(F.log_softmax(logits, dim=-1), wanted, reduction="sum")
    return loss


@pytest.mark.parametrize("tile", [1 << 24, 2 * V])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize(("bias", "cap"), [(False, 0.0), (True, 3.0)])
def test_loss_and_gradient_are_torchs(
    monkeypatch: pytest.MonkeyPatch, share: float | None, tile: int, bias: bool, cap: float
) -> None:
    monkeypatch.setattr(fit_loss, "_TILE_ELEMENTS", tile)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    head, targets = random_head(D, bias, cap), torch.randint(V, (N,))
    teacher = None
    if share is not None:  # of another width, as another model's may be
        teacher = Teacher(torch.randn(N, D + 3, dtype=torch.float64), random_head(D + 3, not bias, 2 * cap), share)
    expected = reference_loss(hidden, head, targets, teacher)
    (wanted,) = torch.autograd.grad(expected, hidden)
    loss = vocabulary_loss(hidden, head, targets, teacher)
    (found,) = torch.autograd.grad(3.0 * loss, hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, 3.0 * wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [None, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_kernels_loss_is_the_same(
    monkeypatch: pytest.MonkeyPatch, share: float | None, bias: bool, dtype: torch.dtype
) -> None:
    """For the same logits: those that a product in this dtype gives."""
    hidden = torch.randn(N, D, requires_grad=True)
    weight, offset = torch.randn(V, D, dtype=dtype), torch.randn(V, dtype=dtype)
    head, targets = Head(weight, offset if bias else None), torch.randint(V, (N,))
    teacher = None if share is None else Teacher(torch.randn(N, D), Head(weight.roll(1, 0), None), share)
    sides = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(fit_loss, "_have_kernels", lambda *heads: False)
        loss = vocabulary_loss(hidden, head, targets, teacher)
        sides.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    (loss, gradient), (wanted_loss, wanted_gradient) = sides
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    assert float((gradient - wanted_gradient).norm()) < tolerance * float(wanted_gradient.norm())
    assert float((gradient.roll(1, 0) - wanted_gradient).norm()) > 0.1 * float(wanted_gradient.norm())  # control


def test_divergence_from_itself_is_zero_and_only_then() -> None:
    hidden, head = torch.randn(N, D), Head(torch.randn(V, D))
    leaf = hidden.clone().requires_grad_()
    same = vocabulary_loss(leaf, head, None, Teacher(hidden, head))
    same.backward()
    assert abs(float(same.detach())) < 1e-5
    assert float(leaf.grad.abs().max()) < 1e-5
    assert float(vocabulary_loss(hidden, head, None, Teacher(hidden.roll(1, 0), head))) > 0.1  # control


def star_linear(
    m: int, n: int, dtype: torch.dtype = torch.float64, bias: bool = True, keep_dense: bool = False
) -> StarLinear:
    values = gguf.quants.quantize(torch.randn(m, n).numpy(), gguf.GGMLQuantizationType.Q8_0)
    packed = torch.from_numpy(values).flatten()
    b = torch.randn(m) if bias else None
    qtype = gguf.GGMLQuantizationType.Q8_0
    return StarLinear(packed, qtype, (m, n), dtype=dtype, bias=b, keep_dense=keep_dense)


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 96)])
def test_a_rounded_layer_is_the_star_layer(shape: tuple[int, int]) -> None:
    layer = star_linear(*shape)
    factors = [torch.randn(max(shape), 3) * 0.1 for _ in range(2)]
    fitted = FittedLinear(layer, tuple(factors), ThetaMode(rounded=True))
    x = torch.randn(2, 5, shape[1], dtype=torch.float64)
    layer.set_theta(to_thetas({"w": tuple(factors)}, GAMMA)["w"])
    layer.set_gamma(GAMMA)
    torch.testing.assert_close(fitted(x), layer(x), rtol=1e-5, atol=1e-6)
    fitted.mode.rounded = False
    assert not torch.allclose(fitted(x), layer(x), rtol=1e-5, atol=1e-6)  # control: the rounding is felt


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 96), (576, 576)])
def test_an_inactive_fit_changes_no_bit(shape: tuple[int, int], keep_dense: bool, dtype: torch.dtype) -> None:
    """A bias added after the product would: on AMD at any size, on Intel where BLAS splits sums (576), in bfloat16."""
    layer = star_linear(*shape, dtype=dtype, keep_dense=keep_dense)
    factors = (torch.randn(max(shape), 3), torch.randn(max(shape), 3))
    fitted = FittedLinear(layer, factors, ThetaMode(active=False))
    for rows in [(2, 5), (1, 1), (1, 64)]:  # each may take another kernel
        x = torch.randn(*rows, shape[1], dtype=dtype)
        expected = layer(x)
        assert torch.equal(fitted(x), expected)
        fitted.mode.active = True
        assert not torch.equal(fitted(x), expected)  # control: active, it is another layer
        fitted.mode.active = False
        if dtype == torch.bfloat16:  # control: the order is felt, in so few bits everywhere
            weight = dequantise(layer.packed, layer.qtype, shape).to(dtype)
            assert not torch.equal(F.linear(x, weight) + layer.bias, expected)


def test_a_model_under_an_inactive_fit_changes_no_bit(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / "m.gguf", "qwen2")).model  # whose attention has biases
    layers = model.star_linears()
    assert layers["blk.0.attn_q.weight"].bias is not None
    tokens = torch.randint(40, (2, 9))
    expected = model(tokens)
    factors = {name: (torch.randn(max(w.shape), 2), torch.randn(max(w.shape), 2)) for name, w in layers.items()}
    with fitted_layers(model, factors) as (_, mode):
        mode.active = False
        assert torch.equal(model(tokens), expected)
        mode.active = True
        assert not torch.allclose(model(tokens), expected, atol=0.1)  # control


def test_gradients_are_those_of_the_dense_formula() -> None:
    layer = star_linear(32, 64)
    fitted = FittedLinear(layer, (torch.randn(64, 2), torch.randn(64, 2)), ThetaMode())
    fitted.double()
    x = torch.randn(1, 3, 64, dtype=torch.float64, requires_grad=True)

    def dense(x: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        layer.set_gamma(None)
        weight = layer(torch.eye(64, dtype=torch.float64)).T - layer.bias[:, None]
        theta = p @ q.T - q @ p.T
        return x @ (weight + theta[:32, :64]).T + layer.bias

    direction = torch.randn(1, 3, 32, dtype=torch.float64)
    inputs = (x, fitted.p, fitted.q)
    found = torch.autograd.grad((fitted(x) * direction).sum(), inputs)
    wanted = torch.autograd.grad((dense(*inputs) * direction).sum(), inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert float(wanted[1].abs().max()) > 0.1  # control: there is a gradient to compare


def test_rounding_is_that_of_the_file_with_a_gradient_of_one() -> None:
    p, q = torch.randn(20, 3), torch.randn(20, 3)
    layer = FittedLinear(
        star_linear(16, 32, torch.float32), (F.pad(p, (0, 0, 0, 12)), F.pad(q, (0, 0, 0, 12))), ThetaMode()
    )
    from nkat.sources.fit.layers import round_straight_through

    stored = quantise_factors(layer.p.detach(), layer.q.detach())
    torch.testing.assert_close(round_straight_through(layer.p).detach(), stored.factors()[0], rtol=0, atol=1e-7)
    (gradient,) = torch.autograd.grad(round_straight_through(layer.p).sum(), layer.p)
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_hidden_columns_are_a_lower_rank() -> None:
    layer = star_linear(32, 64)
    mode = ThetaMode(rounded=True)
    factors = (torch.randn(64, 4), torch.randn(64, 4))
    fitted = FittedLinear(layer, factors, mode)
    x = torch.randn(3, 2, 64, dtype=torch.float64)
    mode.columns = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    found = fitted(x)
    whole = ThetaSet(to_thetas({"w": factors}, GAMMA), GAMMA, "fit", 0, "", "", 0)
    layer.set_gamma(GAMMA)
    for i, rank in enumerate((1, 2, 4)):
        layer.set_theta(truncate_rank(whole, rank).layers["w"])
        torch.testing.assert_close(found[i], layer(x[i]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], layer(x[0]), rtol=1e-3)  # control


def test_layers_are_put_back(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / "m.gguf", "llama")).model
    before = model.star_linears()
    name = "blk.0.attn_q.weight"
    tokens = torch.randint(40, (1, 9))
    with torch.no_grad():
        expected = model(tokens)
        factors = {name: zero_start([before[name].shape], 2, 0)[0]}
        with fitted_layers(model, factors) as (layers, _):
            assert model.blocks[0].linears["attn_q"] is layers[name]
            torch.testing.assert_close(model(tokens), expected)  # a zero start is Θ = 0
            layers[name].q.add_(0.5)
            assert not torch.allclose(model(tokens), expected)
        assert model.star_linears() == before
        assert torch.equal(model(tokens), expected)


def test_recomputing_changes_no_gradient(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / "m.gguf", "gemma3"), dtype=torch.float64).model
    layers = model.star_linears()
    factors = {"blk.1.ffn_up.weight": zero_start([layers["blk.1.ffn_up.weight"].shape], 2, 0)[0]}
    tokens = torch.randint(40, (2, 9))
    found = []
    for recompute in (False, True):
        with fitted_layers(model, factors) as (fitted, _):
            model.hidden(tokens, recompute=recompute).square().sum().backward()
            found.append(fitted["blk.1.ffn_up.weight"].q.grad)
    torch.testing.assert_close(found[0], found[1])
    assert float(found[0].abs().max()) > 0


def test_theta_and_factors_convert_back_and_forth() -> None:
    shapes = [(32, 64), (64, 32)]
    thetas = [quantise_factors(torch.randn(64, 2), torch.randn(64, 2)) for _ in shapes]
    back = to_thetas(dict(zip("ab", theta_start(thetas, shapes, GAMMA), strict=True)), GAMMA)
    for name, theta in zip("ab", thetas, strict=True):
        assert torch.equal(back[name].p, theta.p)
        assert torch.equal(back[name].q, theta.q)
        torch.testing.assert_close(back[name].scale, theta.scale)
    other = to_thetas(dict(zip("ab", theta_start(thetas, shapes, GAMMA), strict=True)), 0.9)  # control: γ matters
    assert not torch.allclose(other["a"].scale, thetas[0].scale)


def numbered(count: int, ignored: int = 0) -> FitText:
    marks = torch.zeros(count, dtype=torch.bool)
    marks[:ignored] = True
    return FitText(torch.arange(count), marks, None)


def test_an_epoch_reads_every_sequence_once() -> None:
    text = numbered(10 * 16 + 5)
    batches = [batch_at(text, first, 2, 16, 3).tokens for first in range(0, 10, 2)]
    starts = sorted(int(row[0]) for batch in batches for row in batch)
    assert len(set(starts)) == 10
    assert all(b - a == 16 for a, b in itertools.pairwise(starts))
    second = sorted(int(batch_at(text, first, 1, 16, 3).tokens[0, 0]) for first in range(10, 20))
    order = [int(batch_at(text, first, 1, 16, 3).tokens[0, 0]) for first in range(10, 20)]
    assert order != [int(b) for batch in batches for b in batch[:, 0]]  # the next epoch goes another way
    assert len(set(second)) == 10


def test_batches_depend_on_their_arguments_alone() -> None:
    text = numbered(500)
    whole = batch_at(text, 4, 4, 32, 1).tokens
    halves = torch.cat([batch_at(text, 4, 2, 32, 1).tokens, batch_at(text, 6, 2, 32, 1).tokens])
    assert torch.equal(whole, halves)
    assert not torch.equal(whole, batch_at(text, 4, 4, 32, 2).tokens)


def test_what_is_ignored_is_not_learned(tmp_path: Path) -> None:
    tokenizer = load_model(write_tiny_model(tmp_path / "m.gguf", "llama")).tokenizer
    text = fit_text(tokenizer, Text("t", "and then <unk> in the <unk> there", ""), ["<unk>"])
    hidden = text.tokens[text.ignored].tolist()
    assert tokenizer.decode(hidden).count("<unk>") == 2
    assert "<unk>" not in tokenizer.decode(text.tokens[~text.ignored].tolist())
    with pytest.raises(NKATError, match="holds no 'zebra'"):
        fit_text(tokenizer, Text("t", "and then", ""), ["zebra"])
    assert torch.equal(batch_at(numbered(8, ignored=3), 0, 1, 8, 0).counted[0], torch.tensor([False] * 2 + [True] * 5))


def test_validation_is_kept_back(tmp_path: Path) -> None:
    text = FitText(torch.arange(20_000), torch.zeros(20_000, dtype=torch.bool), bos=None)
    learned, validation = split_validation(text, "t", 256)
    assert set(learned.tokens.tolist()).isdisjoint(validation.chunks.flatten().tolist())
    assert len(learned.tokens) + validation.chunks.numel() == 20_000
    assert bool(validation.counted.all())
    with_bos = split_validation(FitText(text.tokens, text.ignored, bos=7), "t", 256)[1]
    assert bool((with_bos.chunks[:, 0] == 7).all())
    ignored = torch.zeros(20_000, dtype=torch.bool)
    ignored[-3:] = True
    counted = split_validation(FitText(text.tokens, ignored, None), "t", 256)[1].counted
    assert counted.sum() == counted.numel() - 3
    assert not counted[-1, -3:].any()
    with pytest.raises(NKATError, match="needs at least 1280"):
        split_validation(numbered(1279), "t", 256)
    split_validation(numbered(1280), "t", 256)
    tokenizer = load_model(write_tiny_model(tmp_path / "m.gguf", "llama")).tokenizer
    assert len(fit_text(tokenizer, default_text()).tokens) > 20_000


def test_the_guards_part_is_the_first_tenth_and_is_not_learned() -> None:
    text = FitText(torch.arange(40_000), torch.zeros(40_000, dtype=torch.bool), bos=None)
    parts = split_text(text, "t", 256)
    assert parts.own.chunks.flatten().tolist() == list(range(4 * 512))
    validated = parts.validation.chunks.numel()
    assert parts.learned.tokens.tolist() == list(range(4 * 512, 40_000 - validated))
    assert split_text(numbered(18_000), "t", 256).own.chunks.shape == (3, 512)  # a tenth; above, no more than is judged
    short = split_text(numbered(1280 + 511), "t", 256)
    assert short.own is None
    assert len(short.learned.tokens) == 256 + 511
    assert split_text(numbered(1280 + 512), "t", 256).own.chunks.shape == (1, 512)


def conversation(start: int, length: int, answer: int) -> Conversation:
    return Conversation(torch.arange(start, start + length), torch.arange(length) >= length - answer)


def test_sequences_of_chats_begin_where_chats_do() -> None:
    assert chat_starts([30, 30, 30, 30], 64) == [0, 56]  # two fit, the third is cut and begins the next
    assert chat_starts([64, 64], 64) == [0, 64]
    assert chat_starts([200, 10], 64) == [0, 32, 64, 96, 128, 146]
    lengths = [17, 80, 5, 64, 130, 3, 40]
    starts = chat_starts(lengths, 64)
    covered = {place for start in starts for place in range(start, start + 64)}
    assert covered >= set(range(sum(lengths)))
    chats = [conversation(0, 40, 5), conversation(40, 100, 3), conversation(140, 60, 10)]
    text = chat_text(chats, 7, 64)
    for first in range(4):
        batch = batch_at(text, first, 1, 64, 0)
        assert bool(batch.counted.any())
        assert int(batch.tokens[0, 0]) == 7
    learned = set()
    for first in range(len(text.starts)):
        batch = batch_at(text, first, 1, 64, 0)
        learned |= set(batch.tokens[:, 1:][batch.counted].tolist())
    assert learned == {*range(35, 40), *range(137, 140), *range(190, 200)}


def test_chats_are_split_between_conversations(tmp_path: Path) -> None:
    tokenizer = load_model(write_tiny_model(tmp_path / "m.gguf", "llama", blocks=1)).tokenizer
    chats = [conversation(100 * i, 100, 20) for i in range(30)]
    parts = split_chats(chats, "c.jsonl", tokenizer, 64, 128)

    def answers(passages: Passages) -> set[int]:
        scored = passages.chunks[:, -passages.counted.shape[1] :]
        return set(scored[passages.counted].tolist())

    whole = [set(chat.tokens[chat.said].tolist()) for chat in chats]
    assert answers(parts.own) == set().union(*whole[:3])
    assert answers(parts.validation) == set().union(*whole[27:])
    assert parts.learned.tokens.tolist() == list(range(300, 2700))
    with pytest.raises(NKATError, match=r"c\.jsonl: 2 chats are too few"):
        split_chats(chats[:2], "c.jsonl", tokenizer, 64, 128)
    with pytest.raises(NKATError, match="those to learn from have 100 tokens, and a sequence has 256"):
        split_chats(chats[:3], "c.jsonl", tokenizer, 256, 128)
    with pytest.raises(NKATError, match="messages are empty"):
        split_chats([conversation(100 * i, 100, 0) for i in range(3)], "c.jsonl", tokenizer, 64, 128)


def test_columns_seen() -> None:
    seen = visible_columns(0, 400, 8, 0)
    assert bool(seen[::2].all())
    counts = seen[1::2].sum(dim=1)
    assert set(counts.tolist()) == set(range(1, 9))
    assert torch.equal(seen, torch.arange(8) < seen.sum(dim=1, keepdim=True))  # always the first ones
    assert torch.equal(visible_columns(100, 50, 8, 0), seen[100:150])
    assert not torch.equal(visible_columns(0, 400, 8, 1), seen)


def test_the_rate_grows_with_the_root_of_the_weights_size() -> None:
    def of_size(size: float) -> float:
        layers = {f"blk.{i}.attn_q.weight": StarWeight(size if i == 1 else 9.0) for i in range(3)}
        blocks = [SimpleNamespace(index=i, linears={"attn_q": None}) for i in range(3)]
        return rate_scale(SimpleNamespace(blocks=blocks, star_linears=lambda: layers))

    class StarWeight:
        def __init__(self, size: float) -> None:
            self.size = size

        def weight(self) -> torch.Tensor:
            return torch.tensor([[self.size, -self.size]])

    assert of_size(0.19) == pytest.approx(1.0)
    assert of_size(0.0475) == pytest.approx(0.5)
    assert of_size(0.9) == 1.0
    assert of_size(1e-4) == pytest.approx(1 / 3)


def test_schedule() -> None:
    settings = FitSettings(4, GAMMA, steps=100, warmup=10, learning_rate=1.0, int8_share=0.25)
    rates = [settings.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates[-1] < 0.001
    assert [settings.rounds_at(step) for step in (74, 75)] == [False, True]


def _state(path: Path) -> dict:
    """What a fit of two layers writes behind a step and a validation."""
    factors = [torch.ones(4, 2, requires_grad=True) for _ in range(4)]
    optimizer = torch.optim.AdamW(factors, fused=True)
    sum(factor.sum() for factor in factors).backward()
    optimizer.step()
    kept = [factor.detach() for factor in factors]
    row = {"step": 3, "loss": 1.0, "validation_nll": 1.0}
    save_state(path, FitState("zero", 3, kept, optimizer.state_dict(), 3, 1.0, kept, {1: kept}, [row]), "me")
    return torch.load(path, weights_only=True)


def test_damaged_states_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "fit.state"
    good = _state(path)
    assert load_state(path, "me").step == 3
    odd: list[object] = [None, True, -1, 10**30, math.nan, "x", [1], {"a": 1}, torch.zeros(0), torch.ones(3, 3)]
    odd.append(torch.zeros(4, 2, dtype=torch.complex64))
    changes: list[dict[str, object]] = [{key: value} for key in good for value in odd if (key, value) != ("start", "x")]
    changes += [{"factors": good["factors"][:3]}, {"factors": [torch.full((4, 2), math.nan)] * 4}, {"best_factors": []}]
    changes += [{"snapshots": {2: value}} for value in odd] + [{"snapshots": {4: good["factors"]}}]
    changes += [{"history": [{**good["history"][0], name: value}]} for name in good["history"][0] for value in odd]
    moments = good["optimizer"]["state"]
    for state in [
        *({**moments, 0: {**moments[0], name: value}} for name in moments[0] for value in odd),
        *({**moments, 0: {k: v for k, v in moments[0].items() if k != name}} for name in moments[0]),
        {**moments, 7: moments[0]},
        {k: v for k, v in moments.items() if k},
        *odd,
    ]:
        changes.append({"optimizer": {**good["optimizer"], "state": state}})
    records: list[object] = [good | change for change in [*changes, {"more": 1}]]
    records += [{k: v for k, v in good.items() if k != key} for key in good]
    for record in [*records, [], 5]:
        torch.save(record, path)
        with pytest.raises(NKATError):
            load_state(path, "me")
    if os.name == "nt":
        return
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(NKATError, match="no file"):
        load_state(path, "me")


def test_a_state_is_of_this_model_and_this_many_steps(tmp_path: Path) -> None:
    _state(tmp_path / "s")
    state = load_state(tmp_path / "s", "me")
    check_place(state, [(4, 2), (4, 2)], 3, tmp_path)
    for shapes, steps in (([(4, 2)], 3), ([(4, 2), (5, 2)], 3), ([(4, 2), (4, 2)], 2)):
        with pytest.raises(NKATError, match="damaged"):
            check_place(state, shapes, steps, tmp_path)
