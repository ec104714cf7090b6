"""What ``benchmark.py pretrain`` measures: one whole training step of one architecture, three ways.

ours           TargetTrainer, as a run has it: forward, backward, gradient norm, clip, AdamW
huggingface    transformers' model with scaled_dot_product_attention, torch's clip_grad_norm_ and fused AdamW; in bf16
               under autocast over fp32 weights, so that master weights are fp32 here, too
unfused        megatron-core's GPTModel with its own local layers (DotProductAttention, its cross-entropy) and its own
               optimizer step

The loss is the mean over all next tokens; the same tokens for all. transformers gets its labels ready shifted and its
logits go straight into torch's cross-entropy, which saves it the copies that its own ``labels=`` makes. megatron-core
has no parallel residual: unfused computes the same matrices in series.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_bliss.base.parallel import Groups
from megatron_bliss.base.platform import DTYPES
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.config.training import OptimizerConfig, PretrainingConfig
from megatron_bliss.models.huggingface import config_json
from megatron_bliss.models.presets import Architecture
from megatron_bliss.target.model import build_target, padded_vocab_size, transformer_config
from megatron_bliss.target.sequences import MicroBatch
from megatron_bliss.target.trainer import TargetTrainer

OPTIMIZER = OptimizerConfig(lr=1e-4)


@dataclass(frozen=True)
class Settings:
    """One model and batch."""

    arch: Architecture
    seq: int
    micro_batch: int
    micro_batches: int
    dtype: str

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.seq * self.micro_batch * self.micro_batches


def micro_batches(settings: Settings, device: torch.device) -> list[MicroBatch]:
    """Random tokens and the tokens after them."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(settings.micro_batches):
        text = torch.randint(
            settings.arch.vocab_size, (settings.micro_batch, settings.seq + 1), generator=generator
        ).to(device)
        mask = torch.ones(settings.micro_batch, settings.seq, device=device)
        found.append(MicroBatch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), mask))
    return found


def ours(settings: Settings, groups: Groups) -> Callable[[], float]:
    """Mean loss of a step of TargetTrainer."""
    config = TargetConfig()
    target = build_target(
        config, settings.arch, groups, seq_length=settings.seq, params_dtype=DTYPES[settings.dtype], seed=1
    )
    size = settings.micro_batch * settings.micro_batches
    training = PretrainingConfig(micro_batch_size=settings.micro_batch, global_batch_size=size, optimizer=OPTIMIZER)
    trainer = TargetTrainer(target, training, groups, seq_length=settings.seq, total_iterations=1000)
    batches = itertools.cycle(micro_batches(settings, groups.device))

    def step() -> float:
        return trainer.step(batches, accepts=lambda loss, grad_norm: True).loss

    return step


def huggingface(settings: Settings, groups: Groups) -> Callable[[], float]:
    """Mean loss of a step of the same architecture in transformers."""
    import transformers

    described = config_json(settings.arch, torch.float32, max(2048, settings.seq))
    family = transformers.GPTNeoXConfig if settings.arch.architecture == "gpt_neox" else transformers.LlamaConfig
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(family(**described), attn_implementation="sdpa")
    model = model.to(device=groups.device, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        _decay_groups(model),
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2),
        eps=OPTIMIZER.adam_eps,
        fused=True,
    )
    batches = micro_batches(settings, groups.device)
    autocast = partial(torch.autocast, groups.device.type, torch.bfloat16, enabled=settings.dtype == "bf16")

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=groups.device)
        for batch in batches:
            with autocast():
                logits = model(input_ids=batch.tokens, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten()) / len(batches)
            del logits
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        return total.item()

    return step


def _decay_groups(model: torch.nn.Module) -> list[dict]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    decay = {"weight_decay": OPTIMIZER.weight_decay}
    return [{"params": matrices, **decay}, {"params": others, "weight_decay": 0.0}]


class _Unfused(GPTModel):
    """megatron-core's model behind the target's ``forward(tokens, labels)``."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return super().forward(tokens, positions, self.causal_mask(tokens), labels=labels)

    @staticmethod
    def causal_mask(tokens: Tensor) -> Tensor:
        """True where attention may not look, [1, 1, s, s]."""
        length = tokens.shape[1]
        return torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)


def unfused(settings: Settings, groups: Groups) -> Callable[[], float]:
    """Mean loss of a step of megatron-core's local layers under its own data parallelism and optimizer."""
    arch, dtype = settings.arch, DTYPES[settings.dtype]
    config = transformer_config(TargetConfig(), arch, dtype)
    normal = partial(torch.nn.init.normal_, std=arch.init_method_std)
    config.init_method = config.output_layer_init_method = config.embedding_init_method = normal
    torch.manual_seed(1)
    model = _Unfused(
        config,
        get_gpt_layer_local_spec(normalization=config.normalization),
        padded_vocab_size(arch.vocab_size, 128),
        settings.seq,
        share_embeddings_and_output_weights=not arch.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=arch.rotary_percent,
        rotary_base=int(arch.rotary_base),
        pg_collection=groups.collection,
    ).to(groups.device)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(config, ddp, model, pg_collection=groups.collection)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        _megatron_optimizer(dtype), [wrapped], use_gloo_process_groups=False, pg_collection=groups.collection
    )
    for group in optimizer.param_groups:  # its scheduler would set it
        group["lr"] = OPTIMIZER.lr
    batches = itertools.cycle(micro_batches(settings, groups.device))
    schedule = get_forward_backward_func(1, None)

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses = schedule(
            forward_step_func=_summed_loss,
            data_iterator=batches,
            model=[wrapped],
            num_microbatches=settings.micro_batches,
            seq_length=settings.seq,
            micro_batch_size=settings.micro_batch,
            forward_only=False,
            pg_collection=groups.collection,
        )
        optimizer.step()
        return torch.stack(losses).sum().item() / settings.tokens

    return step


def _summed_loss(batches, chunk):
    batch = next(batches)

    def total(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), losses.detach().sum()

    return chunk(batch.tokens, batch.labels), total


def _megatron_optimizer(dtype: torch.dtype) -> MegatronOptimizerConfig:
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=OPTIMIZER.lr,
        weight_decay=OPTIMIZER.weight_decay,
        adam_beta1=OPTIMIZER.adam_beta1,
        adam_beta2=OPTIMIZER.adam_beta2,
        adam_eps=OPTIMIZER.adam_eps,
        clip_grad=OPTIMIZER.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )


CASES: dict[str, Callable[[Settings, Groups], Callable[[], float]]] = {
    "ours": ours,
    "huggingface": huggingface,
    "unfused": unfused,
}
"""Name -> function that builds everything and returns one step, which returns the mean loss per token."""
