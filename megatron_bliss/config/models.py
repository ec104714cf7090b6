"""Architectures and what belongs to one model: the sections ``target``, ``proxy`` and ``score``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from megatron_bliss.config.bounds import bounded
from megatron_bliss.config.platform import Precision
from megatron_bliss.config.training import OptimizerConfig

Family = Literal["gpt_neox", "llama"]
Activation = Literal["sigmoid", "identity"]
ScoreStart = Literal["proxy", "fresh", "importance", "counts"]


@dataclass(frozen=True)
class ModelConfig:
    """An architecture: a preset by name, any field of which can be overridden, or a custom one from sizes."""

    preset: Optional[str] = None
    """Name of a published size (see megatron_bliss/models/presets.py), such as pythia-31m; none: give the sizes."""
    architecture: Optional[Family] = None
    """Block family: gpt_neox (parallel residual, LayerNorm, GELU) or llama (RMSNorm, SwiGLU, grouped queries)."""
    num_layers: Optional[int] = bounded(None, minimum=1)
    """Transformer blocks."""
    hidden_size: Optional[int] = bounded(None, minimum=1)
    """Width of the residual stream."""
    ffn_hidden_size: Optional[int] = bounded(None, minimum=1)
    """Width inside the feed-forward part (default 4 x hidden_size for gpt_neox, 8/3 of it for llama)."""
    num_attention_heads: Optional[int] = bounded(None, minimum=1)
    """Query heads."""
    num_query_groups: Optional[int] = bounded(None, minimum=1)
    """Key-value heads (default: as many as query heads)."""
    rotary_percent: Optional[float] = bounded(None, minimum=0, maximum=1)
    """Share of each head that is rotated (default 0.25 for gpt_neox, 1 for llama)."""
    rotary_base: Optional[float] = bounded(None, above=0)
    """Base of the rotary frequencies (default 10000)."""
    norm_epsilon: Optional[float] = bounded(None, above=0)
    """Epsilon of LayerNorm or RMSNorm (default 1e-5)."""
    untie_embeddings_and_output_weights: Optional[bool] = None
    """Separate input embedding and output matrix (default: yes)."""


@dataclass(frozen=True)
class TargetConfig(ModelConfig):
    """The LLM that is being pre-trained: a megatron-core GPTModel under tensor and pipeline parallelism."""

    tensor_model_parallel_size: int = bounded(1, minimum=1)
    """Ranks that share one layer's matrices."""
    pipeline_model_parallel_size: int = bounded(1, minimum=1)
    """Ranks that share the layers."""
    virtual_pipeline_model_parallel_size: int = bounded(1, minimum=1)
    """Model chunks per pipeline rank; more than 1 interleaves them (smaller bubbles, more communication)."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence inside a tensor-parallel group."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations to recompute in the backward pass: none, the parts in recompute_modules, or whole layers."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full: keep one input per recompute_num_layers layers, or recompute only that many layers of each chunk."""
    recompute_num_layers: int = bounded(1, minimum=1)
    """With full: layers recomputed together (uniform), or layers recomputed at all, per model chunk (block)."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """With selective: core_attn and/or mlp."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Norms and attention: Transformer Engine's, or this package's; auto takes the former on CUDA if installed."""
    make_vocab_size_divisible_by: int = bounded(128, minimum=1)
    """The vocabulary is padded to a multiple of this; the tensor-parallel size must divide it."""
    init_method_std: float = bounded(0.02, above=0)
    """Standard deviation of initial weights."""
    pretrained_checkpoint: Optional[str] = None
    """Weights that the warm-up begins from instead of random ones: a Hugging Face folder (GPT-NeoX or LLaMA,
    safetensors) or a target checkpoint. Gives the sizes, too, where no preset and no size is set."""


@dataclass(frozen=True)
class ProxyConfig(ModelConfig):
    """The small LM on which the lower level is solved."""

    warmup_iters: int = bounded(1000, minimum=0)
    """Plain next-token training steps on the warm-up shard before the first round."""
    warmup_batch_size: int = bounded(32, minimum=1)
    """Samples per warm-up step, over all ranks."""
    warmup_micro_batch_size: int = bounded(0, minimum=0)
    """Samples of a rank that a warm-up step works on at once (0: all of them)."""
    warmup_params_dtype: Precision = "fp32"
    """Precision of the warm-up's passes; weights, sums and optimiser states stay fp32."""
    warmup_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser of the proxy's warm-up."""
    restart_each_round: bool = True
    """Every round starts from the warmed-up proxy (the paper's choice); false: from the last round's proxy."""
    init_method_std: float = bounded(0.02, above=0)
    """Standard deviation of initial weights."""
    pretrained_checkpoint: Optional[str] = None
    """Hugging Face folder (GPT-NeoX or LLaMA, safetensors) whose weights the proxy's warm-up begins from instead of
    random ones. Gives the sizes, too, where no preset and no size is set."""


@dataclass(frozen=True)
class ScoreConfig:
    """The score model (eq. 1). An option that names families is for these alone: others refuse it."""

    family: str = "transformer"
    """What f in s_i = a(f(theta_s; xi_i)) is."""
    activation: Activation = "sigmoid"
    """a in s_i = a(f(theta_s; xi_i))."""
    init_from: ScoreStart = "proxy"
    """What the first round starts from. proxy, fresh (transformer, both): the trunk is the warmed-up proxy's, or newly
    initialised; a table of n-grams is 0. importance, counts: the trunk is the proxy's, and a table says what counts
    alone can: the guide's n-grams against the shard's, or against those of the best selection. transformer has no
    table: it is trained to give the scores of one."""
    carry_over: bool = True
    """Each round goes on with the last round's score model; false: start anew each round."""
    head_init_std: float = bounded(0.0, minimum=0)
    """transformer, both: standard deviation of the linear unit's initial weights; 0 starts from equal scores."""
    ngram_max: int = bounded(2, minimum=1, maximum=3)
    """Longest n-gram of tokens that counts; all shorter ones do, too. transformer: where counts are its start."""
    ngram_buckets: int = bounded(2**19, minimum=1, maximum=2**30)
    """Rows of the table that n-grams are hashed into; a power of 2 is fastest. transformer: as ngram_max."""
    ngram_scale: float = bounded(32.0, above=0)
    """ngram, both: f = this x mean of the unit's entries. 32 suits a bilevel.score_optimizer with lr 1e-2 and
    weight_decay 0; at a lower rate (both: a trunk's, such as 1e-3) a larger scale learns as fast."""
    start_deviation: float = bounded(1.0, above=0)
    """With init_from importance or counts: standard deviation of the raw scores at the start."""
    count_smoothing: float = bounded(0.01, minimum=0, below=1)
    """With init_from importance or counts: share of the shard's own n-grams in what the guide is taken to be: n-grams
    that the guide lacks weigh less."""
    count_prior: float = bounded(0.05, above=0, below=1)
    """With init_from counts: share of the shard's own n-grams in what a selection is taken to teach."""
    distil_iters: int = bounded(1000, minimum=1)
    """transformer: with init_from importance or counts: steps that train it to give the scores of the table.
    A few hundred reach most of it; counts, whose scores have more of rare n-grams in them, gain from more."""
    distil_batch_size: int = bounded(32, minimum=1)
    """transformer: units per such step, over all ranks."""
    distil_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-3, lr_decay_style="cosine", lr_warmup_iters=50)
    )
    """transformer: optimiser of these steps."""
