"""A model as an evaluation asks of it: likelihoods of continuations, and answers. Knows nothing of lm-eval."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from nkat.engine.continuations import Continuation, predict
from nkat.engine.generate import Sampler
from nkat.engine.session import Session
from nkat.errors import NKATError
from nkat.harness.arguments import ModelArguments
from nkat.harness.generation import GenerationSettings
from nkat.host.console import counted, note
from nkat.host.hardware import set_threads
from nkat.hub.fetch import local_model
from nkat.lm.chat import TEMPLATE_KEY, chat_template, render_chats
from nkat.lm.load import LoadedModel
from nkat.lm.request import Request
from nkat.lm.template_process import TemplateProcess
from nkat.theta.combine import WeightedFile

_log = logging.getLogger(__name__)


class _Ended(Exception):
    """A text that ends the answer was met."""


class EvaluatedModel:
    """Opened and ready. Raises NKATError for all that is wrong with what was asked for."""

    def __init__(self, arguments: ModelArguments) -> None:
        arguments = replace(arguments, path=local_model(arguments.path))
        self.arguments = arguments
        self.threads = set_threads(arguments.threads)
        thetas = () if arguments.theta is None else (WeightedFile(arguments.theta),)
        self.request = Request(arguments.path, thetas, int8_activations=arguments.activations == "int8")
        file, self.theta = self.request.open()
        if file.unfinished:
            note(f"warning: the Θ behind {arguments.path} is incomplete or damaged; using the base model alone")
        if self.theta is None and arguments.gamma is not None:
            raise NKATError(f"{arguments.path}: has no Θ, so gamma has no meaning")
        self.request = replace(self.request, gamma=arguments.gamma)
        self.loaded = self.request.load(file, self.theta)
        self.tokenizer, made_for = self.loaded.tokenizer, self.loaded.config.context_length
        self.max_length = arguments.max_length or made_for
        if self.max_length > made_for:
            raise NKATError(f"max_length: {self.max_length} tokens are more than the {made_for} the model was made for")
        self.template: str | None = None
        self._templates = TemplateProcess()  # ends with this process, whose pipe it reads

    @cached_property
    def writing(self) -> LoadedModel:
        """The same model as it generates: with its weights in the kernels' layout. Made when it is first asked for."""
        return replace(self.request, repack=True).load(self.loaded, self.theta)

    def describe(self) -> dict[str, Any]:
        """What a result should say of the model, beside lm-eval's own record."""
        theta = self.theta
        return {
            "model_file": str(self.arguments.path),
            "model_architecture": self.loaded.config.architecture.name,
            "activations": self.arguments.activations,
            "max_length": self.max_length,
            "theta_rank": None if theta is None else theta.rank,
            "theta_gamma": self.loaded.gamma,
            "theta_source": None if theta is None else theta.source,
        }

    # --- texts

    @property
    def prefix(self) -> int:
        """The token before a text that has nothing before it: the beginning of a sequence, else its end."""
        for token in (self.tokenizer.bos_id, self.tokenizer.eos_id):
            if token is not None:
                return token
        raise NKATError("this vocabulary has neither a first nor a last token, so that no text can stand alone")

    def encode(self, text: str, *, alone: bool = True) -> list[int]:
        """Token ids, special tokens parsed, as transformers does; one BOS where the vocabulary adds it.

        alone: False: nothing is added
        """
        ids = self.tokenizer.encode(text, parse_special=True)
        if (
            alone
            and self.tokenizer.adds_bos
            and self.tokenizer.bos_id is not None
            and ids[:1] != [self.tokenizer.bos_id]
        ):
            return [self.tokenizer.bos_id, *ids]
        return ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both together, parted where the context ends; spaces at its end go with the continuation, as in lm-eval."""
        if context == "":
            ids = self.encode(continuation, alone=False)
            return [self.prefix], ids[1:] if ids[:1] == [self.prefix] else ids
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        begun = self.encode(stripped) if stripped else [self.prefix]
        whole = self.encode(stripped + continuation) if stripped else [*begun, *self.encode(continuation, alone=False)]
        return begun, whole[len(begun) :]

    def chat(self, messages: Sequence[Mapping[str, str]], answer: bool = True) -> str:
        """A conversation by the template, up to where the assistant answers, or goes on with the last message."""
        template = self.template or chat_template(self.loaded.gguf.metadata, "leave --apply_chat_template out")
        (text,) = render_chats({TEMPLATE_KEY: template}, self.tokenizer, [(messages, answer)], process=self._templates)
        if isinstance(text, NKATError):
            raise text
        if answer or not messages:
            return text
        last = messages[-1]["content"].strip()
        if last not in text:
            raise NKATError("the model's chat template changes the last message, so that nothing can go on from it")
        return text[: text.rindex(last) + len(last)]

    def choose_template(self, name: bool | str) -> str | None:
        """The template that `chat` uses from now on. name: of one among several; True: the usual one"""
        if name is False:
            return None
        metadata = self.loaded.gguf.metadata
        if isinstance(name, str):
            found = metadata.get(f"{TEMPLATE_KEY}.{name}")
            if not isinstance(found, str):
                raise NKATError(f"this model has no chat template named {name!r:.80}")
            self.template = found
        else:
            self.template = chat_template(metadata, "leave --apply_chat_template out")
        return self.template

    @property
    def template_name(self) -> str:
        """Tells apart what is rendered by different templates."""
        text = self.template or str(self.loaded.gguf.metadata.get(TEMPLATE_KEY))
        return f"{self.arguments.path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    # --- what is asked

    def likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, float, bool]]:
        """Number, ln p, and whether each token was the likeliest, of each (context, continuation), as they are done.

        Of a context that is too long the end is taken, as in lm-eval. Raises NKATError for a continuation that has no
        token, or is too long itself.
        """
        continuations, cut = [], 0
        for number, (context, continuation) in enumerate(pairs):
            if not continuation:
                raise NKATError(f"request {number}: its continuation adds no token to the context")
            if len(continuation) > self.max_length:
                raise NKATError(
                    f"request {number}: its continuation has {len(continuation)} tokens, more than max_length "
                    f"({self.max_length})"
                )
            whole = (*context, *continuation)
            kept = whole[-(self.max_length + 1) :]  # the last token is predicted, and not read
            cut += len(kept) < len(whole)
            continuations.append(Continuation(kept, len(kept) - len(continuation)))
        self._say_cut(cut, len(pairs))
        for number, found in predict(self.loaded.model, continuations, self.arguments.batch_size):
            yield number, -float(found.nll.sum()), bool(found.best.all())

    def answers(self, asked: Sequence[tuple[str, GenerationSettings]], seed: int) -> Iterator[tuple[int, str]]:
        """Number and answer of each prompt, as they are done. seed: of the first; each has one of its own."""
        prompts, cut = [], 0
        for number, (text, settings) in enumerate(asked):
            room = self.max_length - settings.max_tokens
            if room < 1:
                raise NKATError(
                    f"request {number}: max_gen_toks ({settings.max_tokens}) leaves no room for a prompt in max_length "
                    f"({self.max_length})"
                )
            ids = self.encode(text) or [self.prefix]
            cut += len(ids) > room
            prompts.append(ids[-room:])
        self._say_cut(cut, len(asked))
        lengths = [len(ids) + settings.max_tokens for ids, (_, settings) in zip(prompts, asked, strict=True)]
        turning = self.loaded.config.rope.original_context  # beyond it some models turn otherwise
        for beyond in (False, True):
            part = [number for number, length in enumerate(lengths) if (length > turning) == beyond]
            if not part:
                continue
            session = Session(self.writing.model, max(lengths[number] for number in part))
            for number in sorted(part, key=lambda number: prompts[number]):  # what begins alike, one after the other
                yield number, self._answer(session, prompts[number], asked[number][1], seed + number)

    def _answer(self, session: Session, prompt: Sequence[int], settings: GenerationSettings, seed: int) -> str:
        text = ""

        def add(piece: str) -> None:
            nonlocal text
            text += piece
            if any(word in text for word in settings.until):
                raise _Ended

        sampler, most = Sampler(settings.sampling, seed % 2**32), settings.max_tokens
        try:
            found = session.generate(self.tokenizer, prompt, sampler, max_tokens=most, on_text=add)
        except _Ended:
            return text[: min(at for word in settings.until if (at := text.find(word)) >= 0)]
        if found.stopped in ("interrupted", "terminated"):
            raise KeyboardInterrupt
        return text

    def _say_cut(self, cut: int, count: int) -> None:
        if cut:
            _log.warning(
                "%s of %d longer than max_length (%d tokens): the beginning was cut off",
                counted(cut, "request"),
                count,
                self.max_length,
            )
