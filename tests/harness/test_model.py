"""A model as an evaluation asks of it: pairs of texts, answers, chats. Without lm-eval."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nkat.engine.decoder import make_decoder
from nkat.engine.generate import Sampler, Sampling, generate
from nkat.errors import NKATError
from nkat.harness.arguments import ModelArguments
from nkat.harness.generation import GenerationSettings
from nkat.harness.model import EvaluatedModel
from nkat.lm.chat import render_chat
from nkat.lm.load import load_model
from tests.support.tiny_models import write_tiny_model

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GREEDY = {"until": [], "max_gen_toks": 12}
GREEDIEST = Sampling(temperature=0.0)


def opened(folder: Path, arch: str = "llama", *, given: dict[str, Any] | None = None, **options: Any) -> EvaluatedModel:
    path = folder / "tiny.gguf"
    if not path.exists():
        write_tiny_model(path, arch, **options)
    return EvaluatedModel(ModelArguments.of({"path": str(path), **(given or {})}))


def answers(model: EvaluatedModel, *asked: tuple[str, dict[str, Any]], seed: int = 0) -> list[str]:
    found = dict(model.answers([(text, GenerationSettings.of(given)) for text, given in asked], seed))
    return [found[number] for number in range(len(asked))]


@torch.inference_mode()
def expected(model: EvaluatedModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By the forward pass of the same file in float64."""
    exact = load_model(model.arguments.path, dtype=torch.float64).model
    ids = torch.tensor([[*context, *continuation]])
    logits = exact(ids[:, :-1])[0, -len(continuation) :]
    targets = ids[0, -len(continuation) :]
    chosen = logits.log_softmax(dim=1)[torch.arange(len(targets)), targets]
    return float(chosen.sum()), bool((logits.argmax(dim=1) == targets).all())


def check(model: EvaluatedModel, pairs: list[tuple[list[int], list[int]]]) -> None:
    found = {number: (total, greedy) for number, total, greedy in model.likelihoods(pairs)}
    for number, (context, continuation) in enumerate(pairs):
        total, greedy = expected(model, context, continuation)
        assert found[number][0] == pytest.approx(total, abs=1e-4)
        assert found[number][1] == greedy


# --- texts and likelihoods


def test_a_pair_is_parted_where_the_context_ends(tmp_path):
    model = opened(tmp_path)
    context, continuation = model.encode_pair("the hen in", " the inn")
    assert [*context, *continuation] == model.encode("the hen in the inn")
    assert context == model.encode("the hen in")
    assert model.encode_pair("the hen in ", "the inn") == (context, continuation)  # the space goes over
    alone = model.encode_pair("", "the inn")
    assert alone == ([model.prefix], model.encode("the inn"))
    assert model.encode_pair("  ", "the inn") == ([model.prefix], model.encode("  the inn"))


def test_one_first_token_where_the_vocabulary_has_it(tmp_path):
    model = opened(tmp_path, "gemma3")
    first = model.tokenizer.bos_id
    assert first is not None
    text = model.tokenizer.decode_bytes([first]).decode()
    assert model.encode("the inn")[0] == first != model.encode("the inn")[1]
    assert model.encode(f"{text}the inn").count(first) == 1  # a template has put it there
    assert first not in model.encode("the inn", alone=False)
    assert model.encode_pair("", "the inn")[0] == [first]
    assert model.encode_pair("", f"{text}the inn") == model.encode_pair("", "the inn")


def test_likelihoods_equal_the_oracle(tmp_path):
    model = opened(tmp_path)
    pairs = [model.encode_pair("the hen and the", answer) for answer in (" inn", " an inn in the hen", "x", " inn and")]
    context = pairs[0][0]
    likeliest = int(load_model(model.arguments.path).model(torch.tensor([context]))[0, -1].argmax())
    pairs += [(context, [likeliest]), model.encode_pair("", "the hen")]
    check(model, pairs)
    found = {number: (total, greedy) for number, total, greedy in model.likelihoods(pairs)}
    assert [found[number][1] for number in range(5)] == [False, False, False, False, True]
    assert abs(found[0][0] - found[2][0]) > 0.01  # the control: another answer to the same question


def test_of_a_long_context_the_end_is_taken(tmp_path, caplog):
    model = opened(tmp_path, given={"max_length": 20})
    context, continuation = list(range(3, 40)), [7, 8, 9]
    check(model, [(context[-18:], continuation)])
    short = list(model.likelihoods([(context[-18:], continuation)]))
    assert not caplog.records
    assert list(model.likelihoods([(context, continuation)])) == short
    assert [record.getMessage() for record in caplog.records] == [
        "1 request of 1 longer than max_length (20 tokens): the beginning was cut off"
    ]
    assert list(model.likelihoods([(context[-17:], continuation)])) != short
    with pytest.raises(NKATError, match="its continuation has 21 tokens"):
        list(model.likelihoods([([1], list(range(21)))]))
    with pytest.raises(NKATError, match="request 1: its continuation adds no token"):
        list(model.likelihoods([([1], [2]), ([1], [])]))


# --- answers


def alone(model: EvaluatedModel, text: str, max_tokens: int, sampling: Sampling = GREEDIEST, seed: int = 0) -> str:
    """What the engine writes."""
    prompt = model.encode(text)
    decoder = make_decoder(model.writing.model, len(prompt) + max_tokens)
    sampler = Sampler(sampling, seed)
    return generate(decoder, model.tokenizer, prompt, sampler, max_tokens=max_tokens, on_text=lambda _: None).text


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_answers_are_the_engines(tmp_path, activations):
    """Whatever was asked before: prompts that share a beginning, one that is another's beginning, the same again."""
    model = opened(tmp_path, given={"activations": activations})
    texts = ["the hen and the inn", "the hen and the hen", "the hen", "an inn", "the hen and the inn"]
    found = answers(model, *((text, GREEDY) for text in texts))
    assert found == [alone(model, text, 12) for text in texts]
    assert len(set(found)) > 2


def test_an_answer_ends_before_the_first_stop(tmp_path):
    model = opened(tmp_path)
    (whole,) = answers(model, ("the hen and the inn", GREEDY))
    assert len(whole) > 6
    late, early = whole[4:7], whole[2:4]
    (found,) = answers(model, ("the hen and the inn", {**GREEDY, "until": [late, early, "nowhere"]}))
    assert found == whole[: min(whole.index(late), whole.index(early))]
    (found,) = answers(model, ("the hen and the inn", {**GREEDY, "until": whole[0]}))
    assert found == ""
    assert answers(model, ("the hen and the inn", {"until": ["nowhere"], "max_gen_toks": 12})) == [whole]


def test_chance_follows_the_seed(tmp_path):
    model = opened(tmp_path)
    asked = ("the hen", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12})
    once = answers(model, asked, asked, seed=5)
    assert once == answers(model, asked, asked, seed=5)
    assert once[0] != once[1]
    assert once != answers(model, asked, asked, seed=6)
    assert once[0] == alone(model, "the hen", 12, Sampling(1.5, 0, 1.0, 0.0), seed=5)
    assert answers(model, ("the hen", {**asked[1], "do_sample": False})) == answers(model, ("the hen", GREEDY))


def test_of_a_long_prompt_the_end_is_taken(tmp_path, caplog):
    model = opened(tmp_path, given={"max_length": 20})
    long = "the hen and " * 20
    ids = model.encode(long)[-8:]
    short = model.tokenizer.decode_bytes(ids).decode()
    assert model.encode(short) == ids
    assert answers(model, (long, GREEDY)) == answers(model, (short, GREEDY))
    assert len(caplog.records) == 1
    with pytest.raises(NKATError, match="leaves no room for a prompt"):
        answers(model, ("the hen", {"max_gen_toks": 20}))


# --- chats


def test_chats_are_the_templates(tmp_path):
    model = opened(tmp_path, chat_template=CHATML)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " why? "}]
    assert model.choose_template(False) is None
    before = model.template_name
    assert model.choose_template(True) == CHATML
    assert model.chat(messages) == "<system>be brief</><user>why?</><assistant>"
    assert model.chat(messages) == render_chat(model.loaded.gguf.metadata, model.tokenizer, messages)
    begun = [*messages, {"role": "assistant", "content": "Because "}]
    assert model.chat(begun, answer=False) == "<system>be brief</><user>why?</><assistant>Because"
    assert model.template_name == before
    assert "/" not in before
    with pytest.raises(NKATError, match="no chat template named 'tools'"):
        model.choose_template("tools")


def test_without_a_template(tmp_path):
    model = opened(tmp_path)
    with pytest.raises(NKATError, match="leave --apply_chat_template out"):
        model.choose_template(True)


# --- what cannot be


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs path=FILE"),
        ({"path": "m.gguf", "pretrained": "gpt2"}, "pretrained is not known to the model nkat; known are path, theta"),
        ({"path": "m.gguf", "gamma": "strong"}, "gamma must be a number, got strong"),
        ({"path": "m.gguf", "gamma": True}, "gamma must be a number"),
        ({"path": "m.gguf", "threads": 0}, "threads must be a whole number from 1 on, got 0"),
        ({"path": "m.gguf", "threads": 1.5}, "threads must be a whole number"),
        ({"path": "m.gguf", "max_length": 1}, "max_length must be a whole number from 2 on"),
        ({"path": "m.gguf", "activations": "int4"}, "activations must be float or int8, got int4"),
        ({"path": "m.gguf", "batch_size": "many"}, "--batch_size must be auto or a whole number"),
    ],
)
def test_arguments_that_cannot_be(given, message):
    with pytest.raises(NKATError, match=message):
        ModelArguments.of(given)


def test_arguments():
    given = {
        "path": "~/m.nkat",
        "theta": "t.bin",
        "gamma": 1,
        "threads": 2,
        "activations": "int8",
        "batch_size": "auto",
    }
    found = ModelArguments.of({**given, "max_length": 64})
    assert found == ModelArguments(Path("~/m.nkat").expanduser(), Path("t.bin"), 1.0, 2, "int8", 64, None)
    assert ModelArguments.of({"path": "m", "batch_size": 1}).batch_size is None  # lm-eval's own default
    assert ModelArguments.of({"path": "m", "batch_size": "8"}).batch_size == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gamma": 0.9}, "has no Θ, so gamma has no meaning"),
        ({"max_length": 1 << 20}, "more than the 2048 the model was made for"),
        ({"path": "nowhere.gguf"}, "nowhere.gguf"),
        ({"threads": 100_000}, "must be within 1"),
    ],
)
def test_models_that_cannot_be(tmp_path, given, message):
    with pytest.raises(NKATError, match=message):
        opened(tmp_path, given=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "has num_beams = 1 only, got 4"),
        ({"bad_words": ["x"], "seed": 1}, "bad_words, seed is not known"),
        ({"until": [3]}, "until must be texts"),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number from 1 on"),
        ({"max_gen_toks": "12"}, "max_gen_toks must be a whole number"),
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number"),
        ({"do_sample": True, "top_p": 2.0}, "top-p must be"),
    ],
)
def test_generation_that_cannot_be(given, message):
    with pytest.raises(NKATError, match=message):
        GenerationSettings.of(given)


def test_generation_settings():
    greedy = Sampling(temperature=0.0)
    assert GenerationSettings.of({}) == GenerationSettings((), 256, greedy)
    given = {"until": ["\n", "", "Q:"], "do_sample": False, "temperature": 0.7, "max_gen_toks": 5, "num_beams": 1}
    assert GenerationSettings.of(given) == GenerationSettings(("\n", "Q:"), 5, greedy)
    assert GenerationSettings.of({"until": "\n", "max_new_tokens": 9}) == GenerationSettings(("\n",), 9, greedy)
    chance = GenerationSettings.of({"do_sample": True, "top_k": -1, "top_p": 0.9}).sampling
    assert chance == Sampling(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0)
    assert GenerationSettings.of({"temperature": 0.5}).sampling.temperature == 0.5
