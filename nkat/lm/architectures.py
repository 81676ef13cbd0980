"""What each supported architecture has: a row each. Whoever needs to know asks the row, nobody compares a name.

The meaning is llama.cpp's (https://github.com/ggml-org/llama.cpp): an architecture's graph, tensors and defaults are in
src/models/{name}.cpp, its kind of RoPE in `llama_model_rope_type` of src/llama-model.cpp. One that differs from those
here in these fields only is one more row; a further difference is a further field, whose default is what all others do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

QKV = ("attn_q", "attn_k", "attn_v")
FUSED_QKV = "attn_qkv"
GATE_UP = ("ffn_gate", "ffn_up")
SHORT_ROPE, LONG_ROPE = "rope_factors_short", "rope_factors_long"
FEED_FORWARD = (*GATE_UP, "ffn_down")
SHARED_EXPERT = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
LAYER_INPUT_LINEARS = ("inp_gate", "proj")
DELTA_LINEARS = (FUSED_QKV, "attn_gate", "ssm_out")  # of a recurrent block, which has no others but two small ones
SHARED_GATE = "ffn_gate_inp_shexp"
DENSE_LINEARS = (*QKV, FUSED_QKV, "attn_output", *FEED_FORWARD)
BLOCK_LINEARS = (*DENSE_LINEARS, *SHARED_EXPERT, *LAYER_INPUT_LINEARS)
STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")  # of a mixture of experts: [experts, outputs, inputs]
GATE_UP_STACK = "ffn_gate_up_exps"  # in place of the first two
ROUTER = "ffn_gate_inp"
SINKS = "attn_sinks"
BESIDE_NORMS = ("post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2")
QK_NORMS = ("attn_q_norm", "attn_k_norm")
PRE_NORMS = ("attn_norm", "ffn_norm")
POST_NORMS = ("post_attention_norm", "post_ffw_norm")


SCALED = (*QKV, FUSED_QKV, "attn_output", "output")


@dataclass(frozen=True, slots=True)
class Sizes:
    """One model's, as its metadata give them; lengths in elements."""

    block_count: int
    embedding_length: int
    head_count: int
    head_dim: int


def scale_by_head(sizes: Sizes) -> float:
    """1/√(elements of a head)."""
    return float(sizes.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class Window:
    """In some blocks a token sees only the last `attention.sliding_window` tokens; 0, or no such key: it sees all.

    period: the last of so many blocks sees everything, where the file has no `attention.sliding_window_pattern`;
    None: a file must have it
    rope_base: of the blocks with a window, where the file has no `rope.freq_base_swa`; their positions are not scaled.
    None: RoPE is the same in all blocks
    plain_rope: `rope.freq_base` in those blocks, too, and positions are not scaled even where those of others are
    length: where the file has no `attention.sliding_window`
    """

    period: int | None
    rope_base: float | None
    length: int = 0
    plain_rope: bool = False


@dataclass(frozen=True, slots=True)
class Routing:
    """Of models whose feed-forward network is a mixture of experts (`nkat.lm.experts`).

    optional: only where the file has `expert_count` is there one
    own_length: an expert's inner vector is as long as `expert_feed_forward_length` says, where the file has it; else as
    `feed_forward_length` says
    beside: a feed-forward network for all tokens is beside it, and both of them and the router have norms of their own
    (`nkat.lm.transformer.Block`); gate and up may be one weight (`GATE_UP_STACK`), and `ffn_down_exps.scale` may
    multiply each expert's outputs
    shared: one more expert is every token's, where the file has its inner length (`SHARED_LENGTH`)
    shared_gate: it always is, as long as `feed_forward_length` says where the file has no length of its own, and counts
    as much as a gate of its own says; gate and up of the others may be one weight here, too
    """

    optional: bool = False
    own_length: bool = True
    beside: bool = False
    shared: bool = False
    shared_gate: bool = False


@dataclass(frozen=True, slots=True)
class Recurrent:
    """Of models in which most blocks have a gated delta net in place of attention (`nkat.lm.delta_net`).

    grouped: the value heads of a key head are neighbours, and a token's strengths come of one weight (`ssm_ba`); else
    value head i belongs to key head i modulo their number, and there are two weights (`ssm_beta`, `ssm_alpha`)
    """

    grouped: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """How the models of one architecture differ from those of others.

    name: `general.architecture`, and the first part of its metadata's keys
    biases: linear layers that may have a bias: of BLOCK_LINEARS, ROUTER or STACKS in any block, or "output"; llama.cpp
    takes those of q, k and v wherever it finds them (`create_tensor_qkv`)
    interleaved_rope: RoPE turns the elements (2i, 2i+1) of a head ("norm"), else (i, i + dimensions/2) ("neox")
    permuted_qk: in Hugging Face's files q and k have their rows in another order (`nkat.lm.huggingface`)
    rope_factors: `rope_freqs.weight` may divide the frequencies, one factor a pair
    qk_norm: RMS norms of every head's q and k, before RoPE
    wide_qk_norm: RMS norms of q and of k, all heads together, before RoPE
    pre_norm: RMS norms of what attention and the feed-forward network read; else that is the residual stream as it is
    post_norm: RMS norms of what attention and the feed-forward network add to the residual stream
    gelu: feed-forward activation: tanh GELU, else SiLU
    scaled_embedding: a token's embedding is multiplied by √(its length)
    attention_scale: what q·k is multiplied by
    window: of blocks that do not see everything; None: every block does, whatever the file says
    fused_gate_up: the first half of ffn_up's outputs are the gate's, and there is no ffn_gate
    long_rope: other factors for short and for long contexts may divide the frequencies (`nkat.lm.rope.Rope`)
    attention_cap, logit_cap: what attention scores and logits are kept within (c·tanh(x/c)), where the file does not
    say otherwise; 0: not at all
    unturned_period: the last of so many blocks has no RoPE; 0: all have
    varied: heads' length, KV heads and feed-forward length may differ from block to block, and where there is no
    attn_v, the keys before norm and RoPE are the values
    value_norm: every head's v has an RMS norm, without a weight
    block_scale: what leaves a block may be multiplied by `layer_output_scale.weight`, one number
    experts: of models whose feed-forward network is a mixture of experts; None: there are none
    clamped_gate: feed-forward activation of gpt-oss (`nkat.lm.activation`)
    gated_attention: every head's outputs are multiplied by the logistic function of as many more outputs of attn_q,
    which follow those of its query
    recurrent: of models in which most blocks have no attention; None: all have
    sinks: each query head has a score of its own, `attn_sinks`, that takes part in the softmax and stands for nothing
    ffn_norm: what the file calls the norm before the feed-forward network
    reads: keys of the metadata that mean something in few architectures, this one among them
    refuses: such keys that llama.cpp reads here, too, but whose meaning is not computed
    scaled: weights, of BLOCK_LINEARS, STACKS or "output", beside which there may be a number that multiplies their
    products (`blk.0.attn_q.scale`); llama.cpp takes those of attention and of the output everywhere
    unread: tensors that its models may have and that have no part in the logits
    """

    name: str
    biases: tuple[str, ...] = QKV
    interleaved_rope: bool = False
    permuted_qk: bool = False
    rope_factors: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    gelu: bool = False
    scaled_embedding: bool = False
    attention_scale: Callable[[Sizes], float] = scale_by_head
    window: Window | None = None
    fused_gate_up: bool = False
    long_rope: bool = False
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    unturned_period: int = 0
    varied: bool = False
    value_norm: bool = False
    block_scale: bool = False
    experts: Routing | None = None
    clamped_gate: bool = False
    gated_attention: bool = False
    recurrent: Recurrent | None = None
    sinks: bool = False
    ffn_norm: str = "ffn_norm"
    reads: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    scaled: tuple[str, ...] = SCALED
    unread: tuple[str, ...] = ()

    def may_have_bias(self, linear: str) -> bool:
        """Whether a linear layer of a block may have one; fused ones go by their parts."""
        return linear in self.biases or (linear == FUSED_QKV and {*QKV} <= {*self.biases})

    def norm_in_file(self, norm: str) -> str:
        """What the file calls one of a block's norms."""
        return self.ffn_norm if norm == "ffn_norm" else norm

    @property
    def has_gpu_step(self) -> bool:
        """Whether `nkat.engine.plan` has operations for all that its models compute, those without experts."""
        mixtures_only = self.experts is not None and not self.experts.optional
        return not (self.varied or mixtures_only or self.sinks or self.gated_attention or self.recurrent)

    @property
    def block_norms(self) -> tuple[str, ...]:
        """The RMS norms of every block."""
        pre = PRE_NORMS if self.pre_norm else ()
        post = POST_NORMS if self.post_norm else ()
        return (*pre, *post, *(QK_NORMS if self.qk_norm or self.wide_qk_norm else ()))


def _gemma_scale(blocks_of_27b: int) -> Callable[[Sizes], float]:
    """The 27B model alone scales by embedding / heads, which is not its heads' length; llama.cpp, too, tells it by its
    blocks (src/models/gemma2.cpp and gemma3.cpp, after gemma_pytorch's query_pre_attn_scalar).
    """

    def scale(sizes: Sizes) -> float:
        if sizes.block_count == blocks_of_27b:
            return float((sizes.embedding_length // sizes.head_count) ** -0.5)
        return scale_by_head(sizes)

    return scale


ATTENTION_CAP, LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"
TEMPERATURE = "attention.temperature_scale"
SCALES = ("embedding_scale", "residual_scale", "attention.scale", "logit_scale")
ROPE_SWITCH = "rope.scaling.finetuned"
DEEPSTACK = "deepstack_mapping"
SHARED_LENGTH = "expert_shared_feed_forward_length"
ROPE_SECTIONS = "rope.dimension_sections"
LAYER_INPUTS, SHARED_KV = "embedding_length_per_layer_input", "attention.shared_kv_layers"
YARN_KEYS = ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier")

_ROWS = (
    # src/models/llama.cpp: every bias is optional (models converted from other families have some), and Llama 3.1 and
    # later bring RoPE factors; with `expert_count` it is a Mixtral
    Architecture(
        "llama",
        biases=DENSE_LINEARS,
        interleaved_rope=True,
        permuted_qk=True,
        rope_factors=True,
        long_rope=True,
        experts=Routing(optional=True, own_length=False),
        scaled=(*SCALED, *FEED_FORWARD, *STACKS),
    ),
    # src/models/qwen2.cpp
    Architecture("qwen2", biases=(*QKV, "output")),
    # src/models/qwen3.cpp
    Architecture("qwen3", qk_norm=True, scaled=(*SCALED, *FEED_FORWARD), unread=("cls.output.weight",)),
    # src/models/gemma3.cpp
    Architecture(
        "gemma3",
        qk_norm=True,
        post_norm=True,
        gelu=True,
        scaled_embedding=True,
        attention_scale=_gemma_scale(62),
        window=Window(period=6, rope_base=10000.0),
        reads=(LOGIT_CAP,),
        unread=("dense_2.weight", "dense_3.weight"),
    ),
    # src/models/gemma2.cpp
    Architecture(
        "gemma2",
        post_norm=True,
        gelu=True,
        scaled_embedding=True,
        attention_scale=_gemma_scale(46),
        window=Window(period=2, rope_base=None, length=4096),
        attention_cap=50.0,
        logit_cap=30.0,
        reads=(ATTENTION_CAP, LOGIT_CAP),
    ),
    # src/models/gemma4.cpp
    Architecture(
        "gemma4",
        rope_factors=True,
        qk_norm=True,
        post_norm=True,
        gelu=True,
        scaled_embedding=True,
        attention_scale=lambda sizes: 1.0,
        window=Window(period=None, rope_base=10000.0),
        logit_cap=30.0,
        varied=True,
        value_norm=True,
        block_scale=True,
        experts=Routing(optional=True, beside=True),
        reads=(LOGIT_CAP, LAYER_INPUTS, SHARED_KV),
        scaled=(*SCALED, *FEED_FORWARD, *STACKS),
    ),
    # src/models/phi3.cpp: also Phi-4; it does not look at the window that their files name
    Architecture("phi3", fused_gate_up=True, long_rope=True),
    # src/models/mistral3.cpp: Ministral 3, and Mistral Small where it was converted by that name
    Architecture(
        "mistral3",
        biases=DENSE_LINEARS,
        interleaved_rope=True,
        permuted_qk=True,
        rope_factors=True,
        long_rope=True,
        experts=Routing(optional=True, own_length=False),
        reads=(TEMPERATURE, *YARN_KEYS),
        scaled=(*SCALED, *FEED_FORWARD, *STACKS),
    ),
    # src/models/smollm3.cpp
    Architecture("smollm3", interleaved_rope=True, permuted_qk=True, unturned_period=4),
    # src/models/glm4.cpp: also GLM-Z1; RoPE turns a half of each head, and transformers turns the same pairs
    Architecture("glm4", interleaved_rope=True, post_norm=True, fused_gate_up=True, refuses=(ROPE_SECTIONS,)),
    # src/models/granite.cpp: Granite 3 and 4
    Architecture(
        "granite",
        biases=DENSE_LINEARS,
        interleaved_rope=True,
        permuted_qk=True,
        rope_factors=True,
        long_rope=True,
        experts=Routing(optional=True, own_length=False, shared=True),
        reads=(*SCALES, ROPE_SWITCH),
        refuses=(DEEPSTACK,),
    ),
    # src/models/granite-moe.cpp: Granite 3's mixtures; RoPE is never off
    Architecture(
        "granitemoe",
        biases=DENSE_LINEARS,
        interleaved_rope=True,
        permuted_qk=True,
        rope_factors=True,
        long_rope=True,
        experts=Routing(own_length=False, shared=True),
        reads=SCALES,
    ),
    # src/models/olmo2.cpp: also Olmo 3, whose windows come with YaRN
    Architecture(
        "olmo2",
        wide_qk_norm=True,
        pre_norm=False,
        post_norm=True,
        window=Window(period=4, rope_base=None, plain_rope=True),
    ),
    # src/models/qwen3moe.cpp
    Architecture("qwen3moe", qk_norm=True, experts=Routing(), scaled=(*SCALED, *STACKS)),
    # src/models/openai-moe.cpp
    Architecture(
        "gpt-oss",
        biases=(*QKV, "attn_output", ROUTER, *STACKS),
        window=Window(period=2, rope_base=None),
        experts=Routing(),
        clamped_gate=True,
        sinks=True,
        ffn_norm="post_attention_norm",
    ),
    # src/models/qwen35.cpp: dense Qwen 3.5 and 3.6
    Architecture(
        "qwen35",
        scaled=(*SCALED, *FEED_FORWARD, *DELTA_LINEARS),
        qk_norm=True,
        gated_attention=True,
        recurrent=Recurrent(),
        ffn_norm="post_attention_norm",
        reads=(ROPE_SECTIONS,),
    ),
    # src/models/qwen35moe.cpp
    Architecture(
        "qwen35moe",
        scaled=(*SCALED, *STACKS, *SHARED_EXPERT, *DELTA_LINEARS),
        qk_norm=True,
        experts=Routing(shared=True, shared_gate=True),
        gated_attention=True,
        recurrent=Recurrent(),
        ffn_norm="post_attention_norm",
        reads=(ROPE_SECTIONS,),
    ),
    # src/models/qwen3next.cpp
    Architecture(
        "qwen3next",
        qk_norm=True,
        experts=Routing(shared=True, shared_gate=True),
        gated_attention=True,
        recurrent=Recurrent(grouped=True),
        ffn_norm="post_attention_norm",
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = {row.name: row for row in _ROWS}
