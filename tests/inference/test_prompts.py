"""Prompts of flags, files and stdin; templates of files and their arguments; the end of the context."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat.inference.prompts import read_prompt, template_argument
from nkat.lm.load import load_model
from tests.support.endless import without_an_end
from tests.support.tiny_models import write_tiny_model

ENGINE = "nkat_inference_engine.py"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
    "{% if thinking is defined and not thinking %}no {{ thinking }}{% endif %}{{ word }}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    return write_tiny_model(folder / "tiny.gguf", "llama", chat_template=TEMPLATE, context=64)


def stdin_of(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def record_of(script, *arguments: object) -> dict:
    done = script(ENGINE, *arguments, "--temperature", 0, "--no-cuda", "--threads", 1, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- where a prompt comes from


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"the rain", "the rain"),
        (b"the rain\n", "the rain"),
        (b"the rain\r\n", "the rain"),
        (b"a\n\n", "a\n"),
        (b"\xef\xbb\xbf\xc3\xa9\n", "é"),
        (b"---\nfoo", "---\nfoo"),
    ],
)
def test_a_file_and_stdin_are_the_same_prompt(data: bytes, expected: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(data)
    stdin_of(monkeypatch, data)
    assert read_prompt(path) == expected == read_prompt(Path("-"))


def test_prompts_that_cannot_be_read(tmp_path: Path, monkeypatch) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    for path, message in ((tmp_path / "no", "no such text file"), (bad, "not UTF-8"), (tmp_path, "this is a folder")):
        with pytest.raises(NKATError, match=message):
            read_prompt(path)
    for data, message in ((b"\xff", "stdin: not UTF-8 text"), (b" \n", "stdin: the text is empty")):
        stdin_of(monkeypatch, data)
        with pytest.raises(NKATError, match=message):
            read_prompt(Path("-"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(NKATError, match="stdin is closed"):
        read_prompt(Path("-"))


def test_through_the_command_line(script, fails, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "p.txt"
    path.write_text("the rain in\n")
    expected = record_of(script, "--model", tiny, "--generate", "the rain in", "--max-tokens", 8)
    found = record_of(script, "--model", tiny, "--prompt-file", path, "--max-tokens", 8)
    assert (found["prompt"], found["tokens"]) == ("the rain in", expected["tokens"])
    stdin_of(monkeypatch, b"the rain in\n")
    assert record_of(script, "--model", tiny, "--prompt-file", "-", "--max-tokens", 8)["text"] == expected["text"]
    model = (ENGINE, "--model", tiny)
    assert "no such text file" in fails(*model, "--prompt-file", tmp_path / "no")
    assert "give only one of" in fails(*model, "--prompt-file", path, "--generate", "a")
    assert "--chat" in fails(*model)


@pytest.mark.parametrize("prompt", ["---", "-one", "---\nfoo", "--generate the"])
def test_prompts_that_begin_with_a_dash(script, tiny: Path, prompt: str) -> None:
    for words in (("--generate", prompt), (f"--generate={prompt}",)):
        assert record_of(script, "--model", tiny, *words, "--max-tokens", 1)["prompt"] == prompt


@pytest.mark.parametrize("prompt", ["--model", "--", "--chat"])
def test_a_prompt_that_is_a_flag_is_explained(script, fails, tiny: Path, prompt: str) -> None:
    said = fails(ENGINE, "--model", tiny, "--generate", prompt, "--max-tokens", 1)
    assert f"--generate needs a text, and {prompt} is a flag; for a text of that name give --generate={prompt}" in said
    assert record_of(script, "--model", tiny, f"--generate={prompt}", "--max-tokens", 1)["prompt"] == prompt
    assert "--generate=--- " in script(ENGINE, "--help").stdout


# --- templates


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("enable_thinking=false", ("enable_thinking", False)),
        ("n=3", ("n", 3)),
        ('tools=[{"a": null}]', ("tools", [{"a": None}])),
        ("date=26 Jul 2024", ("date", "26 Jul 2024")),
        ("word=False", ("word", "False")),
        ("empty=", ("empty", "")),
        ("a=b=c", ("a", "b=c")),
        ('quoted="false"', ("quoted", "false")),
    ],
)
def test_arguments_are_json_or_else_text(text: str, expected: tuple) -> None:
    assert template_argument(text) == expected


@pytest.mark.parametrize("text", ["thinking", "=1", "a b=1", "messages=[]", "add_generation_prompt=false"])
def test_arguments_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        template_argument(text)


def test_arguments_and_files_reach_the_template(script, fails, tiny: Path, tmp_path: Path) -> None:
    def tokens(*more: object) -> int:
        return record_of(script, "--model", tiny, "--generate", "a", "--max-tokens", 1, *more)["prompt_tokens"]

    def count(text: str) -> int:
        return len(load_model(tiny).tokenizer.encode(text, parse_special=True))

    start = "<|im_start|>a<|im_end|><|im_start|>"
    assert tokens("--chat") == count(start)
    assert tokens("--chat", "--template-arg", "thinking=false") == count(start + "no False")
    assert tokens("--chat", "--template-arg", "thinking=true") == count(start)
    both = ("--template-arg", "word=rain", "--template-arg", "thinking=0", "--template-arg", "word=the other")
    assert tokens("--chat", *both) == count(start + "no 0the other")
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0].content }}!{{ word }}", encoding="utf-8")
    assert tokens("--chat", "--template-file", own, "--template-arg", "word=x") == count("a!x")
    common = (ENGINE, "--model", tiny, "--generate", "a")
    assert "--template-file and --template-arg go with --chat" in fails(*common, "--template-file", own)
    assert "must be NAME=VALUE" in fails(*common, "--chat", "--template-arg", "x")
    assert "no such text file" in fails(*common, "--chat", "--template-file", tmp_path / "no")
    said = script(*common, "--chat", "--max-tokens", 1, "--template-arg", "enable_thinkin=false").stderr
    assert "warning: --template-arg enable_thinkin: the chat template has no such word, so it changes nothing" in said
    assert "warning" not in script(*common, "--chat", "--max-tokens", 1, "--template-arg", "thinking=false").stderr


def test_a_template_of_a_file_helps_a_model_without_one(script, fails, tmp_path: Path) -> None:
    plain, own = write_tiny_model(tmp_path / "plain.gguf", "llama"), tmp_path / "own.jinja"
    own.write_text("{{ messages[0].content }}", encoding="utf-8")
    common = ("--model", plain, "--generate", "the", "--max-tokens", 2, "--chat")
    refused = fails(ENGINE, *common)
    assert "has no chat template" in refused
    assert "--template-file" in refused
    assert record_of(script, *common, "--template-file", own)["prompt_tokens"] > 0


# --- the end of the context


def test_a_text_stops_at_the_context_or_slides(script, fails, tiny: Path, tmp_path: Path) -> None:
    endless = without_an_end(tiny, tmp_path / "endless.gguf")

    def run(*more: object) -> tuple[dict, str]:
        words = ("--generate", "the rain in", "--temperature", 0, "--no-cuda", "--threads", 1, "--json", "-")
        done = script(ENGINE, "--model", endless, *words, *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    stopped, said = run("--max-tokens", 200)
    assert (stopped["stopped"], stopped["prompt_tokens"] + stopped["generated_tokens"]) == ("context", 64)
    assert "the context of 64 tokens is full, so the text ends here; --context-shift goes on" in said
    assert "warning" not in said
    small, said = run("--max-tokens", 200, "--context", 20)
    assert (small["prompt_tokens"] + small["generated_tokens"], small["context"]) == (20, 20)
    assert small["tokens"] == stopped["tokens"][: len(small["tokens"])]
    for flags in (("--context-shift",), ("--context-shift", 3)):
        slid, said = run("--max-tokens", 200, *flags)
        assert (slid["stopped"], slid["generated_tokens"], slid["context"]) == ("length", 200, 64)
        assert slid["tokens"][: len(stopped["tokens"])] == stopped["tokens"]
        assert "is full" not in said
    assert run("--max-tokens", 100, "--beyond-context")[0]["generated_tokens"] == 100
    common = (ENGINE, "--model", tiny, "--generate", "the rain in")
    assert "only one of them" in fails(*common, "--context-shift", "--beyond-context")
    assert "40 tokens cannot stay of a context of 64" in fails(*common, "--context-shift", 40)
    assert "--context: 65 tokens are more than the 64" in fails(*common, "--context", 65)
    assert "the prompt: " in fails(*common, "--context", 2)
    assert "--context-shift has no meaning with --gemm" in fails(ENGINE, "--model", tiny, "--gemm", "--context-shift")
