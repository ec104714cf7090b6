"""Small bilevel trainers on random units, and what their steps leave behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_bliss.base import checkpoint
from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel.domain_weights import DomainWeights
from megatron_bliss.bilevel.head import Teacher
from megatron_bliss.bilevel.train import BilevelTrainer
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.models import ModelConfig, ScoreConfig
from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.data.batches import Batch, BatchSchedule, language_model_mask
from megatron_bliss.models.score import build_score_model
from megatron_bliss.models.transformer import build_lm

VOCABULARY, LENGTH = 37, 9
SIZES = ModelConfig(architecture="gpt_neox", num_layers=2, hidden_size=16, num_attention_heads=2)
# A key's bias has gradient 0 (softmax does not see it): what is there is rounding, which AdamW would blow up to steps
# of size lr if its epsilon were not well above it.
OPTIMIZER = OptimizerConfig(lr=3e-3, adam_eps=1e-3)
CONFIG = BilevelConfig(
    upper_iters=3,
    lower_iters=2,
    global_batch_size=8,
    validation_batch_size=6,
    kl_weight=0.3,
    l2_weight=1e-3,
    proxy_optimizer=OPTIMIZER,
    score_optimizer=OPTIMIZER,
)
SCORE = ScoreConfig(head_init_std=0.5)
EOD = 0
ALONE = World(None, 0, 1, torch.device("cpu"))


class RandomUnits:
    """Units of random tokens and lengths; ``labels`` of each row's last tokens only when ``last`` is set."""

    def __init__(self, count: int, seed: int, last: int | None = None) -> None:
        generator = np.random.default_rng(seed)
        self.tokens = torch.from_numpy(generator.integers(0, VOCABULARY, (count, LENGTH)))
        self.lengths = torch.from_numpy(generator.integers(4, LENGTH + 1, count))
        self.last, self.seq_length = last, LENGTH

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, ids: np.ndarray) -> Batch:
        ids = torch.from_numpy(ids)
        lengths = self.lengths[ids]
        width = int(lengths.max()) if len(ids) else 0
        mask, positions = language_model_mask(lengths, width), torch.arange(width)[None, :]
        if self.last is not None:
            mask &= positions >= (lengths - self.last)[:, None]
        return Batch(self.tokens[ids, :width] * (positions < lengths[:, None]), mask, lengths, ids)


def make_trainer(
    config: BilevelConfig,
    dtype: torch.dtype,
    world: World,
    *,
    target_teacher=None,
    vocab_size: int = VOCABULARY,
    trainer: type = BilevelTrainer,
    score: ScoreConfig = SCORE,
    domains: DomainWeights | None = None,
):
    """A trainer on random units; without a ``target_teacher``, a small frozen LM of another width is the teacher."""
    options = {"dtype": dtype, "device": world.device}
    proxy = build_lm(SIZES, vocab_size=vocab_size, seed=1, **options)
    score_model = build_score_model(score, proxy.architecture, seed=2, trunk_from=proxy, eod=EOD, **options)
    target = build_lm(dataclasses.replace(SIZES, hidden_size=24), vocab_size=vocab_size, seed=3, **options)

    def teacher(tokens: torch.Tensor) -> Teacher:
        with torch.no_grad():
            return Teacher(target.hidden_states(tokens), target.output_weight.detach())

    def schedule(source: RandomUnits, size: int) -> BatchSchedule:
        return BatchSchedule(source, size, seed=5, rank=world.rank, world_size=world.world_size)

    train = schedule(RandomUnits(40, 1), config.global_batch_size)
    validation = schedule(RandomUnits(20, 2, last=2), config.validation_batch_size)
    parts = proxy, score_model, target_teacher or teacher, train, validation, world
    return trainer(config, *parts, *([] if domains is None else [domains]))


def run_steps(
    config: BilevelConfig, dtype: torch.dtype, world: World, steps: int = 3, **options
) -> dict[str, np.ndarray]:
    """Everything that ``steps`` bilevel steps leave behind, as fp64 arrays; ``options``: of :func:`make_trainer`."""
    trainer = make_trainer(config, dtype, world, **options)
    metrics = [trainer.step() for _ in range(steps)]
    return {
        "proxy": flat(trainer.proxy),
        "score": flat(trainer.score_model),
        "z": trainer.z.double().numpy(),
        "metrics": np.array([[step[name] for name in sorted(step)] for step in metrics]),
    }


def assert_resumes(make: Callable[[], BilevelTrainer], path: Path) -> BilevelTrainer:
    """Two steps, a state on the disk and two more are four steps, bit for bit; returns the trainer of the four."""
    whole, first, second = make(), make(), make()
    last = [whole.step() for _ in range(4)][-1]
    first.step(), first.step()
    checkpoint.save_state(path, first.state_dict())
    second.load_state_dict(checkpoint.load_state(path))
    assert [second.step() for _ in range(2)][-1] == last
    assert np.array_equal(flat(whole.score_model), flat(second.score_model))
    return whole


def flat(model: torch.nn.Module) -> np.ndarray:
    """All weights in one fp64 array."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().double().numpy()


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float, where: str) -> None:
    for name, value in expected.items():
        scale = max(np.abs(value).max(), 1e-3)
        error = np.abs(found[name] - value).max() / scale
        assert error < tolerance, f"{where}: {name} differs by {error}"
