"""From a request's body to its answer: read, queued, told piece by piece or whole. Knows no web framework."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

from nkat.errors import NKATError
from nkat.lm.chat import chat_template, encode_chat, render_chats, unused_arguments
from nkat.lm.load import LoadedModel
from nkat.lm.template_process import TemplateProcess
from nkat.serve.answers import Answer, server_event
from nkat.serve.arms import Arm, Arms
from nkat.serve.model import Ask, End, Piece
from nkat.serve.questions import Chat, Question, read_chat, read_completion, token_ids
from nkat.serve.refusal import Refusal, bad
from nkat.serve.worker import Event, Job, Place, Worker

QUIET_SECONDS = 10  # after which a stream that waits says so: whoever is between would take it for dead
_PREPARED_AT_ONCE = 2  # prompts, beside the answer that is being written
STOP_WORD = "[DONE]"  # with which OpenAI's streams end


class Reply(Protocol):
    """Where an answer goes."""

    def remark(self, words: str) -> None:
        """For the log's line about this request."""
        ...

    async def json(self, status: int, value: Any) -> None:
        """All of it."""
        ...

    async def begin_stream(self) -> None: ...

    async def data(self, data: bytes) -> None:
        """More of a stream."""
        ...

    async def end_stream(self) -> None: ...


class Api:
    """The two endpoints that generate.

    context: tokens of a prompt and its answer, at most
    """

    def __init__(self, worker: Worker, loaded: LoadedModel, arms: Arms, context: int) -> None:
        self.worker, self.arms, self.context = worker, arms, context
        self._tokenizer, self._metadata = loaded.tokenizer, loaded.gguf.metadata
        self._vocabulary = loaded.config.vocab_size
        self._preparing = asyncio.Semaphore(_PREPARED_AT_ONCE)
        self._template, self._rendering = TemplateProcess(), threading.Lock()  # whose turn it is
        self.chat_problem = _chat_problem(loaded)

    async def answer(self, data: bytes, chat: bool, reply: Reply) -> None:
        """Answers one request; ends early, and frees its place, when it is cancelled.

        Raises Refusal as long as nothing has been told; in a stream it is told as an event.
        """
        question = read_chat(data) if chat else read_completion(data)
        arm = self.arms.choose(question.model, question.gamma, question.theta)
        reply.remark(arm.name)
        place = self.worker.enter()
        try:
            ask = await self._ask(question, arm)
            answer = Answer(chat, arm, self.arms.strength(arm), question.seed, question.include_usage)
            async with contextlib.aclosing(self._events(ask, place)) as events:
                if question.stream:
                    await _stream(events, answer, question, reply)
                else:
                    await _whole(events, answer, question, reply)
        finally:
            place.leave()

    async def _ask(self, question: Question, arm: Arm) -> Ask:
        async with self._preparing:
            prompt = await asyncio.to_thread(self._tokens, question)
        room = self.context - len(prompt)
        if room < 1:
            raise bad(
                f"This model's maximum context length is {self.context} tokens. However, your prompt has "
                f"{len(prompt)} tokens, and an answer needs at least one more. Please reduce the length of the prompt.",
                "messages" if isinstance(question.prompt, Chat) else "prompt",
                "context_length_exceeded",
            )
        most = room if question.max_tokens is None else min(room, question.max_tokens)
        return Ask(arm, prompt, most, question.sampling, question.seed, question.stop, question.logprobs)

    def _tokens(self, question: Question) -> list[int]:
        prompt = question.prompt
        try:
            if isinstance(prompt, str):
                found = self._tokenizer.encode(prompt, add_special=True, parse_special=True)
            elif isinstance(prompt, Chat):
                if self.chat_problem is not None:
                    raise bad(self.chat_problem, "messages", "no_chat_template")
                found = encode_chat(self._tokenizer, self._rendered(prompt))
            else:
                found = token_ids(prompt, self._vocabulary)
        except NKATError as error:
            raise bad(str(error), "messages" if isinstance(prompt, Chat) else "prompt") from None
        if not found:
            raise bad("the prompt is empty, and this vocabulary starts no text by itself", "prompt")
        return found

    def _rendered(self, chat: Chat) -> str:
        """A conversation by the model's template. Raises NKATError for one that the template refuses."""
        for name in unused_arguments(self._metadata, [*chat.arguments]):
            raise bad(f"the model's chat template has no variable {name[:100]!r}", "chat_template_kwargs")
        with self._rendering:
            chats = [(chat.messages, True)]
            (text,) = render_chats(self._metadata, self._tokenizer, chats, chat.arguments, self._template)
        if isinstance(text, NKATError):
            raise text
        return text

    async def _events(self, ask: Ask, place: Place) -> AsyncGenerator[Piece | End | None, None]:
        """What comes of it, the end last; None: nothing yet for a while. Raises Refusal.

        The place is given back at the end, however slowly the client reads.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server was told twice to stop
                loop.call_soon_threadsafe(arrived.put_nowait, event)

        job = Job(ask, deliver)
        self.worker.submit(job)
        try:
            while True:
                try:
                    event = await asyncio.wait_for(arrived.get(), QUIET_SECONDS)
                except asyncio.TimeoutError:
                    yield None
                    continue
                if isinstance(event, Refusal | End):
                    place.leave()
                if isinstance(event, Refusal):
                    raise event
                yield event
                if isinstance(event, End):
                    return
        finally:
            job.cancel()


Events = AsyncIterator[Piece | End | None]


async def _whole(events: Events, answer: Answer, question: Question, reply: Reply) -> None:
    pieces = _echo(question)
    async for event in events:
        if isinstance(event, Piece):
            pieces.append(event)
        elif event is not None:
            reply.remark(_counts(event))
            await reply.json(200, answer.whole(pieces, event))


async def _stream(events: Events, answer: Answer, question: Question, reply: Reply) -> None:
    await reply.begin_stream()
    try:
        begin = answer.first()
        parts = [] if begin is None else [begin]
        for part in [*parts, *(answer.more(piece) for piece in _echo(question))]:
            await reply.data(server_event(part))
        async for event in events:
            if event is None:
                await reply.data(b": waiting\n\n")  # a comment, which clients skip
            elif isinstance(event, Piece):
                await reply.data(server_event(answer.more(event)))
            else:
                reply.remark(_counts(event))
                for part in answer.last(event):
                    await reply.data(server_event(part))
                await reply.data(server_event(STOP_WORD))
    except Refusal as refusal:  # the status is told already
        reply.remark(refusal.message)
        await reply.data(server_event(refusal.body()))
    await reply.end_stream()


def _echo(question: Question) -> list[Piece]:
    return [Piece(question.prompt)] if question.echo and isinstance(question.prompt, str) else []


def _counts(end: End) -> str:
    kept = f" ({end.cached} kept)" if end.cached else ""
    return f"prompt {end.prompt}{kept}, generated {end.generated}, {end.reason}"


def _chat_problem(loaded: LoadedModel) -> str | None:
    """Why there is no chat with this model."""
    try:
        chat_template(loaded.gguf.metadata, "/v1/completions continues texts")
    except NKATError as error:
        return str(error)
    return None
