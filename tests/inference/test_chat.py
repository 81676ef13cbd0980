"""A conversation, line by line: what it computes, what it leaves out, its commands, a terminal."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nkat.engine.generate import Sampler, Sampling
from nkat.engine.session import Session
from nkat.errors import NKATError
from nkat.inference.conversation import Conversation
from nkat.inference.repl import _Loop, read_message
from nkat.lm.chat import encode_chat, render_chat
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.chats import read_rows
from nkat.measure.texts import load_text
from tests.conftest import ROOT
from tests.support.endless import without_an_end
from tests.support.tiny_models import write_tiny_model

ENGINE = "nkat_inference_engine.py"
CTRL_C, CTRL_D = b"\x03", b"\x04"
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('not that') }}{% endif %}"
    "<|im_start|>{{ m.role[0] }} {{ m.content }}<|im_end|>{% endfor %}<|im_start|>a "
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return write_tiny_model(folder / "tiny.gguf", "llama", chat_template=TEMPLATE, context=512)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> LoadedModel:
    return load_model(tiny, repack=True)


def begin(loaded: LoadedModel, room: int = 400, most: int = 12, **more: object) -> tuple[Conversation, Session]:
    session = Session(loaded.model, room)
    sampler = Sampler(Sampling(temperature=0.0), 0)
    metadata = loaded.gguf.metadata
    made = Conversation(session, loaded.tokenizer, sampler, metadata=metadata, max_tokens=most, **more)
    return made, session


def ids(loaded: LoadedModel, messages: list) -> list[int]:
    return encode_chat(loaded.tokenizer, render_chat(loaded.gguf.metadata, loaded.tokenizer, messages))


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


# --- what is computed


def test_a_turn_computes_only_what_is_new(loaded: LoadedModel) -> None:
    conversation, session = begin(loaded, system="be short")
    held: list[int] = []
    before = 0
    for count, text in enumerate(("the rain", "in a tin", "and the other one", "")):
        prompt = ids(loaded, [*conversation.messages, {"role": "user", "content": text}])
        turn = conversation.ask(text, lambda _: None)
        assert turn.result.prompt_tokens == len(prompt)
        assert turn.result.reused == common(held, prompt)
        assert (
            turn.result.reused >= before - 2
        )  # all of the last prompt, but where its end and the answer are one token
        before = len(prompt)
        held = session.tokens
        assert held[: len(prompt)] == prompt
        assert [message["role"] for message in conversation.messages] == [
            "system",
            *["user", "assistant"] * (count + 1),
        ]


@pytest.mark.isa
def test_answers_are_those_of_one_prompt(loaded: LoadedModel) -> None:
    """As if each turn were computed from its start."""
    conversation, _ = begin(loaded)
    for text in ("the rain", "in a tin", "and the"):
        conversation.ask(text, lambda _: None)
    messages = conversation.messages
    for place in (1, 3, 5):
        alone = Session(loaded.model, 400)
        prompt = ids(loaded, messages[:place])
        sampler = Sampler(Sampling(temperature=0.0), 0)
        found = alone.generate(loaded.tokenizer, prompt, sampler, max_tokens=12, on_text=lambda _: None)
        assert found.text == messages[place]["content"]


def test_what_the_template_writes_otherwise_later_is_computed_again(loaded: LoadedModel) -> None:
    """Such as reasoning, which many leave out of earlier answers: only from there on."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.content[:3] if m.role == 'assistant' else m.content }}<|im_end|>"
        "{% endfor %}<|im_start|>"
    )
    conversation, session = begin(loaded)
    conversation._metadata = {"tokenizer.chat_template": template}
    conversation.ask("the rain in a tin", lambda _: None)
    before = session.tokens
    turn = conversation.ask("and", lambda _: None)
    assert 0 < turn.result.reused < len(before)
    assert turn.result.reused == common(before, session.tokens[: turn.result.prompt_tokens])


def test_the_oldest_turns_go_when_the_context_is_full(loaded: LoadedModel) -> None:
    conversation, session = begin(loaded, room=150, most=12, system="be short")
    left_out = []
    for number in range(12):
        turn = conversation.ask(f"the rain in a tin {number}", lambda _: None)
        assert turn.result.prompt_tokens + len(turn.result.tokens) <= 150
        left_out.append(turn.left_out)
    assert left_out[0] == 0 < sum(left_out)
    assert all(count % 2 == 0 for count in left_out)  # a message goes with its answer
    assert left_out.count(0) > len(left_out) // 2  # so many at once that the next turns go on from what is there
    assert len(conversation.messages) == 25  # nothing is lost
    system = ids(loaded, conversation.messages[:1])
    assert session.tokens[: len(system) - 4] == system[:-4]  # the instructions stay
    with pytest.raises(NKATError, match=r"this message comes to .* and the context holds 150: a shorter one"):
        conversation.ask("the rain in a tin " * 60, lambda _: None)
    assert len(conversation.messages) == 25
    assert conversation.ask("the", lambda _: None).result.tokens is not None


def test_taking_back(loaded: LoadedModel) -> None:
    conversation, _ = begin(loaded, system="be short")
    assert conversation.undo() is None
    first = conversation.ask("the rain", lambda _: None).result
    conversation.ask("in", lambda _: None)
    assert conversation.undo() == "in"
    assert len(conversation.messages) == 3
    assert conversation.undo() == "the rain"
    assert conversation.ask("the rain", lambda _: None).result.tokens == first.tokens
    conversation.clear()
    assert [message["role"] for message in conversation.messages] == ["system"]
    with pytest.raises(NKATError, match="not that"):
        conversation.ask("forbidden", lambda _: None)
    assert len(conversation.messages) == 1


def test_an_interrupted_answer_is_kept_as_far_as_it_came(loaded: LoadedModel) -> None:
    conversation, _ = begin(loaded)

    def stop(_: str) -> None:
        if not stopped:
            stopped.append(1)
            raise KeyboardInterrupt

    stopped: list[int] = []
    turn = conversation.ask("the rain", stop)
    assert turn.result.stopped == "interrupted"
    assert conversation.messages[-1] == {"role": "assistant", "content": turn.result.text}
    stopped.clear()
    conversation._session.prefill = lambda _: stop("")  # type: ignore[method-assign]
    assert conversation.ask("in a", print).result.stopped == "interrupted"
    assert len(conversation.messages) == 2  # not a word of an answer: the message is gone as well


# --- what is read


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["a", "b"], ["a", "b"]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (['"""', "a", "", 'b"""', "c"], ["a\n\nb", "c"]),
        (['"""a"""', "b"], ["a", "b"]),
        (['"""a', "b"], ["a\nb"]),
        (["a\\"], ["a"]),
        (["", "  a"], ["", "  a"]),
    ],
)
def test_messages_of_several_lines(lines: list[str], messages: list[str]) -> None:
    left = iter(lines)

    def line(_: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    found = []
    with pytest.raises(EOFError):
        while True:
            found.append(read_message(line))
    assert found == messages


# --- through the command line


def chat(script, monkeypatch: pytest.MonkeyPatch, model: Path, lines: str, *more: object):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
    common = ("--chat", "--temperature", 0, "--max-tokens", 8, "--no-cuda", "--threads", 1)
    return script(ENGINE, "--model", model, *common, *more)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second one where no language is set
def test_bytes_that_are_no_text(fails, monkeypatch: pytest.MonkeyPatch, tiny: Path, errors: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8", errors=errors))
    assert "stdin: not " in fails(ENGINE, "--model", tiny, "--chat", "--no-cuda")


def test_from_a_pipe(script, monkeypatch, tiny: Path, tmp_path: Path) -> None:
    record_file, saved = tmp_path / "r.json", tmp_path / "c.jsonl"
    lines = f"the rain\n\nin a \\\ntin\nwrong\n/undo\n//help\n/save {saved}\n/exit\nnever\n"
    done = chat(script, monkeypatch, tiny, lines, "--json", record_file, "--system", "be short")
    assert done.returncode == 0, done.stderr
    record = json.loads(record_file.read_text())
    said = [message["content"] for message in record["messages"] if message["role"] == "user"]
    assert said == ["the rain", "in a \ntin", "/help"]
    assert (record["messages"][0], record["chat"], record["stopped"]) == (
        {"role": "system", "content": "be short"},
        True,
        "end of input",
    )
    assert len(record["turns"]) == 4
    assert record["turns"][0]["reused_tokens"] == 0
    first, second, _, last = record["turns"]
    assert second["reused_tokens"] >= first["prompt_tokens"] - 2
    assert last["reused_tokens"] >= second["prompt_tokens"] - 2  # what was taken back is not in the way
    assert "taken back: wrong" in done.stderr
    assert ">" not in done.stdout.replace("<|", "")  # no prompts to type at
    (row,) = read_rows(load_text(saved))  # what a fit reads
    assert [dict(message) for message in row.messages] == record["messages"]


def test_mistakes_end_a_pipe(fails, script, monkeypatch, tiny: Path, tmp_path: Path) -> None:
    def said(lines: str, *more: object) -> str:
        done = chat(script, monkeypatch, tiny, lines, *more)
        assert done.returncode == 2
        return done.stderr.strip().splitlines()[-1]

    assert "error: there is no /nothing; /help says what there is" in said("/nothing\n")
    assert "error: /save FILE: a name is needed" in said("/save\n")
    taken = tmp_path / "taken"
    taken.write_text("x")
    assert "exists already" in said(f"the\n/save {taken}\n")
    assert "not that" in said("forbidden\n")
    assert "--context: 600 tokens are more than the 512" in said("the\n", "--context", 600)
    assert "has no meaning with --chat" in said("the\n", "--context-shift")


def test_help_and_clear(script, monkeypatch, tiny: Path, tmp_path: Path) -> None:
    lines = "/help\nthe rain\n/clear\nthe rain\n/undo\n/undo\n"
    done = chat(script, monkeypatch, tiny, lines, "--json", "-", "--quiet")  # which leaves what is asked for
    assert done.returncode == 0, done.stderr
    for command in ("/clear", "/undo", "/save", "/exit", "Ctrl-D", "Ctrl-C", '"""'):
        assert command in done.stderr
    assert "there is nothing to take back" in done.stderr
    assert "tok/s" not in done.stderr
    assert "tok/s" in chat(script, monkeypatch, tiny, "the rain\n").stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["messages"] == []
    first, second = record["turns"]
    assert second["reused_tokens"] == first["prompt_tokens"] - 1  # even what was forgotten is still computed


def test_a_seed_gives_the_same_conversation(script, monkeypatch, tiny: Path) -> None:
    def messages(seed: int) -> list:
        drawn = ("--temperature", 0.8, "--seed", seed, "--json", "-")
        done = chat(script, monkeypatch, tiny, "the rain\nin a tin\n", *drawn)
        record = json.loads(done.stdout.splitlines()[-1])
        assert record["seed"] == seed
        return record["messages"]

    assert messages(3) == messages(3)
    assert messages(3) != messages(4)


def test_no_input_is_an_empty_conversation(script, monkeypatch, tiny: Path) -> None:
    assert chat(script, monkeypatch, tiny, "").returncode == 0
    monkeypatch.setattr(sys, "stdin", None)
    assert script(ENGINE, "--model", tiny, "--chat", "--no-cuda").returncode == 0


# --- at a terminal


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """The engine at a terminal, with a model that never ends by itself; and the terminal's other side."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    long = write_tiny_model(tmp_path / "long.gguf", "llama", chat_template=TEMPLATE, context=8192)
    endless = without_an_end(long, tmp_path / "endless.gguf")  # so that no answer is done before it is stopped
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / ENGINE), "--model", str(endless), "--chat", "--no-cuda", "--threads", "1"]
    command += ["--max-tokens", "4000", "--temperature", "0", "--json", str(tmp_path / "r.json")]
    environment = {**os.environ, "TERM": "dumb"}
    running = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that its Ctrl-C reaches whatever was started
    )
    os.close(theirs)
    yield running, ours
    running.kill()
    running.wait()
    os.close(ours)


def reader(terminal: int) -> Callable[[str], str]:
    """Waits until a text appears, and gives what came up to it."""
    seen = ""

    def wait(text: str) -> str:
        nonlocal seen
        while text not in seen:
            assert select.select([terminal], [], [], 60)[0], seen
            try:
                seen += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # nobody is there any more
                raise AssertionError(seen) from None
        before, _, seen = seen.partition(text)
        return before + text

    return wait


def test_ctrl_c_at_the_prompt_ends_nothing(loaded: LoadedModel, monkeypatch, capsys) -> None:
    loop = _Loop(begin(loaded)[0], 100, "m")
    comes = iter([KeyboardInterrupt, EOFError])

    def line(_: str) -> str:
        raise next(comes)

    monkeypatch.setattr(loop, "typed", True)
    monkeypatch.setattr(loop, "_line", line)
    assert loop.run() == ([], "end of input")
    assert "Ctrl-D or /exit ends" in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(terminal, tmp_path: Path) -> None:
    running, ours = terminal
    wait = reader(ours)
    assert "/help says what there is" in wait("> ")
    os.write(ours, b"the rain\n")
    wait("the rain\r\n")
    assert os.read(ours, 1)  # of the answer
    os.write(ours, CTRL_C)
    assert "generated" in wait("tok/s")
    wait("> ")
    os.write(ours, b"/nothing\n")
    wait("error: there is no /nothing")
    wait("> ")
    os.write(ours, b"in a\n")
    wait("in a\r\n")
    assert os.read(ours, 1)
    os.write(ours, CTRL_C)
    wait("tok/s")
    wait("> ")
    os.write(ours, CTRL_D)
    assert running.wait(60) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert [turn["stopped"] for turn in record["turns"]] == ["interrupted", "interrupted"]
    assert record["turns"][1]["reused_tokens"] >= record["turns"][0]["prompt_tokens"] - 2 > 5
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"] * 2


def test_sigterm_ends_it_and_keeps_the_record(terminal, tmp_path: Path) -> None:
    running, ours = terminal
    wait = reader(ours)
    wait("> ")
    os.write(ours, b"the rain\n")
    wait("the rain\r\n")
    assert os.read(ours, 1)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["stopped"], record["turns"][0]["stopped"]) == ("terminated", "terminated")
