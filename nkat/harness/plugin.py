"""The model class that lm-eval finds by its entry point (`lm_eval.models`, name `nkat`).

The only module that needs lm-eval, which alone imports it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nkat.errors import NKATError
from nkat.harness.arguments import ModelArguments
from nkat.harness.generation import GenerationSettings
from nkat.harness.model import EvaluatedModel
from nkat.host.console import bar

_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")
_USUAL_DEVICE = "cuda:0"  # what lm-eval says where nobody has said anything


class NkatLM(LM):
    """A GGUF or `.nkat` run in this process; `--model_args` are the fields of `ModelArguments`."""

    def __init__(self, device: str | None = None, max_batch_size: int | None = None, **arguments: Any) -> None:
        """device: must be the processor;  max_batch_size: lm-eval's, for models that try out how much fits"""
        super().__init__()
        _show_in_one_line()
        if device not in (None, "cpu", _USUAL_DEVICE):
            raise NKATError(f"--device {device}: the model nkat runs on the processor")
        if device == _USUAL_DEVICE and torch.cuda.is_available():
            _log.warning("the model nkat runs on the processor, whatever --device says")
        self.model = EvaluatedModel(ModelArguments.of(arguments))

    # --- requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        texts = [(str(context), str(continuation)) for context, continuation in (each.args for each in requests)]
        made = (self.model.encode_pair(*each) for each in texts)
        pairs = list(_shown(made, len(texts), "Tokenizing inputs", disable_tqdm))
        found: dict[int, tuple[float, bool]] = {}
        what = "Running loglikelihood requests"
        for number, total, greedy in _shown(self.model.likelihoods(pairs), len(pairs), what, disable_tqdm):
            found[number] = total, greedy
            self.cache_hook.add_partial("loglikelihood", texts[number], found[number])
        return [found[number] for number in range(len(pairs))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each text by itself, in lm-eval's windows of `max_length`, whose last one sees as much as the others."""
        texts = [str(each.args[0]) for each in requests]
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        left: list[int] = []
        for number, text in enumerate(texts):
            windows = get_rolling_token_windows(
                token_list=self.model.encode(text, alone=False),
                prefix_token=self.model.prefix,
                max_seq_len=self.model.max_length,
                context_len=1,
            )
            parts = [make_disjoint_window(window) for window in windows]
            pairs += parts
            owners += [number] * len(parts)
            left.append(len(parts))
        sums, what = [0.0] * len(texts), "Running loglikelihood_rolling requests"
        for number, total, _ in _shown(self.model.likelihoods(pairs), len(pairs), what, disable_tqdm):
            owner = owners[number]
            sums[owner] += total
            left[owner] -= 1
            if not left[owner]:
                self.cache_hook.add_partial("loglikelihood_rolling", (texts[owner],), sums[owner])
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [(str(each.args[0]), GenerationSettings.of(each.args[1])) for each in requests]
        found: dict[int, str] = {}
        answers = self.model.answers(asked, torch.initial_seed())
        for number, text in _shown(answers, len(asked), "Running generate_until requests", disable_tqdm):
            found[number] = text
            self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [found[number] for number in range(len(asked))]

    # --- chats

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.model.chat(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.model.choose_template(chat_template)

    @property
    def tokenizer_name(self) -> str:
        return self.model.template_name

    # --- what results say

    def get_model_info(self) -> dict[str, Any]:
        return self.model.describe()


def _shown(found: Iterable[_Found], total: int, what: str, hidden: bool) -> Iterator[_Found]:
    with bar(total, what, "request", enabled=not hidden) as progress:
        for each in found:
            yield each
            progress.update()


def _show_in_one_line() -> None:
    """A user's mistake that ends the program is one line and no traceback, also where the program is lm-eval's."""
    if getattr(sys.excepthook, "__name__", "") == _hook.__name__:
        return
    global _before
    _before = sys.excepthook
    sys.excepthook = _hook


_before = sys.__excepthook__


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, NKATError):
        print(f"error: {error}", file=sys.stderr)
    else:
        _before(kind, error, trace)
