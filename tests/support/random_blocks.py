"""Packed weights of tiny models: gguf-py's where it quantises to a type, else random blocks of about the same size."""

from __future__ import annotations

import zlib

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

# their scale is the float16 at the start of a block
_SCALE_FIRST = (QType.IQ1_S, QType.IQ2_XXS, QType.IQ2_XS, QType.IQ2_S, QType.IQ3_XXS, QType.IQ3_S)
UNKNOWN = QType.Q8_K  # no type of files: nothing can unpack it


def pack(values: np.ndarray, qtype: QType) -> np.ndarray:
    """Bytes for weights [..., n]: uint8 [..., bytes of a row], or gguf-py's float arrays.

    Random blocks have the values' standard deviation and nothing else of them; the same values give the same blocks.
    """
    if qtype not in (*_SCALE_FIRST, QType.IQ1_M, QType.NVFP4, UNKNOWN):
        return gguf.quants.quantize(values, qtype)
    rng = np.random.default_rng(zlib.crc32(values.tobytes()))
    size, nbytes = GGML_QUANT_SIZES[qtype]
    blocks = rng.integers(0, 256, (values.size // size, nbytes), dtype=np.uint8)
    if qtype != UNKNOWN:
        _set_scale(blocks, qtype, np.ones((len(blocks), 1)))
        spread = gguf.quants.dequantize(blocks, qtype).std()
        _set_scale(blocks, qtype, rng.uniform(0.8, 1.2, (len(blocks), 1)) * values.std() / spread)
    return blocks.reshape(*values.shape[:-1], -1)


def _set_scale(blocks: np.ndarray, qtype: QType, d: np.ndarray) -> None:
    """Writes scales [n, 1] into blocks [n, bytes]."""
    if qtype == QType.NVFP4:  # a byte for each of four groups; what it stands for is halved
        blocks[:, :4] = gguf.quants.NVFP4.fp32_to_ue4m3(2 * d * np.array([[0.5, 1.0, 1.25, 2.0]]))
    elif qtype == QType.IQ1_M:  # the high nibbles of four words
        bits = d.astype("<f2").view("<u2")
        blocks[:, 49::2] = blocks[:, 49::2] & 0x0F | (bits >> np.array([0, 4, 8, 12]) & 0x0F) << 4
    else:
        blocks[:, :2] = d.astype("<f2").view(np.uint8)
