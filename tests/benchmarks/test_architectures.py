"""The table of architectures: what its wide models are, and when two programs chose the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Q

from benchmarks import architecture_speed, greedy
from nkat.gguf.file import GGUFFile
from nkat.lm.load import load_model
from tests.support.tiny_models import ARCHITECTURES, write_tiny_model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_wide_model_is_loaded_and_packed_in_k_quants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    """With as many blocks and as narrow as a test can bear; only what is no multiple of 256 stays as it is."""
    own = architecture_speed._OWN.get(arch, {})
    narrow = {"embedding": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "feed_forward": 256, "state": 64}
    narrow |= {"value_heads": 4, "key_heads": 2}
    wide = architecture_speed._WIDE
    monkeypatch.setattr(architecture_speed, "_WIDE", {**wide, **{k: narrow[k] for k in wide.keys() & narrow.keys()}})
    monkeypatch.setitem(architecture_speed._OWN, arch, {k: narrow.get(k, v) for k, v in own.items()})
    replace(ARCHITECTURES[arch], **own)  # no field that there is not
    file = GGUFFile.open(architecture_speed.write_wide_model(tmp_path / "wide.gguf", arch))
    weights = [info for name, info in file.tensors.items() if len(info.shape) > 1 and name.endswith(".weight")]
    types = {info.type for info in weights}
    assert (Q.MXFP4 if arch == "gpt-oss" else Q.Q4_K) in types
    large = [
        info for info in weights if info.shape[-1] % 256 == 0 and "inp" not in info.name and "ssm" not in info.name
    ]
    assert all(info.type != Q.F32 for info in large)
    loaded = load_model(tmp_path / "wide.gguf")
    with torch.inference_mode():
        assert loaded.model(torch.tensor([[1, 5]])).isfinite().all()


def test_tokens_are_compared_up_to_the_first_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(write_tiny_model(tmp_path / "m.gguf", "llama"), repack=True)
    chosen: list[int] = []
    for _ in range(6):  # one more each time
        monkeypatch.setattr(greedy, "_theirs", lambda *_, tokens=[*chosen, 3]: tokens)
        found = greedy.compare_greedy(Path("server"), loaded, [1, 5, 9], len(chosen) + 1)
        assert (found.equal, found.count) == (len(chosen), len(chosen) + 1)
        assert found.margin is not None
        assert found.text == f"{len(chosen)} of {len(chosen) + 1} (then one that leads by {found.margin:.1g})"
        with torch.no_grad():
            logits = loaded.model(torch.tensor([[1, 5, 9, *chosen]]))[0, -1]
        logits[list(loaded.tokenizer.eog_ids)] = -torch.inf
        assert found.margin == pytest.approx(float(logits.max() - logits[3]), abs=1e-3)
        chosen.append(int(logits.argmax()))
    monkeypatch.setattr(greedy, "_theirs", lambda *_: chosen)
    assert greedy.compare_greedy(Path("server"), loaded, [1, 5, 9], 6) == greedy.Greedy(6, 6, None)
