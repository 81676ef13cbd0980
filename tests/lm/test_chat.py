"""Chat templates: real ones by hand, what transformers gives a template, and what the sandbox refuses."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.lm.chat import TEMPLATE_KEY, chat_messages, encode_chat, render_chat, render_chats
from nkat.lm.load import load_model
from nkat.lm.template_process import TemplateProcess
from nkat.lm.tokenizer import Tokenizer
from tests.support.tiny_models import write_tiny_model

PLAIN = """\
{% for message in messages %}
    {% if message['role'] == 'user' %}
<|im_start|>{{ message['content'] }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>
{% endif %}
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Adds no BOS."""
    return _tokenizer(tmp_path_factory.mktemp("chat") / "llama.gguf", "llama")


@pytest.fixture(scope="module")
def adding(tmp_path_factory) -> Tokenizer:
    """Adds BOS."""
    return _tokenizer(tmp_path_factory.mktemp("chat") / "gemma.gguf", "gemma3")


def _tokenizer(path: Path, arch: str) -> Tokenizer:
    return load_model(write_tiny_model(path, arch)).tokenizer


def render(tokenizer: Tokenizer, template: str, prompt: str = "Hi", system: str | None = None) -> str:
    return render_chat({TEMPLATE_KEY: template}, tokenizer, chat_messages(prompt, system))


# --- real templates


def test_chatml_of_smollm2(smollm2: Path) -> None:
    file = GGUFFile.open(smollm2)
    tokenizer = Tokenizer.from_metadata(file.metadata)
    assert render_chat(file.metadata, tokenizer, chat_messages("What is 2+2?")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    own = render_chat(file.metadata, tokenizer, chat_messages("What is 2+2?", "Be short."))
    assert own.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n")
    assert encode_chat(tokenizer, own)[0] == tokenizer.bos_id  # <|im_start|> is this vocabulary's BOS, and not doubled
    assert encode_chat(tokenizer, own)[1] != tokenizer.bos_id


def test_template_of_qwen_with_its_branch_for_tools(qwen: Path) -> None:
    file = GGUFFile.open(qwen)
    text = render_chat(file.metadata, Tokenizer.from_metadata(file.metadata), chat_messages("Hello"))
    assert text == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_model_without_a_template_is_refused(gemma3: Path) -> None:
    file = GGUFFile.open(gemma3)
    with pytest.raises(NKATError, match="no chat template"):
        render_chat(file.metadata, Tokenizer.from_metadata(file.metadata), chat_messages("Hello"))


# --- what a template can count on


def test_blocks_leave_no_white_space(tokenizer: Tokenizer) -> None:
    import jinja2

    assert render(tokenizer, PLAIN) == "<|im_start|>Hi<|im_end|>\n<|im_start|>\n"
    plain = jinja2.Environment().from_string(PLAIN).render(messages=chat_messages("Hi"), add_generation_prompt=True)
    assert plain != render(tokenizer, PLAIN)  # the control: Jinja's own defaults keep the indentation


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<|endoftext|>|<|im_end|>"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "é <b>"}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}.", "é <b>."),
        ("{% if tools %}tools{% else %}none{% endif %}", "none"),
        ("{% if documents is none %}none{% endif %}", "none"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
    ],
)
def test_what_transformers_offers(tokenizer: Tokenizer, template: str, expected: str) -> None:
    assert render(tokenizer, template, "é <b>") == expected


def test_the_date(tokenizer: Tokenizer) -> None:
    before = datetime.now().year
    assert before <= int(render(tokenizer, "{{ strftime_now('%Y') }}")) <= datetime.now().year


def test_system_message_comes_first(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    assert render(tokenizer, template, "a", "b") == "[system:b][user:a]"
    assert render(tokenizer, template, "a") == "[user:a]"


# --- what it cannot do


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('system role is not supported') }}", "system role is not supported"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ nothing.at.all }}", "undefined"),
        ("", "no chat template"),
        ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "calls itself"),
        ("{{ 'a' * 10000000000000 }}", "more memory"),
        (
            "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "memory",
        ),
        ("{{ messages | dictsort }}", "has no attribute"),
        ("{% for m in messages %}{{ m.content }", "unexpected"),
        ("{{ messages[0].content.foo.bar }}", "no attribute"),
        ("{{ 'x' * 70000 }}", "it makes 70,000 characters of"),
        (r"{{ '\ud800' }}", "its text is not valid Unicode"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "."),
    ],
)
def test_templates_that_fail_are_one_line(tokenizer: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(NKATError, match=message) as caught:
        render(tokenizer, template)
    assert "\n" not in str(caught.value)


def test_a_template_that_does_not_end_is_ended(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr("nkat.lm.template_process.SECONDS", 1)
    with pytest.raises(NKATError, match="not done after 1 seconds"):
        render(tokenizer, loop)


def test_one_process_for_many_conversations(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives through templates that fail, and is started anew after one that ended it."""
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

    def told(process: TemplateProcess, template: str, text: str = "Hi") -> str:
        (found,) = render_chats({TEMPLATE_KEY: template}, tokenizer, [(chat_messages(text), True)], process=process)
        return str(found)

    with TemplateProcess() as process:
        assert told(process, ONE) == "Hi!"
        first = process._process
        assert told(process, ONE, "two\nlines") == "two\nlines!"
        assert "unexpected" in told(process, "{% for m in messages %}{{ m.content }")
        assert told(process, ONE) == "Hi!"
        assert process._process is first
        with monkeypatch.context() as patched, pytest.raises(NKATError, match="not done after 1 seconds"):
            patched.setattr("nkat.lm.template_process.SECONDS", 1)
            told(process, loop)
        assert told(process, ONE) == "Hi!"
        second = process._process
        assert first is not None
        assert second is not None
        assert second is not first
        second.kill()
        second.wait()
        assert told(process, ONE) == "Hi!"
        last = process._process
    assert last is not None
    assert last.poll() is not None


# --- where a template can be


ONE = "{{ messages[0].content }}!"


@pytest.mark.parametrize(
    "metadata",
    [
        {TEMPLATE_KEY: [ONE]},
        {TEMPLATE_KEY: ["x", ONE], "tokenizer.chat_templates": ["rag", "default"]},
        {TEMPLATE_KEY: [["rag", "x"], ["default", ONE]]},
        {f"{TEMPLATE_KEY}.rag": ONE, "tokenizer.chat_templates": ["rag"]},
        {f"{TEMPLATE_KEY}.rag": "x", f"{TEMPLATE_KEY}.default": ONE},
        {TEMPLATE_KEY: ONE, f"{TEMPLATE_KEY}.rag": "x"},
    ],
)
@pytest.mark.filterwarnings("ignore:tokenizer.chat_template. the only")
def test_templates_with_names(tokenizer: Tokenizer, metadata: dict) -> None:
    assert render_chat(metadata, tokenizer, chat_messages("Hi")) == "Hi!"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "has no chat template"),
        ({TEMPLATE_KEY: 5}, "is 5, which is no text"),
        ({TEMPLATE_KEY: [1, 2]}, "which is no text"),
        ({TEMPLATE_KEY: ["a", "b"]}, "has 2 chat templates"),
        ({f"{TEMPLATE_KEY}.rag": ONE, f"{TEMPLATE_KEY}.tool_use": ONE}, r"has 2 chat templates \(rag, tool_use\)"),
    ],
)
def test_it_never_says_that_there_is_none_when_there_is_one(tokenizer: Tokenizer, metadata: dict, message: str) -> None:
    with pytest.raises(NKATError, match=message):
        render_chat(metadata, tokenizer, chat_messages("Hi"))


# --- token ids


def test_bos_is_there_once(adding: Tokenizer, tokenizer: Tokenizer) -> None:
    bos = adding.decode_bytes([adding.bos_id]).decode()
    without, written = encode_chat(adding, "the"), encode_chat(adding, f"{bos}the")
    assert without == written
    assert without.count(adding.bos_id) == 1
    assert encode_chat(tokenizer, "the") == tokenizer.encode("the")  # this vocabulary adds none


def test_special_tokens_are_parsed(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>the<|im_end|>"
    ids = encode_chat(tokenizer, text)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id + 1, tokenizer.eos_id)
    assert len(ids) == 4  # "t" and "he" between them
    assert tokenizer.decode_bytes(ids).decode() == text
    assert len(tokenizer.encode(text)) > 10  # the control: as ordinary text it is many
