"""`nkat-lm-eval`: lm-eval's own command with the model `nkat` in its register.

Releases up to 0.4.13 do not look for models in other packages; later ones find it by the entry point, and this changes
nothing for them.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("nkat.harness.command")

import os
import sys
from importlib.util import find_spec

from nkat.errors import NKATError
from nkat.host.commandline import parser

_ABOUT = """\
lm-evaluation-harness on a GGUF or .nkat, run in this process. The arguments are lm-eval's own, which
`nkat-lm-eval run --help` lists; --model is nkat where it is left out. The ones most used:

  --model_args path=FILE,…    the model, and where wanted:
      theta=FILE              a file with Θ alone, in place of that in the model's file
      gamma=0.97              strength of Θ, 1 turns it off
      threads=N               of the processor
      activations=int8        the layers' inputs rounded as llama.cpp does: faster, no longer exact
      max_length=N            tokens of a request at most
  --tasks NAME,…              --include_path FOLDER has tasks of yours
  --num_fewshot N, --limit N  examples before each question; questions at most
  --apply_chat_template       the model's own
  --output_path FOLDER        keeps the results, --log_samples each answer as well
  --use_cache FILE            keeps what was asked, to go on after a break
"""
_EXAMPLES = """\
  python -m nkat.harness.command --model_args path=models/smollm2.nkat --tasks arc_easy --limit 100
  python -m nkat.harness.command --model_args path=models/smollm2.nkat,gamma=1 --tasks mine --include_path tasks
"""
_QUIET = {"LMEVAL_LOG_LEVEL": "WARNING", "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
_OWN = ("-h", "--help", "--version")  # where it is the only word
NAME, PLUGIN = "nkat", "nkat.harness.plugin:NkatLM"


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--quiet"]  # which lm-eval does not know
    if len(words) < len(sys.argv[1:]):
        os.environ |= _QUIET
    if not words or (len(words) == 1 and words[0] in _OWN):
        own = parser(_ABOUT, _EXAMPLES)
        own.add_argument("arguments", nargs="*", help="lm-eval's")
        own.parse_args(words or ["--help"])
    if find_spec("lm_eval") is None:
        raise NKATError('this Python has no lm-eval: pip install "nkat[eval]", in a checkout pip install ".[eval]"')
    sys.argv[1:] = _with_model(words)
    run_harness()


def run_harness() -> None:
    """lm-eval's command with the arguments in `sys.argv`."""
    import lm_eval.models  # noqa: F401 - fills the register
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=PLUGIN)
    try:
        cli_evaluate()
    except ValueError as error:
        if str(error).startswith("Tasks not found"):  # what a slip of the pen is, among all that lm-eval may raise
            raise NKATError(f"{error} (`nkat-lm-eval ls tasks` lists them; --include_path has yours)") from None
        raise


def _with_model(words: list[str]) -> list[str]:
    """The arguments of a run, with the model where none is named."""
    if words[0] in ("ls", "validate") or any(word.partition("=")[0] in ("--model", "-M", "--config") for word in words):
        return words
    if set(words) & {"-h", "--help"}:
        return words
    return [*words, "--model", NAME]
