"""The stored scales: where they are, that nothing else moves, that a weight is linear in them for gguf-py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nkat.gguf.file import GGUFFile
from nkat.gguf.formats import BLOCK_FORMATS
from nkat.gguf.scales import differ_in_scales_only, has_scales, put_scales, stored_scales
from nkat.gguf.writer import BaseView
from tests.gguf.test_formats import FLOATS, HALVES, finite, flat, oracle, random_rows, row_length
from tests.support.tiny_models import write_tiny_model

SCALED = [qtype for qtype, halves in HALVES.items() if halves]
every_scaled_type = pytest.mark.parametrize("qtype", SCALED, ids=lambda qtype: qtype.name)


def test_every_format_says_where_its_scales_are() -> None:
    assert {qtype: block.halves for qtype, block in BLOCK_FORMATS.items()} == HALVES
    assert {qtype for qtype in (*FLOATS, *HALVES) if has_scales(qtype)} == set(SCALED)
    assert 10 < len(SCALED) < len(HALVES)  # MXFP4, NVFP4 and IQ1_M have others


@every_scaled_type
def test_scales_are_read_and_put_back(qtype) -> None:
    data = finite(random_rows(qtype, (5, row_length(qtype, 3))), qtype)
    found = stored_scales(flat(data), qtype)
    blocks = data.reshape(15, -1)
    expected = [blocks[:, start : start + 2].copy().view("<f2")[:, 0].astype("f4") for start in HALVES[qtype]]
    np.testing.assert_array_equal(found.numpy(), np.stack(expected, axis=1))
    packed = flat(data.copy())
    put_scales(packed, qtype, found)
    np.testing.assert_array_equal(packed.numpy(), data.reshape(-1))
    put_scales(packed, qtype, 2 * found)
    changed = np.flatnonzero((packed.numpy().reshape(15, -1) != blocks).any(axis=0))
    assert set(changed) <= {byte for start in HALVES[qtype] for byte in (start, start + 1)}
    doubled = oracle(packed.numpy().reshape(data.shape), qtype)
    np.testing.assert_array_equal(doubled, 2 * oracle(data, qtype))  # a weight is linear in its scales


@every_scaled_type
def test_scales_are_rounded_as_float16_is_and_stay_finite(qtype) -> None:
    packed = flat(finite(random_rows(qtype, (1, row_length(qtype, 4))), qtype))
    values = torch.tensor([1.0 + 2.0**-12, 1e6, -1e6, 1e-9])[:, None].repeat(1, len(HALVES[qtype]))
    put_scales(packed, qtype, values)
    expected = torch.tensor([1.0, 65504.0, -65504.0, 0.0])[:, None].expand_as(values)
    assert torch.equal(stored_scales(packed, qtype), expected)


def test_files_that_differ_in_scales_only(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "llama", blocks=1, qtype=next(iter(HALVES)))
    name = "blk.0.ffn_up.weight"
    with GGUFFile.open(base) as file:
        place, view = file.tensors[name].offset, BaseView.whole(file)

        def alike(*changed: int) -> bool:
            data = bytearray(base.read_bytes())
            for byte in changed:
                data[byte] ^= 1
            other = tmp_path / "other.gguf"
            other.write_bytes(data)
            with GGUFFile.open(other) as second:
                return differ_in_scales_only(view, second)

        assert alike()
        assert alike(place, place + 1, place + 18)  # d of two blocks
        assert not alike(place + 2)  # two of the integers
        assert not alike(file.tensors["blk.0.attn_norm.weight"].offset)
        assert not alike(file.metadata.spans["general.name"][1] - 1)  # the last letter of the name
