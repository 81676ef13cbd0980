"""Which repository and which of its files a name means."""

from __future__ import annotations

import pytest

from nkat.errors import NKATError
from nkat.hub.names import HubName, choose_files, parse_name

FILES = [
    "README.md",
    "model-Q8_0.gguf",
    "model-Q4_K_M.gguf",
    "model-IQ4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "model-BF16-00001-of-00002.gguf",
    "model-BF16-00002-of-00002.gguf",
    "mmproj-model-F16.gguf",
    "model.imatrix.gguf",
]


@pytest.mark.parametrize(
    ("text", "repo", "wanted"),
    [
        ("hf:owner/repo", "owner/repo", None),
        ("hf:owner/repo-GGUF:Q4_K_M", "owner/repo-GGUF", "Q4_K_M"),
        ("hf:o.w_n-er/r.e_p-o:folder/file.gguf", "o.w_n-er/r.e_p-o", "folder/file.gguf"),
        ("hf:owner\\repo:q8_0", "owner/repo", "q8_0"),
    ],
)
def test_names(text: str, repo: str, wanted: str | None) -> None:
    assert parse_name(text) == HubName(repo, wanted)


@pytest.mark.parametrize("text", ["model.gguf", "models/hf:a", "C:model.gguf", "HF:owner/repo", ""])
def test_paths_are_no_names(text: str) -> None:
    assert parse_name(text) is None


@pytest.mark.parametrize("text", ["hf:", "hf:owner", "hf:owner/", "hf:owner/repo:", "hf:a/b/c", "hf:a b/c", "hf://a/b"])
def test_half_a_name_is_said(text: str) -> None:
    with pytest.raises(NKATError, match="not hf:OWNER/REPO"):
        parse_name(text)


@pytest.mark.parametrize(
    ("wanted", "files", "chosen"),
    [
        (None, FILES, "model-Q4_K_M.gguf"),
        (None, [file for file in FILES if "Q4_K_M" not in file], "model-Q8_0.gguf"),
        (None, ["a-IQ2_XS.gguf", "readme"], "a-IQ2_XS.gguf"),
        ("q4_k_m", FILES, "model-Q4_K_M.gguf"),
        ("IQ4_K_M", FILES, "model-IQ4_K_M.gguf"),
        ("Q4_K_S", FILES, "model-Q4_K_S.gguf"),
        ("model-Q8_0.gguf", FILES, "model-Q8_0.gguf"),
        ("Q5_K_M", ["m.Q5_K_M.gguf", "m.Q5_K.gguf"], "m.Q5_K_M.gguf"),
        ("Q5_K", ["m.Q5_K_M.gguf", "m.Q5_K.gguf"], "m.Q5_K.gguf"),
        ("UD-Q2_K_XL", ["m-UD-Q2_K_XL.gguf", "m-Q2_K_XL.gguf"], "m-UD-Q2_K_XL.gguf"),
        ("Q6_K", ["Q6_K/model.gguf", "Q8_0/model.gguf"], "Q6_K/model.gguf"),
        ("model.gguf", ["a/model.gguf", "b.gguf"], "a/model.gguf"),
    ],
)
def test_the_file_that_is_meant(wanted: str | None, files: list[str], chosen: str) -> None:
    assert choose_files(HubName("o/r", wanted), files) == [chosen]
    assert choose_files(HubName("o/r", wanted), files[::-1]) == [chosen]


@pytest.mark.parametrize("wanted", ["BF16", "model-BF16-00002-of-00002.gguf"])
def test_a_model_in_several_files_is_all_of_them(wanted: str) -> None:
    parts = ["model-BF16-00001-of-00002.gguf", "model-BF16-00002-of-00002.gguf"]
    assert choose_files(HubName("o/r", wanted), FILES[::-1]) == parts


@pytest.mark.parametrize(
    ("wanted", "files", "message"),
    [
        (None, ["model.safetensors", "mmproj-F16.gguf"], "hf:o/r: there is no model in a .gguf"),
        ("Q5_K_M", FILES, r"hf:o/r:Q5_K_M: there is no such file; there are BF16, IQ4_K_M, Q4_K_M, Q4_K_S, Q8_0$"),
        ("Q5_K_M", ["m-NVFP4.gguf", "m-MXFP4_MOE.gguf"], "there are MXFP4_MOE, NVFP4$"),
        ("Q5_K_M", ["plain.gguf"], "there are plain.gguf"),
        (None, ["a-Q2_K.gguf", "a-Q6_K.gguf"], r"several files match, give one as hf:o/r:FILE: a-Q2_K.gguf, a"),
        ("Q4_0", ["a-Q4_0.gguf", "b-Q4_0.gguf"], "several files match.*: a-Q4_0.gguf, b-Q4_0.gguf"),
        ("BF16", ["m-BF16-00002-of-00002.gguf"], "in 2 parts, and there is no m-BF16-00001-of-00002.gguf"),
        ("other.gguf", FILES, "there is no such file"),
    ],
)
def test_what_is_not_clear_is_listed(wanted: str | None, files: list[str], message: str) -> None:
    with pytest.raises(NKATError, match=message) as caught:
        choose_files(HubName("o/r", wanted), files)
    assert "\n" not in str(caught.value)
