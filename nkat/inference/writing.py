"""One text from one prompt: `--generate`, `--prompt-file`."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from nkat.engine.generate import Generation, Sampler, Sampling
from nkat.engine.session import Session
from nkat.errors import NKATError
from nkat.host.console import counted, note
from nkat.inference.options import EngineOptions
from nkat.inference.prompts import read_prompt, template_metadata
from nkat.lm.chat import chat_messages, encode_chat, render_chat
from nkat.lm.load import LoadedModel


def prompt_text(options: EngineOptions) -> str:
    """What the user gave, wherever it is. Raises NKATError for a file that cannot be read."""
    return options.generate if options.prompt_file is None else read_prompt(options.prompt_file)


def sampler_for(options: EngineOptions) -> Sampler:
    """As the flags say; with a seed of its own where they name none."""
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    return Sampler(Sampling(options.temperature, options.top_k, options.top_p, options.min_p), seed)


def write_text(options: EngineOptions, prompt: str, sampler: Sampler, loaded: LoadedModel) -> tuple[dict, Session]:
    """Streams to stdout; the speed goes to stderr, where it does not mix with the text.

    Returns the record, and what wrote the text.
    """
    tokenizer, arguments = loaded.tokenizer, dict(options.template_arg or ())
    if options.chat:
        metadata = template_metadata(loaded, options.template_file, arguments)
        rendered = render_chat(metadata, tokenizer, chat_messages(prompt, options.system), arguments)
        ids = encode_chat(tokenizer, rendered)
    else:
        ids = tokenizer.encode(prompt, add_special=True, parse_special=True)
    room = context_room(options, loaded, len(ids))
    session = Session(loaded.model, room, sliding=options.context_shift)
    session.set_gamma(loaded.gamma)
    result = session.generate(tokenizer, ids, sampler, max_tokens=options.max_tokens, on_text=show)
    print(flush=True)
    if result.stopped == "context":
        note(f"the context of {counted(room, 'token')} is full, so the text ends here; --context-shift goes on")
    note(
        f"prompt {counted(result.prompt_tokens, 'token')}, {result.prompt_speed:.1f} tok/s; "
        f"generated {counted(len(result.tokens), 'token')}, {result.speed:.2f} tok/s; stopped by {result.stopped}"
        + (f"; seed {sampler.seed}" if options.temperature else "")  # at 0 nothing is drawn
    )
    record = {
        "prompt": prompt,
        "text": result.text,
        "tokens": result.tokens,
        "chat": options.chat,
        "context": room,
        **drawing_record(options, sampler),
        **speed_record(result),
    }
    return record, session


def context_room(options: EngineOptions, loaded: LoadedModel, prompt: int) -> int:
    """Tokens that the prompt and its text together may come to.

    Raises NKATError for a prompt that leaves no room, and for more than the model was made for, unless that is wanted.
    """
    config, wanted = loaded.config, prompt + options.max_tokens
    if options.context is not None:
        config.check_length(options.context, "--context", bool(options.beyond_context))
        if prompt >= options.context:
            raise NKATError(f"the prompt: {counted(prompt, 'token')}, leave no room in --context {options.context}")
        return min(wanted, options.context)
    if options.beyond_context:
        return wanted
    config.check_length(prompt + 1, "the prompt")
    return min(wanted, config.context_length)


def drawing_record(options: EngineOptions, sampler: Sampler) -> dict[str, Any]:
    """How tokens were drawn."""
    return {"seed": sampler.seed if options.temperature else None, **asdict(sampler.sampling)}


def speed_record(result: Generation) -> dict[str, Any]:
    return {
        "stopped": result.stopped,
        "prompt_tokens": result.prompt_tokens,
        "reused_tokens": result.reused,
        "prompt_tokens_per_second": result.prompt_speed,
        "generated_tokens": len(result.tokens),
        "tokens_per_second": result.speed,
    }


def show(piece: str) -> None:
    """A piece of text, as soon as it is there."""
    print(piece, end="", flush=True)
