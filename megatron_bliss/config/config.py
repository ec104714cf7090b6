"""Every option of a run: frozen dataclasses, one section per part, filled from YAML and the command line.

The text under a field is its ``--help``. Field names follow Megatron-LM where it has the option. A module of the
package receives its own section, never the whole :class:`Config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

from megatron_bliss.config.bounds import bounded


@dataclass(frozen=True)
class PlatformConfig:
    """Where and in which precision a run computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA with NCCL when there is a GPU, else the CPU with gloo."""
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the target's forward and backward pass; master weights and gradients stay fp32."""
    distributed_timeout_minutes: float = 30.0
    """A collective that waits longer than this ends the run with an error on every rank."""
    deterministic: bool = True
    """Ask torch for deterministic kernels, so that two runs agree bit for bit."""


@dataclass(frozen=True)
class DataConfig:
    """The corpus to choose from and the sets to measure on."""

    train_prefix: str = ""
    """Corpus to choose from: path without .bin/.idx, made by tools/preprocess_data.py."""
    validation_prefix: str = ""
    """The guide, validation set of the upper level: path without .bin/.idx, made by tools/prepare_validation.py."""
    test_prefixes: list[str] = field(default_factory=list)
    """Held-out sets on which every arm is measured; the first gives summary.json its validation_loss."""
    split: str = "1,0,0"
    """Shares of the corpus in index order, as Megatron's --split: what is chosen from, the guide where
    validation_prefix is empty, the held-out set where test_prefixes is empty; such as 949,50,1."""
    blend_prefixes: list[str] = field(default_factory=list)
    """Other corpora that the target trains on beside the warm-up's shard and every selection."""
    blend_weights: list[float] = field(default_factory=list)
    """Share of the target's sequences from each of blend_prefixes; the selection has the rest."""
    seq_length: int = 1024
    """Tokens per sample of the target; longer units are cut for the proxy and the score model."""
    shard_by: Literal["random", "range", "file"] = "random"
    """How units are dealt to the disjoint shards of warm-up and rounds: at random (seeded), in index order, or by
    source file, all units of a file together (needs the corpus's provenance)."""
    num_workers: int = 0
    """Loader processes per rank for the target's data (0: in the training process)."""


@dataclass(frozen=True)
class ModelConfig:
    """An architecture: a preset by name, any field of which can be overridden, or a custom one from sizes."""

    preset: Optional[str] = None
    """Name of a published size (see megatron_bliss/models/presets.py), such as pythia-31m; none: give the sizes."""
    architecture: Optional[Literal["gpt_neox", "llama"]] = None
    """Block family: gpt_neox (parallel residual, LayerNorm, GELU) or llama (RMSNorm, SwiGLU, grouped queries)."""
    num_layers: Optional[int] = None
    """Transformer blocks."""
    hidden_size: Optional[int] = None
    """Width of the residual stream."""
    ffn_hidden_size: Optional[int] = None
    """Width inside the feed-forward part (default 4 x hidden_size for gpt_neox, 8/3 of it for llama)."""
    num_attention_heads: Optional[int] = None
    """Query heads."""
    num_query_groups: Optional[int] = None
    """Key-value heads (default: as many as query heads)."""
    rotary_percent: Optional[float] = None
    """Share of each head that is rotated (default 0.25 for gpt_neox, 1 for llama)."""
    rotary_base: Optional[float] = None
    """Base of the rotary frequencies (default 10000)."""
    norm_epsilon: Optional[float] = None
    """Epsilon of LayerNorm or RMSNorm (default 1e-5)."""
    untie_embeddings_and_output_weights: Optional[bool] = None
    """Separate input embedding and output matrix (default: yes)."""


@dataclass(frozen=True)
class TargetConfig(ModelConfig):
    """The LLM that is being pre-trained: a megatron-core GPTModel under tensor and pipeline parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share one layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers."""
    virtual_pipeline_model_parallel_size: int = 1
    """Model chunks per pipeline rank; more than 1 interleaves them (smaller bubbles, more communication)."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence inside a tensor-parallel group."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations to recompute in the backward pass: none, the parts in recompute_modules, or whole layers."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full: keep one input per recompute_num_layers layers, or recompute only that many layers of each chunk."""
    recompute_num_layers: int = 1
    """With full: layers recomputed together (uniform), or layers recomputed at all, per model chunk (block)."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """With selective: core_attn and/or mlp."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Norms and attention: Transformer Engine's, or this package's; auto takes the former on CUDA if installed."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this; the tensor-parallel size must divide it."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights."""
    pretrained_checkpoint: Optional[str] = None
    """Weights that the warm-up begins from instead of random ones: a Hugging Face folder (GPT-NeoX or LLaMA,
    safetensors) or a target checkpoint. Gives the sizes, too, where no preset and no size is set."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with gradient clipping."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "constant"
    """What happens to the learning rate after warm-up; WSD is constant until the last lr_wsd_decay_iters."""
    lr_wsd_decay_iters: int = 0
    """With WSD: iterations at the end over which the learning rate falls to min_lr."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    """With WSD: how it falls; minus_sqrt is 1 - sqrt(share of the decay that is done)."""
    lr_warmup_iters: int = 0
    """Iterations over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay (not on norms and biases)."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm (0: no clipping)."""


@dataclass(frozen=True)
class ProxyConfig(ModelConfig):
    """The small LM on which the lower level is solved."""

    warmup_iters: int = 1000
    """Plain next-token training steps on the warm-up shard before the first round."""
    warmup_batch_size: int = 32
    """Samples per warm-up step, over all ranks."""
    warmup_micro_batch_size: int = 0
    """Samples of a rank that a warm-up step works on at once (0: all of them)."""
    warmup_params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the warm-up's passes; weights, sums and optimiser states stay fp32."""
    warmup_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser of the proxy's warm-up."""
    restart_each_round: bool = True
    """Every round starts from the warmed-up proxy (the paper's choice); false: from the last round's proxy."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights."""
    pretrained_checkpoint: Optional[str] = None
    """Hugging Face folder (GPT-NeoX or LLaMA, safetensors) whose weights the proxy's warm-up begins from instead of
    random ones. Gives the sizes, too, where no preset and no size is set."""


@dataclass(frozen=True)
class ScoreConfig:
    """The score model: the proxy's trunk, a masked mean over tokens and one linear unit (eq. 1)."""

    activation: Literal["sigmoid", "identity"] = "sigmoid"
    """a in s_i = a(f(theta_s; xi_i))."""
    init_from: Literal["proxy", "fresh"] = "proxy"
    """Trunk at the first round: the warmed-up proxy's, or newly initialised."""
    carry_over: bool = True
    """Each round goes on with the last round's score model; false: start anew each round."""
    head_init_std: float = 0.0
    """Standard deviation of the linear unit's initial weights; 0 starts from equal scores."""


@dataclass(frozen=True)
class BilevelConfig:
    """The bilevel stage: equations (1) to (7) of BLISS (arXiv 2510.06048)."""

    upper_iters: int = bounded(3000, minimum=1)
    """Upper-level steps a round."""
    lower_iters: int = 1
    """T, lower-level steps of the proxy per upper-level step."""
    global_batch_size: int = 32
    """|B|, samples per step over all ranks: the softmax of eq. (2) runs over all of them."""
    micro_batch_size: int = 0
    """Samples that are on a device at once inside a step (0: all that the rank owns)."""
    offload_target: bool = False
    """Keep the frozen target in the host's memory between its forward passes, when it is too large beside the proxy."""
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of passes over proxy and score model; their weights, sums and optimiser states stay fp32."""
    compile: bool = False
    """Fuse the element-wise work of the second-order passes with torch.compile: half a minute at the start (and a C++
    compiler on a CPU), then faster steps."""
    memory_limit_gib: float = 0.0
    """Instead of micro_batch_size: the largest split whose step is estimated to stay under this, parameters, optimiser
    states and z not counted (0: no limit)."""
    validation_batch_size: int = 32
    """Validation samples per upper-level step over all ranks (eq. 4)."""
    kl_weight: float = 0.01
    """gamma, weight of the KL term that ties the proxy to the frozen target (0: no target forward at all)."""
    kl_direction: Literal["proxy_to_target", "target_to_proxy"] = "proxy_to_target"
    """KL(proxy || target) as the paper writes it, or KL(target || proxy) as its released code computes it."""
    kl_warning_threshold: float = 0.2
    """A mean KL that stays above this is warned of: the proxy no longer speaks for the target."""
    l2_weight: float = 1e-7
    """lambda, weight of ||theta_p||^2 in the lower level."""
    solver: Literal["sgd", "conjugate_gradient", "neumann", "identity"] = "sgd"
    """How eq. (5) is solved: sgd takes one warm-started step a batch; identity takes z = grad Phi (an ablation)."""
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    """C in eq. (5): the positive semi-definite Gauss-Newton matrix, or the Hessian (the paper)."""
    damping: float = 0.05
    """delta in (C + delta I) z = grad Phi."""
    solver_steps: int = 1
    """Products per upper-level step."""
    solver_max_step_size: float = 1.0
    """Largest step eta of the sgd solver, which takes min(this, 0.5 / (largest eigenvalue seen + delta))."""
    proxy_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, lr_decay_style="cosine"))
    """Optimiser of the lower level."""
    score_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, lr_decay_style="cosine"))
    """Optimiser of the upper level."""


@dataclass(frozen=True)
class ScoringConfig:
    """One forward pass of the score model over a shard."""

    micro_batch_size: int = 64
    """Units per forward pass and rank."""
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the score model's trunk; the mean over tokens and the linear unit stay fp32."""


@dataclass(frozen=True)
class SelectionConfig:
    """Which units of a scored shard the target trains on."""

    policy: str = "top_fraction"
    """Which units are kept."""
    epoch_warning: float = 4.0
    """Warn when the target will see the tokens of a selection more often than this in one round."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the policies (selection/policies/), those not chosen among them: selection.fraction and others."""


@dataclass(frozen=True)
class PretrainingConfig:
    """The target's training: one warm-up segment and one segment per round."""

    warmup_iters: int = 10000
    """Iterations on the random warm-up shard, shared by all arms."""
    train_iters: int = 10000
    """Iterations a round on the selection."""
    micro_batch_size: int = 8
    """Samples of one forward pass of one model replica."""
    global_batch_size: int = 512
    """Samples per iteration over all replicas."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr_warmup_iters=2000))
    """Optimiser and learning-rate schedule over all segments together."""
    use_distributed_optimizer: bool = True
    """Shard optimiser states over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights from data-parallel ranks while the next forward pass goes on (needs both above)."""
    decay_branch_iters: int = 0
    """After every segment, train a copy this much longer while its learning rate falls to optimizer.min_lr, to be
    evaluated in the main line's place (0: none; the paper: 200)."""
    decay_branch_style: Literal["linear", "minus_sqrt"] = "linear"
    """How the decay branch's learning rate falls."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: end the run, or leave the iteration's update out and go on."""
    max_consecutive_skips: int = 10
    """A run that leaves out more updates than this in a row is stopped."""
    loss_spike_factor: float = 0.0
    """A loss above this many times the median of recent ones is a spike (0: none is)."""
    loss_spike_window: int = 100
    """Iterations whose losses count as recent; before a segment has so many, nothing is a spike."""
    on_loss_spike: Literal["warn", "skip", "stop"] = "warn"
    """At a loss spike: say so, leave the iteration's update out, or end the run."""
    eval_interval: int = 1000
    """Iterations between evaluations on data.test_prefixes."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss of the target on data.test_prefixes, and its zero-shot results on tasks."""

    micro_batch_size: int = 16
    """Samples of one forward pass over a test set."""
    max_samples: int = 0
    """Samples used per test set (0: all)."""
    tasks: list[str] = field(default_factory=list)
    """Tasks on which the target is evaluated after its warm-up and each round: lm-eval's sciq, arc_easy, arc_challenge,
    logiqa, openbookqa, boolq, hellaswag, piqa, winogrande, lambada_openai, or your own by the names of their files."""
    data_dir: str = ""
    """Folder of the tasks' data files, made by tools/prepare_evaluation.py."""
    tokenizer_model: Optional[str] = None
    """Tokenizer file of the tasks (default: the one recorded in the corpus's manifest, where it still lies there)."""
    limit: int = 0
    """Items used per task, the first ones (0: all)."""
    batch_tokens: int = 16384
    """Tokens of one forward pass of one model replica over tasks, padding included."""
    allow_unknown_data: bool = False
    """Take copies of lm-eval's ten sets that are neither the known ones nor recorded in data_dir's checksums.json."""


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a stage saves its state."""

    save_interval: int = 500
    """Steps between checkpoints inside a stage; a killed run goes on from the last one."""
    keep: int = 2
    """Newest checkpoints of the target that stay in a stage's folder."""
    async_save: bool = False
    """Write the target's checkpoints while training goes on, from a copy in host memory (weights, 8 to 12 bytes per
    parameter of optimizer state, shared by the ranks)."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is written and shown while a run goes on."""

    log_interval: int = 10
    """Steps between lines in metrics.jsonl and TensorBoard."""
    progress: Literal["auto", "none"] = "auto"
    """Progress bars: auto draws them on a terminal and prints a line now and then elsewhere."""
    tensorboard: bool = True
    """Also write tensorboard/ in the run folder."""
    device_peak_tflops: float = 0.0
    """Peak of one device in params_dtype, for its utilisation (0: by name for known NVIDIA devices, else none)."""


@dataclass(frozen=True)
class Config:
    """Choose pre-training data by bilevel optimisation and pre-train a target on it."""

    run_folder: str = ""
    """Everything a run writes goes here; running the same command again continues an unfinished run."""
    seed: int = 1234
    """Seed of initial weights, data order and random selection."""
    arms: Union[list[str], str] = field(default_factory=lambda: ["bliss", "random"])
    """Ways to score units, each with a target of its own, as a list or with commas between."""
    rounds: int = 4
    """R, rounds of [bilevel, score, select, pretrain, evaluate] after the warm-up."""
    stage: Optional[Literal["warmup", "bilevel", "score", "select", "pretrain", "decay_branch", "evaluate"]] = None
    """Run this stage alone (its inputs must be finished)."""
    round: Optional[int] = None
    """With --stage: the round, counted from 1."""
    arm: Optional[str] = None
    """With --stage: the arm."""
    platform: PlatformConfig = field(default_factory=PlatformConfig)
    data: DataConfig = field(default_factory=DataConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    baselines: dict[str, Any] = field(default_factory=dict)
    """Options of arms: a section for each that has some."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        """``arms`` is a list from here on, however it was written."""
        if isinstance(self.arms, str):
            object.__setattr__(self, "arms", [name.strip() for name in self.arms.split(",") if name.strip()])
