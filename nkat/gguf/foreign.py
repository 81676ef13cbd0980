"""Files that lie where a model should, and types of tensors that ggml does not have: what they are, and what to do."""

from __future__ import annotations

import re

# How other files begin that lie where a model should, what they are, and what to do about it.
_OTHER_FILES = (
    (b"version https://git-lfs", "but a pointer of Git LFS, which stands for the model: fetch it with git lfs pull"),
    (
        rb"(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)*<(?:!doctype|html|head|body|\?xml|error)\b",
        "but a page of a web site, saved in place of the model: download the model again",
    ),
    (
        rb"(?:ggml|ggmf|ggjt|lmgg|fmgg|tjgg|algg|ggla)",
        "but of a format older than GGUF: convert the original model anew",
    ),
    (
        rb"PK\x03\x04",
        "but a zip archive, as PyTorch's checkpoints are: convert it with llama.cpp's convert_hf_to_gguf.py",
    ),
    (
        rb"\x80[\x02-\x05]",
        "but a pickle, as old checkpoints of PyTorch are: convert it with llama.cpp's convert_hf_to_gguf.py",
    ),
    (rb".{8}\{\s*\"", "but safetensors: convert its folder with llama.cpp's convert_hf_to_gguf.py"),
    (rb"\x1f\x8b|\xfd7zXZ|\x28\xb5\x2f\xfd|BZh|7z\xbc\xaf", "but a compressed file: unpack it first"),
    (rb"\s*[\[{]", "but JSON: it describes a model or says why a download failed"),
    (rb"\x00{64}", "but zeros: a download that was not finished; download it again"),
)

# Types of tensors that ggml no longer has, by their numbers there; the packed ones are now made while loading.
_REMOVED_TYPES = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
# Types of ik_llama.cpp, a fork with quantisations of its own (ggml/include/ggml.h there).
_IK_TYPES = {
    133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 136: "Q8_K64", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K",
    141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 147: "Q8_K16", 148: "Q8_K32", 149: "Q8_KR8",
    150: "Q8_K128", 151: "Q8_KV", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS",
    157: "IQ2_KL", 158: "IQ1_KT", 202: "Q4_0_R8", 206: "Q5_0_R4", 208: "Q8_0_R8", 210: "Q2_K_R4", 211: "Q3_K_R4",
    212: "Q4_K_R4", 213: "Q5_K_R4", 214: "Q6_K_R4", 216: "IQ2_XXS_R4", 217: "IQ2_XS_R4", 218: "IQ3_XXS_R4",
    219: "IQ1_S_R4", 220: "IQ4_NL_R4", 221: "IQ3_S_R4", 222: "IQ2_S_R4", 223: "IQ4_XS_R8", 229: "IQ1_M_R4",
    230: "BF16_R16", 233: "Q6_0_R4", 335: "IQ2_BN_R4", 337: "IQ2_K_R4", 338: "IQ3_K_R4", 339: "IQ4_K_R4",
    340: "IQ5_K_R4", 344: "IQ4_KS_R4", 352: "IQ5_KS_R4", 398: "Q8_KV_R8", 399: "Q8_K_R8",
}  # fmt: skip


def what_it_is(beginning: bytes) -> str:
    """Of a file that is no GGUF, by its first bytes, to stand behind "not a GGUF file"."""
    for pattern, what in _OTHER_FILES:
        if re.match(pattern, beginning, re.IGNORECASE | re.DOTALL):
            return f", {what}"
    line = beginning.strip().partition(b"\n")[0].strip()
    if len(line) > 4 and line.isascii() and line.decode().isprintable():
        return f", but text, which may say why a download failed: {line.decode()[:80]!r}"
    return f" (found {beginning[:4]!r})"


def foreign_type(code: int) -> str:
    """Of a tensor whose type has this number."""
    if code in _REMOVED_TYPES:
        return f"{_REMOVED_TYPES[code]}, which ggml has removed: quantise the original model anew (Q4_0 for Q4_0_N_M)"
    if code in _IK_TYPES:
        return f"{_IK_TYPES[code]}, which only ik_llama.cpp has: take a file in Q4_K, Q6_K or the like"
    return f"unknown tensor type {code} (a newer ggml's, or a damaged file)"
