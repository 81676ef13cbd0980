"""Path → a model ready to run. The only place where config, tokenizer, packed weights and Θ come together.

On CPU the weights are views of the memory-mapped file, so loading costs next to nothing and the pages are shared with
other processes; on CUDA they are copied there, still packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from nkat.gguf.file import GGUFFile, TensorInfo
from nkat.gguf.formats import SUPPORTED_TYPES, UnsupportedTypeError, dequantise, packed_tensor
from nkat.gguf.weights import scale_beside
from nkat.kernels.registry import say_fallbacks
from nkat.lm.architectures import LONG_ROPE, ROUTER, SHARED_GATE, SHORT_ROPE, SINKS, STACKS, Architecture
from nkat.lm.config import ModelConfig
from nkat.lm.delta_net import DeltaNet
from nkat.lm.experts import Experts, ExpertStack
from nkat.lm.keys import ConfigError
from nkat.lm.linear import StarLinear
from nkat.lm.tokenizer import Tokenizer
from nkat.lm.transformer import Block, Embedding, LayerInputs, Transformer
from nkat.lm.vocabulary import TokenizerError
from nkat.theta.algebra import Term
from nkat.theta.modelfile import ModelFile, open_model_file

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and what belongs to it.

    file: where it was loaded from; gguf: the open GGUF in it; tensors: the base model's, without Θ's
    gamma: the strength at which its Θ is on; None: it has none
    """

    model: Transformer
    tokenizer: Tokenizer
    config: ModelConfig
    file: ModelFile
    gguf: GGUFFile
    tensors: Mapping[str, TensorInfo]
    gamma: float | None


def load_model(
    source: str | Path | ModelFile | LoadedModel,
    *,
    thetas: Mapping[str, Term] | None = None,
    gamma: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    keep_dense: bool = False,
    int8_activations: bool = False,
    repack: bool = False,
) -> LoadedModel:
    """Loads a GGUF or `.nkat`, from a path or already opened. Raises NKATError for everything that is wrong with it.

    source: a LoadedModel gives another one over the same open file and vocabulary, in another precision or place
    thetas: Θ, or other low-rank terms, by weight name, in place of those in the file; `gamma` is required with them
    gamma: strength of Θ, 1 turns it off; None: the one recorded with the Θ in the file
    dtype: of multiplications and the KV cache; None: float32 on CPU, bfloat16 on CUDA
    keep_dense: keep the weights dequantised in `dtype` as well: several times the memory, faster decoding
    int8_activations: round the linear layers' inputs as llama.cpp does: faster, and to compare with its figures
    repack: copy the weights into the layout of the device's kernels, on which `nkat.engine.decoder` then runs; the
    file's pages are let go, so that memory stays about the file's size. On a GPU for 16-bit dtypes only. Tensors of a
    type that has no kernel stay as they are, and a note says so
    """
    known = source if isinstance(source, LoadedModel) else None
    source = source.file if isinstance(source, LoadedModel) else source
    model_file = source if isinstance(source, ModelFile) else open_model_file(source)
    base = model_file.require_base()
    if thetas is None and model_file.theta is not None:
        thetas = model_file.theta.layers
        gamma = model_file.theta.gamma if gamma is None else gamma
    if thetas is not None and gamma is None:
        raise ValueError("thetas given without gamma")
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    gguf, tensors = base.file, base.tensors
    config, tokenizer = _read(model_file) if known is None else (known.config, known.tokenizer)
    model = _Assembler(gguf, tensors, config.architecture, device, dtype, keep_dense).transformer(config)
    if thetas is not None:
        model.set_thetas(thetas)
        model.set_gamma(gamma)
    for layer in model.multipliers().values():
        layer.int8_activations = int8_activations
    if repack and (device.type == "cpu" or dtype in (torch.bfloat16, torch.float16)):
        _repack(model, gguf, tensors)
    return LoadedModel(model, tokenizer, config, model_file, gguf, tensors, gamma if thetas else None)


def read_config(model_file: ModelFile) -> ModelConfig:
    """What a model is, without its weights. Raises ConfigError for one that cannot be run."""
    base = model_file.require_base()
    try:
        return ModelConfig.from_gguf(base.file.metadata, base.tensors)
    except ConfigError as error:
        raise ConfigError(f"{model_file.path}: {error}") from None


def _read(model_file: ModelFile) -> tuple[ModelConfig, Tokenizer]:
    path, config = model_file.path, read_config(model_file)
    try:
        tokenizer = Tokenizer.from_metadata(model_file.require_base().file.metadata)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None
    if tokenizer.vocab_size != config.vocab_size:
        raise ConfigError(
            f"{path}: the vocabulary has {tokenizer.vocab_size} tokens but token_embd.weight {config.vocab_size} rows"
        )
    return config, tokenizer


def _repack(model: Transformer, gguf: GGUFFile, tensors: Mapping[str, TensorInfo]) -> None:
    tied = "output.weight" not in tensors
    layers = model.multipliers()
    if tied:
        layers["token_embd.weight"] = layers.pop("output.weight")
    say_fallbacks(model.device.type, model.packed_types())
    if model.device.type == "cuda":
        from nkat.kernels.cuda.linear import out_of_memory_hint  # Triton is loaded only where it is used

        with out_of_memory_hint():
            for linear in model.all_linears().values():  # routers and experts stay as they are
                linear.repack()
            model.embedding.repack(model.output.device_weight if tied else None)
        torch.cuda.empty_cache()  # what torch would keep of the memory that repacking took on the way
        return
    for name, layer in layers.items():
        layer.repack()
        if isinstance(layer, StarLinear) and layer.compiled is not None:
            gguf.release(name)


@dataclass(frozen=True, slots=True)
class _Assembler:
    gguf: GGUFFile
    tensors: Mapping[str, TensorInfo]
    architecture: Architecture
    device: torch.device
    dtype: torch.dtype
    keep_dense: bool

    def transformer(self, config: ModelConfig) -> Transformer:
        table = self.tensors["token_embd.weight"]
        packed_table = self.packed(table.name)
        tied = "output.weight" not in self.tensors
        shape = (config.vocab_size, config.embedding_length)
        return Transformer(
            config,
            Embedding(packed_table, table.type, shape),
            [self.block(config, i) for i in range(config.block_count)],
            self.vector("output_norm.weight") / config.logit_scale,
            self.linear("token_embd", shape, packed_table) if tied else self.linear("output", shape),
            self.rope_factors(SHORT_ROPE),
            self.rope_factors(LONG_ROPE),
            self.layer_inputs(config) if config.layer_input_length else None,
        )

    def layer_inputs(self, config: ModelConfig) -> LayerInputs:
        table = self.tensors["per_layer_token_embd.weight"]
        length = config.block_count * config.layer_input_length
        return LayerInputs(
            config,
            Embedding(self.packed(table.name), table.type, (config.vocab_size, length)),
            self.linear("per_layer_model_proj", (length, config.embedding_length)),
            self.vector("per_layer_proj_norm.weight"),
        )

    def rope_factors(self, name: str) -> torch.Tensor | None:
        """Those for short or for long contexts; a file has either these or the ones for contexts of any length."""
        there = [n for n in ("rope_freqs.weight", f"{name}.weight") if n in self.tensors]
        return self.vector(there[0]) if there else None

    def block(self, config: ModelConfig, index: int) -> Block:
        prefix = f"blk.{index}."
        in_file = config.architecture.norm_in_file
        norms = {norm: self.vector(f"{prefix}{in_file(norm)}.weight") for norm in config.norms(index)}
        if config.mixture is not None and config.mixture.beside:
            norms[ROUTER] = self.vector(f"{prefix}{ROUTER}.scale") * config.embedding_length**-0.5
        linears = {name: self.linear(prefix + name, shape) for name, shape in config.linears(index).items()}
        names = [f"{prefix}{name}.weight" for name in ("layer_output_scale", SINKS, SHARED_GATE)]
        scale, sinks, gate = (self.vector(name) if name in self.tensors else None for name in names)
        experts, delta_net = self.experts(config, prefix), self.delta_net(config, index)
        return Block(config, index, linears, norms, scale, sinks, experts, gate, delta_net)

    def delta_net(self, config: ModelConfig, index: int) -> DeltaNet | None:
        sizes = config.recurrence
        if sizes is None or index not in config.recurrent_blocks:
            return None
        vectors = {name: self.vector(f"blk.{index}.{name}").view(shape) for name, shape in sizes.vectors().items()}
        return DeltaNet(sizes, config.rms_epsilon, *vectors.values())

    def experts(self, config: ModelConfig, prefix: str) -> Experts | None:
        mixture, d = config.mixture, config.embedding_length
        if mixture is None:
            return None
        # which experts are chosen hangs on small differences: the router computes as the residual stream does
        router = self.linear(prefix + ROUTER, (mixture.count, d), dtype=self.stream)
        stacks = {name: self.stack(prefix + name, shape) for name, shape in mixture.stacks(d).items()}
        return Experts(config.architecture, mixture.used, router, stacks)

    def stack(self, stem: str, shape: tuple[int, int, int]) -> ExpertStack:
        info, name = self.tensors[stem + ".weight"], stem + ".bias"
        bias = self.vector(name).view(shape[:2]) if name in self.tensors else None
        scale = self.vector(stem + ".scale") if stem + ".scale" in self.tensors else None
        packed, outside = self.packed(info.name), stem.endswith(STACKS[-1])
        return ExpertStack(
            *(packed, info.type, shape),
            dtype=self.dtype,
            bias=bias,
            scale=scale,
            outside=outside,
            keep_dense=self.keep_dense,
        )

    def linear(
        self,
        stem: str,
        shape: tuple[int, int],
        packed: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> StarLinear:
        info = self.tensors[stem + ".weight"]
        bias = self.vector(stem + ".bias") if stem + ".bias" in self.tensors else None
        packed = self.packed(info.name) if packed is None else packed
        scaled = stem.rpartition(".")[2] in self.architecture.scaled and stem != "token_embd"
        scale = scale_beside(self.gguf, info.name) if scaled else 1.0
        return StarLinear(
            packed, info.type, shape, dtype=dtype or self.dtype, bias=bias, keep_dense=self.keep_dense, scale=scale
        )

    @property
    def stream(self) -> torch.dtype:
        """Of the residual stream."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def vector(self, name: str) -> torch.Tensor:
        """A norm's weight, a bias or RoPE factors: dequantised, in the residual stream's dtype."""
        info = self.tensors[name]
        return dequantise(self.packed(name), info.type, (prod(info.shape),)).to(self.stream, copy=True)

    def packed(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        if info.type not in SUPPORTED_TYPES:
            raise UnsupportedTypeError(
                f"{self.gguf.path}: tensor {name} has the type {info.type.name}, which is not supported"
            )
        return packed_tensor(self.gguf.raw(name)).to(self.device)
