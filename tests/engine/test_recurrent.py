"""States of recurrent blocks in the compiled program: what is kept of them, and what an interrupt leaves."""

from __future__ import annotations

import pytest
import torch

from nkat.engine.compiled import CompiledDecoder
from nkat.engine.decoder import make_decoder
from nkat.engine.eager import EagerDecoder
from nkat.engine.session import Session
from nkat.lm.load import LoadedModel, load_model
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.isa

IDS = [(29 * i + 5) % 200 for i in range(60)]


@pytest.fixture(scope="module", params=["qwen35", "qwen3next"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("states") / "tiny.gguf", request.param), repack=True)


def compiled(loaded: LoadedModel) -> CompiledDecoder:
    decoder = make_decoder(loaded.model, 100)
    assert isinstance(decoder, CompiledDecoder)
    return decoder


def fresh(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return EagerDecoder(loaded.model, 100).prefill(tokens)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_it_goes_back_to_where_states_were_kept(loaded: LoadedModel) -> None:
    decoder = compiled(loaded)
    decoder.prefill(IDS[:20])
    decoder.keep_state()
    decoder.prefill(IDS[20:30])
    decoder.keep_state(most=1)  # of 20 tokens no longer
    decoder.step(7)
    assert [decoder.reach(n) for n in (31, 30, 29, 0)] == [31, 30, 0, 0]
    with pytest.raises(ValueError, match="state after 20 tokens was not kept"):
        decoder.length = 20
    decoder.length = 30
    assert gap(decoder.step(8), fresh(loaded, [*IDS[:30], 8])) < 1e-4
    decoder.length = 30
    assert gap(decoder.prefill(IDS[30:40]), fresh(loaded, IDS[:40])) < 1e-4
    decoder.length = 0
    assert gap(decoder.prefill(IDS[5:15]), fresh(loaded, IDS[5:15])) < 1e-4
    assert decoder.reach(30) == 10


def test_an_interrupted_pass_is_none(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program may have run to its end, and the states be those of tokens that the length does not count."""
    session = Session(loaded.model, 100)
    session.prefill(IDS[:20])
    decoder = session.decoder
    assert isinstance(decoder, CompiledDecoder)
    run = decoder._one.run

    def interrupted(*arguments: object) -> torch.Tensor:
        run(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder._one, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.step(7)
    assert decoder.length == 20
    with pytest.raises(RuntimeError, match="a pass behind 20 tokens was interrupted"):
        decoder.step(8)
    assert session.reuse([*IDS[:20], 8]) == 19
    assert gap(session.prefill([IDS[19], 8]), fresh(loaded, [*IDS[:20], 8])) < 1e-4


def test_their_bytes_count(loaded: LoadedModel) -> None:
    decoder = compiled(loaded)
    before = decoder.cache_nbytes
    decoder.prefill(IDS[:20])
    assert decoder.cache_nbytes == before
    decoder.keep_state()
    sizes = loaded.config.recurrence
    assert sizes is not None
    states = 3 * 4 * (3 * sizes.channels + sizes.value_heads * sizes.size**2)
    assert decoder.cache_nbytes == before + states
