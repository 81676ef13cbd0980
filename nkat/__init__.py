"""NKAT for language models: antisymmetric INT8 Θ tensors in GGUF files, and the star product.

    import nkat

    model = nkat.open_model("model.gguf")
    theta = nkat.fit_theta(model, Path("my.txt"), rank=4)
    print(nkat.perplexity(model, Path("other.txt"), theta).change)
    nkat.save(theta, "model.nkat", model)

Names load what they need when they are first used; see `nkat.api`.
"""

from typing import TYPE_CHECKING

from nkat.errors import NKATError
from nkat.host.environment import sleep_while_waiting
from nkat.version import __version__

if TYPE_CHECKING:
    from nkat.api import Model, fit_theta, generate, load_theta, make_theta, open_model, perplexity, save

sleep_while_waiting()  # before anything loads torch

__all__ = [
    "Model",
    "NKATError",
    "__version__",
    "fit_theta",
    "generate",
    "load_theta",
    "make_theta",
    "open_model",
    "perplexity",
    "save",
]


def __getattr__(name: str) -> object:
    """The rest of `__all__`, imported at first use: torch takes a second, and a script's `--help` none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nkat import api

    return getattr(api, name)


def __dir__() -> "list[str]":
    return __all__
