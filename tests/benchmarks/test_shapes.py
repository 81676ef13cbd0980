"""The 7B-shaped files that speeds are measured on: formats as in the files people download, weights of a sane size."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Q

from benchmarks.shapes import MIXES, WEIGHT_STD, tensor_types, weights
from nkat.gguf.formats import dequantise


@pytest.mark.parametrize(
    ("mix", "counts"),
    [  # what llama.cpp prints when it loads Llama 2 7B so quantised, its 65 norms left out
        ("Q4_K_M", {Q.Q4_K: 193, Q.Q6_K: 33}),
        ("Q5_K_M", {Q.Q5_K: 193, Q.Q6_K: 33}),
        ("Q3_K_M", {Q.Q3_K: 129, Q.Q4_K: 92, Q.Q5_K: 4, Q.Q6_K: 1}),
        ("Q4_0", {Q.Q4_0: 225, Q.Q6_K: 1}),
    ],
)
def test_formats_are_those_of_the_real_files(mix, counts):
    assert Counter(qtype for _, qtype, _ in tensor_types(mix, 32)) == counts


@pytest.mark.parametrize(
    ("mix", "counts"),
    [  # what llama-quantize --dry-run says of a file of 8 blocks
        ("IQ1_S", {Q.IQ1_S: 39, Q.Q2_K: 10, Q.IQ2_XXS: 8, Q.Q5_K: 1}),
        ("IQ2_XXS", {Q.IQ2_XXS: 47, Q.Q2_K: 10, Q.Q5_K: 1}),
        ("IQ2_XS", {Q.IQ2_XS: 47, Q.Q2_K: 10, Q.Q5_K: 1}),
        ("IQ2_M", {Q.IQ2_S: 39, Q.IQ3_S: 18, Q.Q5_K: 1}),
        ("IQ3_XS", {Q.IQ3_S: 29, Q.IQ3_XXS: 28, Q.Q6_K: 1}),
        ("IQ3_S", {Q.IQ3_S: 57, Q.Q6_K: 1}),
        ("IQ3_M", {Q.IQ3_S: 40, Q.Q4_K: 17, Q.Q6_K: 1}),
        ("Q2_K", {Q.Q2_K: 33, Q.Q3_K: 24, Q.Q6_K: 1}),
        ("IQ4_XS", {Q.IQ4_XS: 56, Q.Q5_K: 1, Q.Q6_K: 1}),
        ("9B-delta-Q4_K_M", {Q.Q4_K: 55, Q.Q6_K: 9}),
    ],
)
def test_formats_are_those_that_llama_quantize_chooses(mix, counts):
    assert Counter(qtype for _, qtype, _ in tensor_types(mix, 8)) == counts


@pytest.mark.parametrize("mix", MIXES)
def test_weights_have_the_size_of_a_models(mix):
    for qtype in {qtype for _, qtype, _ in tensor_types(mix, 2)}:
        packed = torch.from_numpy(weights(qtype, (64, 512)).reshape(-1))
        found = dequantise(packed, qtype, (64, 512))
        assert float(found.std()) == pytest.approx(WEIGHT_STD, rel=0.1)
        assert abs(float(found.mean())) < WEIGHT_STD
