"""GGUF metadata → config: values of each architecture, defaults, and one clear error for everything else."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from nkat.gguf.file import GGUFFile, TensorInfo
from nkat.lm.architectures import BLOCK_LINEARS, QKV, SHARED_EXPERT, STACKS
from nkat.lm.config import ModelConfig, Turning
from nkat.lm.keys import ConfigError
from nkat.lm.mixture import Mixture
from tests.support.tiny_models import ARCHITECTURES, MIXTURE_FAMILIES, TinyOptions, write_tiny_model

MIXTRAL = dict(MIXTURE_FAMILIES)["llama"]


def read_tiny(folder: Path, arch: str, **options: Any) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Metadata and tensors of a tiny model, as dicts that a test may change."""
    file = GGUFFile.open(write_tiny_model(folder / f"{arch}.gguf", arch, **options))
    return {key: file.metadata[key] for key in file.metadata if key.startswith((arch, "general."))}, dict(file.tensors)


def config_of(folder: Path, arch: str, extra: Mapping[str, Any] | None = None, **options: Any) -> ModelConfig:
    """Config of a tiny model with `extra` metadata keys (under the architecture) set, or removed where None."""
    metadata, tensors = read_tiny(folder, arch, **options)
    for key, value in (extra or {}).items():
        metadata[f"{arch}.{key}"] = value
        if value is None:
            del metadata[f"{arch}.{key}"]
    return ModelConfig.from_gguf(metadata, tensors)


def tensor(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, shape, GGMLQuantizationType.F32, 0, 4 * math.prod(shape), (0, 0))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lengths_heads_and_flags(tmp_path, arch):
    config = config_of(tmp_path, arch)
    tiny = ARCHITECTURES[arch]
    head_dim = tiny.head_dim or 16  # from attention.key_length, or embedding / heads
    assert (config.embedding_length, config.block_count) == (64, tiny.blocks)
    assert config.feed_forward_length == max(tiny.feed_forward_by_block or [tiny.feed_forward])
    assert (config.head_count, config.kv_head_count, config.head_dim) == (4, 2, head_dim)
    asked = tiny.metadata or {}
    usual = 1.0 if arch == "gemma4" else head_dim**-0.5
    assert config.attention_scale == pytest.approx(asked.get("attention.scale", usual))
    assert config.rope.interleaved == (arch in ("llama", "mistral3", "smollm3", "glm4", "granite", "granitemoe"))
    assert config.rope.dimensions == (tiny.rotary or head_dim)
    assert config.architecture.qk_norm == tiny.qk_norm
    assert config.architecture.wide_qk_norm == tiny.wide_qk_norm
    assert config.architecture.post_norm == (arch.startswith("gemma") or arch in ("glm4", "olmo2"))
    assert config.architecture.gelu == arch.startswith("gemma")
    scale = 8.0 if arch.startswith("gemma") else asked.get("embedding_scale", 1.0) / asked.get("residual_scale", 1.0)
    assert config.embedding_scale == pytest.approx(scale)
    linears = config.linears(1)
    if tiny.value_heads:
        check_recurrent(config, tiny)
        linears = config.linears(3)
        assert linears["attn_q"] == (8 * head_dim, 64)  # and its gate
    if tiny.fused_qkv:
        assert linears["attn_qkv"] == (8 * head_dim, 64)
    else:
        assert linears["attn_k"] == ((tiny.kv_heads_by_block or (2, 2))[1] * head_dim, 64)
    assert linears["attn_output"] == (64, 4 * head_dim)
    if config.mixture is not None:
        assert (config.mixture.count, config.mixture.used, config.active_experts) == (6, 2, 1 / 3)
        assert list(config.mixture.stacks(64).values()) == [(6, 48, 64), (6, 48, 64), (6, 64, 48)]
        shared = SHARED_EXPERT if tiny.shared_length else ()
        assert list(linears) == [*QKV, "attn_output", *shared]
        return
    assert linears["ffn_up"] == (192 if tiny.fused_gate_up else 96, 64)
    assert linears["ffn_down"] == (64, 96)
    assert list(linears) == [name for name in BLOCK_LINEARS if name in linears]  # in the order of the computation


def check_recurrent(config: ModelConfig, tiny: TinyOptions) -> None:
    assert config.recurrent_blocks == {0, 1, 2}
    rows = 16 * (tiny.value_heads + 2 * tiny.key_heads)  # of queries and keys, too
    assert config.linears(1)["attn_qkv"] == (rows, 64)
    assert config.linears(1)["attn_gate"] == (16 * tiny.value_heads, 64)
    assert config.linears(1)["ssm_out"] == (64, 16 * tiny.value_heads)
    strengths = {"ssm_ba": 2} if tiny.grouped else {"ssm_beta": 1, "ssm_alpha": 1}
    assert {name: config.linears(1)[name] for name in strengths} == {
        name: (times * tiny.value_heads, 64) for name, times in strengths.items()
    }
    assert "attn_q" not in config.linears(1)
    assert "attn_q_norm" in config.norms(3)
    assert "attn_q_norm" not in config.norms(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm.conv_kernel": None}, "ssm.conv_kernel is missing"),
        ({"ssm.conv_kernel": 17}, "ssm.conv_kernel must be at most 16, got 17"),
        ({"ssm.inner_size": 65}, "ssm.inner_size 65 is not ssm.time_step_rank 4 times ssm.state_size 16"),
        ({"ssm.group_count": 3}, "ssm.time_step_rank 4 is no multiple of ssm.group_count 3"),
        ({"ssm.state_size": "16"}, "ssm.state_size must be an integer, got '16'"),
        ({"full_attention_interval": 2}, r"tensor blk\.1\.attn_qkv\.weight has shape \(128, 64\), expected \(288"),
        ({"full_attention_interval": 0}, "full_attention_interval must be at least 1"),
        ({"attention.recurrent_layers": np.array([True, True])}, "recurrent_layers has 2 values for 4 blocks"),
        ({"rope.dimension_sections": np.array([7, 7, 0, 0])}, "at most four lengths, together 1 to 12, got"),
        ({"rope.dimension_sections": np.array([0, 0, 0, 0])}, "at most four lengths, together 1 to 12, got"),
        ({"rope.dimension_sections": np.array([-1, 2, 0, 0])}, "at most four lengths, together 1 to 12, got"),
        ({"expert_count": 4}, "mixtures of experts are not supported in qwen35 models"),
    ],
)
def test_what_is_wrong_with_recurrent_blocks(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, "qwen35", changes)


def test_which_blocks_are_recurrent(tmp_path):
    listed = np.array([True, True, True, False])
    assert config_of(tmp_path, "qwen35", {"attention.recurrent_layers": listed}).recurrent_blocks == {0, 1, 2}
    assert config_of(tmp_path, "qwen35", {"full_attention_interval": None}).recurrent_blocks == {0, 1, 2}
    assert config_of(tmp_path, "qwen35", interval=2).recurrent_blocks == {0, 2}
    assert config_of(tmp_path, "qwen35", draft=1).recurrent_blocks == {0, 1, 2}
    assert config_of(tmp_path, "qwen3").recurrent_blocks == set()


@pytest.mark.parametrize(
    ("sections", "still"),
    [((2, 2, 2, 0), set()), ((2, 1, 1, 2), {4, 5}), ((1, 2, 0, 0), {2, 5}), ((0, 0, 0, 3), {0, 1, 2, 3, 4, 5})],
)
def test_pairs_that_a_position_of_text_does_not_turn(tmp_path, sections, still):
    assert config_of(tmp_path, "qwen35", sections=sections).rope.still == still


def test_real_models(smollm2, gemma3, qwen):
    configs = []
    for path in (smollm2, gemma3, qwen):
        with GGUFFile.open(path) as file:
            configs.append(ModelConfig.from_gguf(file.metadata, file.tensors))
    smol, gemma, coder = configs
    assert (smol.block_count, smol.head_count, smol.kv_head_count, smol.vocab_size) == (30, 9, 3, 49152)
    assert (smol.rope.base, smol.rope.interleaved, smol.context_length) == (100000.0, True, 8192)
    assert (gemma.sliding_window, gemma.head_dim, gemma.vocab_size) == (512, 256, 262144)
    assert [i for i, local in enumerate(gemma.local_blocks) if not local] == [5, 11, 17]
    assert (gemma.rope.base, gemma.local_rope.base) == (1e6, 1e4)
    assert (coder.head_count, coder.kv_head_count, coder.rope.base) == (14, 2, 1e6)


def test_linear_scaling_divides_positions(tmp_path):
    assert config_of(tmp_path, "llama").rope.scale == 1.0
    for scaling in ({"type": "linear", "factor": 8.0}, {"factor": 8.0}):
        assert config_of(tmp_path, "llama", rope_scaling=scaling).rope.scale == 1 / 8
    assert config_of(tmp_path, "llama", {"rope.scale_linear": 4.0}).rope.scale == 1 / 4
    assert config_of(tmp_path, "llama", rope_scaling={"type": "none", "factor": 8.0}).rope.scale == 1.0
    assert config_of(tmp_path, "llama", rope_scaling={"type": "linear", "factor": 0.0}).rope.scale == 1.0


def test_yarn_sets_magnitude_and_context(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 512, "attn_factor": 1.25}
    rope = config_of(tmp_path, "qwen2", rope_scaling=yarn).rope
    assert (rope.yarn, rope.scale, rope.original_context) == (True, 0.25, 512)
    assert rope.magnitude == pytest.approx(1.25 * (1 + 0.1 * math.log(4)))


def test_gemma_scales_only_blocks_without_a_window(tmp_path):
    config = config_of(
        tmp_path, "gemma3", sliding_window=8, blocks=7, freq_base=1e6, rope_scaling={"type": "linear", "factor": 8.0}
    )
    assert (config.rope.base, config.rope.scale) == (1e6, 1 / 8)
    assert (config.local_rope.base, config.local_rope.scale) == (1e4, 1.0)
    assert config.local_blocks == (True,) * 5 + (False, True)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (3, (True, True, False, True)),
        (1, (False,) * 4),
        (0, (True,) * 4),
        (np.array([True, False, False, True]), (True, False, False, True)),
    ],
)
def test_window_patterns(tmp_path, pattern, expected):
    extra = {"attention.sliding_window_pattern": pattern}
    assert config_of(tmp_path, "gemma3", extra, blocks=4, sliding_window=8).local_blocks == expected


def test_window_of_other_architectures_is_not_used(tmp_path):
    config = config_of(tmp_path, "qwen2", {"attention.sliding_window": 8})
    assert config.sliding_window == 0
    assert not any(config.local_blocks)


def test_gemma_27b_scales_by_embedding_over_heads(tmp_path):
    config = config_of(tmp_path, "gemma3", blocks=62)
    assert config.attention_scale == (64 // 4) ** -0.5
    assert config_of(tmp_path, "gemma3", blocks=61).attention_scale == 24**-0.5


def test_arrays_with_one_value_for_all_blocks_count_as_that_value(tmp_path):
    assert config_of(tmp_path, "llama", {"attention.head_count_kv": np.array([2, 2, 2])}).kv_head_count == 2
    with pytest.raises(ConfigError, match=r"llama\.attention\.head_count_kv differs from block to block"):
        config_of(tmp_path, "llama", {"attention.head_count_kv": np.array([2, 2, 4])})


def test_optional_tensors_are_accepted(tmp_path):
    metadata, tensors = read_tiny(tmp_path, "llama", tied=True, rope_factors=True)
    for extra in (tensor("blk.0.attn_q.bias", 64), tensor("blk.2.ffn_up.bias", 96)):
        tensors[extra.name] = extra
    ModelConfig.from_gguf(metadata, tensors)


def test_theta_tensors_are_not_the_models_own(tmp_path):
    metadata, tensors = read_tiny(tmp_path, "llama")
    for suffix in ("theta_p", "theta_q", "theta_scale"):
        tensors[f"blk.0.attn_q.{suffix}"] = tensor(f"blk.0.attn_q.{suffix}", 64, 4)
    ModelConfig.from_gguf(metadata, tensors)


@pytest.mark.parametrize(
    ("arch", "key", "value", "message"),
    [
        ("llama", "embedding_length", None, r"llama\.embedding_length is missing"),
        ("llama", "block_count", None, r"llama\.block_count is missing"),
        ("llama", "context_length", None, r"llama\.context_length is missing"),
        ("llama", "feed_forward_length", None, r"llama\.feed_forward_length is missing"),
        ("llama", "attention.head_count", None, r"llama\.attention\.head_count is missing"),
        ("qwen3", "attention.layer_norm_rms_epsilon", None, r"layer_norm_rms_epsilon is missing"),
        ("llama", "embedding_length", 0, r"embedding_length must be at least 1, got 0"),
        ("llama", "block_count", 10**6, r"block_count is 1000000, but the file has only \d+ tensors"),
        ("llama", "embedding_length", 64.0, r"embedding_length must be an integer, got 64\.0"),
        ("llama", "embedding_length", True, r"embedding_length must be an integer, got True"),
        ("llama", "embedding_length", "64", r"embedding_length must be an integer, got '64'"),
        ("llama", "attention.head_count_kv", 3, r"head_count 4 is no multiple of attention\.head_count_kv 3"),
        ("llama", "attention.head_count", 6, r"embedding_length 64 is no multiple of attention\.head_count 6"),
        ("llama", "attention.layer_norm_rms_epsilon", 0.0, r"epsilon must be a finite number above 0"),
        ("llama", "attention.layer_norm_rms_epsilon", math.nan, r"epsilon must be a finite number"),
        ("llama", "rope.freq_base", math.inf, r"rope\.freq_base must be a finite number above 1"),
        ("llama", "rope.freq_base", "big", r"rope\.freq_base must be a number, got 'big'"),
        ("llama", "rope.dimension_count", 15, r"rope\.dimension_count must be even and at most 16, got 15"),
        ("llama", "rope.dimension_count", 18, r"rope\.dimension_count must be even and at most 16, got 18"),
        ("qwen3", "rope.scaling.type", "longrope", r"rope\.scaling\.type 'longrope' is not supported"),
        ("llama", "rope.scaling.type", 3, r"rope\.scaling\.type must be a string"),
        ("llama", "rope.scaling.factor", -2.0, r"rope\.scaling\.factor must be a finite number above 0"),
        ("qwen3", "expert_count", 8, r"expert_count is 8: mixtures of experts are not supported in qwen3 models"),
        ("llama", "expert_count", 8, r"metadata llama\.expert_used_count is missing"),
        ("llama", "expert_used_count", 2, r"expert_used_count is 2, but there is no llama\.expert_count"),
        ("llama", "attention.causal", False, r"attention\.causal = False is not supported"),
        ("qwen3", "attention.value_length", 32, r"value_length 32 differs from the key length 24"),
        ("glm4", "rope.dimension_sections", np.array([8, 12, 12, 0]), r"sections = \[8, 12, 12, 0\] is not supported"),
        ("granite", "deepstack_mapping", np.array([-1, 0, 1]), r"deepstack_mapping = \[-1, 0, 1\] is not supported"),
        ("qwen3moe", "expert_group_count", 4, r"expert_group_count = 4 is not supported"),
        ("gemma3", "attention.sliding_window", -1, r"sliding_window must be at least 0, got -1"),
        ("gemma3", "attention.sliding_window_pattern", np.array([True]), r"has 1 values for 3 blocks"),
        ("gemma3", "rope.freq_base_swa", 0.0, r"rope\.freq_base_swa must be a finite number above 1"),
    ],
)
def test_bad_metadata_is_named(tmp_path, arch, key, value, message):
    options = {"sliding_window": 8} if arch == "gemma3" else {}
    config_of(tmp_path, arch, **options)  # the same without the change is accepted
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, arch, {key: value}, **options)


def test_yarn_factor_below_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"factor must be at least 1 for yarn, got 0\.5"):
        config_of(tmp_path, "llama", rope_scaling={"type": "yarn", "factor": 0.5})


def test_other_architectures_are_refused_by_name(tmp_path):
    metadata, tensors = read_tiny(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"'mamba' is not supported; .* llama, qwen2, qwen3, gemma3"):
        ModelConfig.from_gguf({**metadata, "general.architecture": "mamba"}, tensors)
    del metadata["general.architecture"]
    with pytest.raises(ConfigError, match=r"general\.architecture is missing"):
        ModelConfig.from_gguf(metadata, tensors)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("llama", "token_embd.weight"),
        ("llama", "output_norm.weight"),
        ("llama", "blk.1.ffn_gate.weight"),
        ("qwen3", "blk.2.attn_k_norm.weight"),
        ("gemma3", "blk.0.post_ffw_norm.weight"),
    ],
)
def test_missing_and_misshapen_tensors_are_named(tmp_path, arch, name):
    metadata, tensors = read_tiny(tmp_path, arch)
    found = tensors[name]
    tensors[name] = replace(found, shape=(*found.shape[:-1], found.shape[-1] + 1))
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_gguf(metadata, tensors)
    assert all(text in str(error.value) for text in (name, str(found.shape), str(tensors[name].shape)))
    del tensors[name]
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        ModelConfig.from_gguf(metadata, tensors)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("llama", "blk.0.attn_q_norm.weight"),
        ("llama", "blk.0.attn_rel_b.weight"),
        ("llama", "blk.3.attn_q.weight"),
        ("llama", "output_norm.bias"),
        ("qwen2", "blk.0.attn_output.bias"),
        ("qwen2", "rope_freqs.weight"),
    ],
)
def test_unknown_tensors_are_refused(tmp_path, arch, name):
    metadata, tensors = read_tiny(tmp_path, arch)
    tensors[name] = tensor(name, 64)
    with pytest.raises(ConfigError, match=f"tensor {name} is unknown"):
        ModelConfig.from_gguf(metadata, tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.key_length", 2_100_000),
        ("attention.key_length", 4097),
        ("context_length", 1 << 31),
        ("attention.sliding_window", (1 << 64) - 1),
        ("feed_forward_length", 1 << 40),
        ("block_count", 1 << 20),
        ("rope.scaling.original_context_length", (1 << 64) - 1),
    ],
)
def test_every_size_has_a_bound(tmp_path, key, value):
    """A head lies on a thread's stack, and the others become 32-bit or 64-bit integers of the kernels."""
    with pytest.raises(ConfigError, match=key):
        config_of(tmp_path, "gemma3", {key: value}, sliding_window=8)
    assert config_of(tmp_path, "gemma3", {"context_length": (1 << 31) - 1}).context_length == (1 << 31) - 1


def test_the_largest_head_is_run(tmp_path):
    from nkat.engine.decoder import make_decoder
    from nkat.lm.load import load_model

    path = write_tiny_model(
        tmp_path / "m.gguf", "llama", blocks=1, embedding=32, heads=1, kv_heads=1, head_dim=4096, feed_forward=32
    )
    decoder = make_decoder(load_model(path, repack=True).model, 4)
    assert "compiled" in decoder.name
    assert decoder.step(1).isfinite().all()
    path = write_tiny_model(
        tmp_path / "n.gguf", "llama", blocks=1, embedding=1, heads=1, kv_heads=1, head_dim=8192, feed_forward=1
    )
    with pytest.raises(ConfigError, match="more than 4096"):
        load_model(path)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("repack", [False, True])
def test_ones_behind_a_shape_mean_nothing(tmp_path, arch, repack):
    """Norms of shape [n, 1] and weights of shape [n, m, 1, 1]: the logits are those of the plain file."""
    import gguf
    import torch

    from nkat.engine.decoder import make_decoder
    from nkat.lm.load import load_model

    plain = write_tiny_model(tmp_path / "plain.gguf", arch)
    reader = gguf.GGUFReader(plain)
    raw = bytearray(plain.read_bytes())
    infos, header = [], bytearray()
    for tensor_ in reader.tensors:
        name = tensor_.name.encode()
        dims = [*tensor_.shape.tolist(), 1, 1][: 4 if len(tensor_.shape) == 2 else 2]
        header += len(name).to_bytes(8, "little") + name + len(dims).to_bytes(4, "little")
        header += b"".join(int(d).to_bytes(8, "little") for d in dims) + int(tensor_.tensor_type).to_bytes(4, "little")
        header += (tensor_.data_offset - reader.data_offset).to_bytes(8, "little")
        infos.append(tensor_)
    with GGUFFile.open(plain) as file:
        start = file.metadata_span[1]
        data = raw[file.data_start :]
    changed = raw[:start] + header
    changed += bytes(-len(changed) % 32) + data
    other = tmp_path / "ones.gguf"
    other.write_bytes(changed)
    assert GGUFFile.open(other).tensors["output_norm.weight"].shape == (1, 64)
    logits = [make_decoder(load_model(path, repack=repack).model, 8).prefill([1, 5, 9]) for path in (plain, other)]
    assert torch.equal(*logits)
    with pytest.raises(ConfigError, match="output_norm"):  # the control: twos mean something
        metadata, tensors = read_tiny(tmp_path, arch)
        tensors["output_norm.weight"] = tensor("output_norm.weight", 2, 32)
        ModelConfig.from_gguf(metadata, tensors)


def test_scales_of_the_stream_go_into_embedding_and_epsilon(tmp_path):
    """RMS norms do not see how long their input is, but for the epsilon."""
    scales = {"embedding_scale": 12.0, "residual_scale": 0.25, "attention.scale": 0.0625, "logit_scale": 8.0}
    config = config_of(tmp_path, "granite", scales)
    assert (config.embedding_scale, config.attention_scale, config.logit_scale) == (48.0, 0.0625, 8.0)
    assert config.rms_epsilon == pytest.approx(16e-5)
    plain = config_of(tmp_path, "granite", dict.fromkeys(scales, 0.0))
    assert (plain.embedding_scale, plain.attention_scale, plain.logit_scale) == (1.0, 0.25, 1.0)
    assert plain.rms_epsilon == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("arch", "key", "value"),
    [
        *(("llama", key, 0.5) for key in ("embedding_scale", "residual_scale", "attention.scale", "logit_scale")),
        ("llama", "rope.scaling.yarn_beta_fast", 16.0),
        ("llama", "attention.shared_kv_layers", 1),
        ("llama", "embedding_length_per_layer_input", 4),
        ("llama", "rope.dimension_sections", np.array([8, 12, 12, 0])),
        ("qwen3", "final_logit_softcapping", 30.0),
        ("qwen3", "attention.temperature_scale", 0.1),
        ("qwen3", "attention.clamp_kqv", 1.0),
        ("gemma3", "attn_logit_softcapping", 50.0),
    ],
)
def test_what_means_something_elsewhere_only_is_not_used(tmp_path, arch, key, value):
    """llama.cpp does not read it in such a model, whose perplexity there stays the same."""
    expected = config_of(tmp_path, arch, sliding_window=8)
    with pytest.warns(
        UserWarning, match=rf"metadata {arch}\.{key} = .* means nothing in {arch} models, and is not used"
    ):
        assert config_of(tmp_path, arch, {key: value}, sliding_window=8) == expected


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 99),
        ("attention.key_length_swa", 4),
        ("attention.value_length_swa", 4),
        ("rope.dimension_count_swa", 4),
        ("rope.scaling.original_context_length", 0),
    ],
)
def test_what_is_not_used_is_not_checked(tmp_path, key, value):
    assert config_of(tmp_path, "llama", {key: value}) == config_of(tmp_path, "llama")


@pytest.mark.parametrize(("arch", "name"), [("qwen3", "cls.output.weight"), ("gemma3", "dense_2.weight")])
def test_tensors_that_have_no_part_in_the_logits_are_left_alone(tmp_path, arch, name):
    metadata, tensors = read_tiny(tmp_path, arch)
    assert ModelConfig.from_gguf(metadata, {**tensors, name: tensor(name, 3, 64)}) == config_of(tmp_path, arch)
    with pytest.raises(ConfigError, match="is unknown in a llama model"):
        metadata, tensors = read_tiny(tmp_path, "llama")
        ModelConfig.from_gguf(metadata, {**tensors, name: tensor(name, 3, 64)})


def test_blocks_without_rope(tmp_path):
    config = config_of(tmp_path, "smollm3")
    assert [config.turning(i) is Turning.NONE for i in range(5)] == [False, False, False, True, False]
    granite = config_of(tmp_path, "granite", {"rope.scaling.finetuned": False})
    assert granite.unturned_blocks == {0, 1, 2}
    assert config_of(tmp_path, "granite", {"rope.scaling.finetuned": True}).unturned_blocks == set()
    assert config_of(tmp_path, "llama", {"rope.scaling.finetuned": False}).unturned_blocks == set()


def test_a_mixtral_is_a_llama_whose_experts_are_as_long_as_the_whole(tmp_path):
    """`expert_feed_forward_length`, which llama.cpp does not read there, means nothing."""
    for extra in ({}, {"expert_feed_forward_length": 24}):
        config = config_of(tmp_path, "llama", extra, **MIXTRAL)
        assert (config.mixture, config.active_experts) == (Mixture(6, 2, 48), 1 / 3)
        assert list(config.linears(0)) == [*QKV, "attn_output"]
        assert not config.has_gpu_step
    plain = config_of(tmp_path, "llama", {"expert_count": 0, "expert_used_count": 0})
    assert plain.mixture is None
    assert plain.has_gpu_step


def test_experts_in_tensors_of_their_own_are_named(tmp_path):
    metadata, tensors = read_tiny(tmp_path, "llama", **MIXTRAL)
    for i, stack in itertools.product(range(3), STACKS):
        count, *shape = tensors.pop(f"blk.{i}.{stack}.weight").shape
        names = [f"blk.{i}.{stack.removesuffix('_exps')}.{expert}.weight" for expert in range(count)]
        tensors |= {name: tensor(name, *shape) for name in names}
    with pytest.raises(ConfigError, match=r"blk\.0\.ffn_gate\.0\.weight: each expert is a tensor of its own.*convert"):
        ModelConfig.from_gguf(metadata, tensors)


def test_experts_beside_a_feed_forward_network(tmp_path):
    for fused in (False, True):
        options = dict(MIXTURE_FAMILIES)["gemma4"] | {"fused_experts": fused}
        config = config_of(tmp_path, "gemma4", **options)
        assert config.mixture == Mixture(6, 2, 48, fused, beside=True)
        assert {"ffn_gate", "ffn_up", "ffn_down"} <= config.linears(0).keys()
        assert {"post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2"} <= config.norms(0).keys()
        metadata, tensors = read_tiny(tmp_path, "gemma4", **options)
        del tensors["blk.1.ffn_gate_inp.scale"]
        with pytest.raises(ConfigError, match=r"tensor blk\.1\.ffn_gate_inp\.scale is missing"):
            ModelConfig.from_gguf(metadata, tensors)


def test_blocks_that_foretell_later_tokens_are_left_out(tmp_path):
    config = config_of(tmp_path, "glm4", draft=1)
    assert (config.block_count, config.draft_blocks) == (3, range(3, 4))
    assert replace(config, draft_blocks=range(0)) == replace(config_of(tmp_path, "glm4"), draft_blocks=range(0))
    # arrays have a value for each of them, too
    pattern = np.array([True, False, True, True])
    config = config_of(tmp_path, "gemma3", {"attention.sliding_window_pattern": pattern}, draft=1, sliding_window=8)
    assert config.local_blocks == (True, False, True)
    with pytest.raises(ConfigError, match="has 3 values for 4 blocks"):
        extra = {"attention.sliding_window_pattern": pattern[:3]}
        config_of(tmp_path, "gemma3", extra, draft=1, sliding_window=8)
    with pytest.raises(ConfigError, match=r"nextn_predict_layers must be at most 2, got 3"):
        config_of(tmp_path, "glm4", {"nextn_predict_layers": 3})
    with pytest.raises(ConfigError, match=r"blk\.3\.nextn\.eh_proj\.weight is unknown"):
        config_of(tmp_path, "glm4", {"nextn_predict_layers": None, "block_count": 3}, draft=1)


def test_the_shared_expert_is_a_feed_forward_network_of_its_own_length(tmp_path):
    config = config_of(tmp_path, "granitemoe")
    assert config.mixture == Mixture(6, 2, 48, shared_length=40)
    assert config.linears(0)["ffn_gate_shexp"] == (40, 64)
    assert config.linears(0)["ffn_down_shexp"] == (64, 40)
    without = config_of(tmp_path, "granitemoe", shared_length=0)
    assert without.mixture == Mixture(6, 2, 48)
    with pytest.raises(ConfigError, match=r"tensor blk\.0\.ffn_gate_shexp\.weight is unknown"):
        config_of(tmp_path, "granitemoe", {"expert_shared_feed_forward_length": 0})
