"""NKAT for language models: antisymmetric INT8 Θ tensors in GGUF files, and the star product.

    import nkat

    model = nkat.open_model("model.gguf")
    theta = nkat.fit_theta(model, Path("my.txt"), rank=4)
    print(nkat.perplexity(model, Path("other.txt"), theta).change)
    nkat.save(theta, "model.nkat", model)

Names load what they need when they are first used; see `nkat.api`.
"""

import os
from typing import TYPE_CHECKING

from nkat.errors import NKATError
from nkat.version import __version__

if TYPE_CHECKING:
    from nkat.api import Model, fit_theta, generate, load_theta, make_theta, open_model, perplexity, save

# Threads that wait for each other shall sleep instead of spin. On a quiet machine that costs about 5 %; with one other
# busy process on two cores, spinning made the same work 5 to 25 times slower. OpenMP reads this when torch is loaded,
# so it has to be said before; a value the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
