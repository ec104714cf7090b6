"""One whole bilevel step on any number of ranks and in any micro-batches gives the same numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bliss.base import checkpoint
from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel.head import Teacher
from megatron_bliss.bilevel.train import BilevelTrainer, ProxyWarmup
from megatron_bliss.config.config import BilevelConfig, ModelConfig, OptimizerConfig, ProxyConfig, ScoreConfig
from megatron_bliss.data.batches import Batch, BatchSchedule, language_model_mask
from megatron_bliss.models.score import build_score_model
from megatron_bliss.models.transformer import build_lm
from tests.distributed import run_distributed

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
    config: BilevelConfig, dtype: torch.dtype, world: World, *, target_teacher=None, vocab_size: int = VOCABULARY
) -> BilevelTrainer:
    """A trainer on random units; without a ``target_teacher``, a small frozen LM of another width is the teacher."""
    options = {"dtype": dtype, "device": world.device}
    proxy = build_lm(SIZES, vocab_size=vocab_size, seed=1, **options)
    score = build_score_model(ScoreConfig(head_init_std=0.5), proxy.architecture, seed=2, trunk_from=proxy, **options)
    target = build_lm(dataclasses.replace(SIZES, hidden_size=24), vocab_size=vocab_size, seed=3, **options)

    def teacher(tokens: torch.Tensor) -> Teacher:
        with torch.no_grad():
            return Teacher(target.hidden_states(tokens), target.output_weight.detach())

    def schedule(source: RandomUnits, size: int) -> BatchSchedule:
        return BatchSchedule(source, size, seed=5, rank=world.rank, world_size=world.world_size)

    train = schedule(RandomUnits(40, 1), config.global_batch_size)
    validation = schedule(RandomUnits(20, 2, last=2), config.validation_batch_size)
    return BilevelTrainer(config, proxy, score, target_teacher or teacher, train, validation, world)


def run_steps(config: BilevelConfig, dtype: torch.dtype, world: World, steps: int = 3) -> dict[str, np.ndarray]:
    """Everything that ``steps`` bilevel steps leave behind, as fp64 arrays."""
    trainer = make_trainer(config, dtype, world)
    metrics = [trainer.step() for _ in range(steps)]
    return {
        "proxy": _flat(trainer.proxy),
        "score": _flat(trainer.score_model),
        "z": trainer.z.double().numpy(),
        "metrics": np.array([[step[name] for name in sorted(step)] for step in metrics]),
    }


def _flat(model: torch.nn.Module) -> np.ndarray:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().double().numpy()


ALONE = World(None, 0, 1, torch.device("cpu"))
VARIANTS = {
    "default": CONFIG,
    "micro-batches of 1": dataclasses.replace(CONFIG, micro_batch_size=1),
    "micro-batches of 3": dataclasses.replace(CONFIG, micro_batch_size=3),
    "hessian": dataclasses.replace(CONFIG, curvature="hessian"),
    "two steps of sgd": dataclasses.replace(CONFIG, solver_steps=2),
    "conjugate gradient": dataclasses.replace(CONFIG, solver="conjugate_gradient", solver_steps=3),
    "fewer samples than ranks": dataclasses.replace(CONFIG, global_batch_size=3, validation_batch_size=1),
}


def on_ranks(rank: int, world_size: int) -> dict[str, dict[str, np.ndarray]]:
    """Every variant on this rank, in both precisions."""
    world = World(dist.group.WORLD, rank, world_size, torch.device("cpu"))
    return {
        f"{name} {dtype}": run_steps(config, dtype, world)
        for name, config in VARIANTS.items()
        for dtype in (torch.float64, torch.float32)
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float, where: str) -> None:
    for name, value in expected.items():
        scale = max(np.abs(value).max(), 1e-3)
        error = np.abs(found[name] - value).max() / scale
        assert error < tolerance, f"{where}: {name} differs by {error}"


@pytest.mark.parametrize("world_size", [2, 4])
def test_steps_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    results = run_distributed(on_ranks, world_size)
    for name, config in VARIANTS.items():
        expected = run_steps(config, torch.float64, ALONE)
        for rank, result in enumerate(results):
            assert_same(result[f"{name} {torch.float64}"], expected, 1e-10, f"{name}, fp64, rank {rank}")
        single = run_steps(config, torch.float32, ALONE)
        for rank, result in enumerate(results):
            assert_same(result[f"{name} {torch.float32}"], single, 1e-5, f"{name}, fp32, rank {rank}")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_steps_do_not_depend_on_micro_batches(size: int) -> None:
    expected = run_steps(CONFIG, torch.float64, ALONE)
    split = dataclasses.replace(CONFIG, micro_batch_size=size)
    assert_same(run_steps(split, torch.float64, ALONE), expected, 1e-10, f"micro-batches of {size}")


def test_a_step_moves_scores_and_proxy() -> None:
    trainer = make_trainer(CONFIG, torch.float64, ALONE)
    proxy, score = _flat(trainer.proxy), _flat(trainer.score_model)
    trainer.step()
    assert np.abs(trainer.z.numpy()).max() > 0
    assert np.abs(_flat(trainer.proxy) - proxy).max() > 0
    trainer.step()  # z was 0 in the first step, so its influences were too
    assert np.abs(_flat(trainer.score_model) - score).max() > 0


def test_resumed_steps_equal_uninterrupted_ones(tmp_path) -> None:
    whole = make_trainer(CONFIG, torch.float32, ALONE)
    for _ in range(4):
        last = whole.step()
    first = make_trainer(CONFIG, torch.float32, ALONE)
    for _ in range(2):
        first.step()
    checkpoint.save_state(tmp_path / "state.pt", first.state_dict())
    second = make_trainer(CONFIG, torch.float32, ALONE)
    second.load_state_dict(checkpoint.load_state(tmp_path / "state.pt"))
    for _ in range(2):
        resumed = second.step()
    assert resumed == last
    assert np.array_equal(_flat(whole.score_model), _flat(second.score_model))
    assert np.array_equal(_flat(whole.proxy), _flat(second.proxy))
    assert torch.equal(whole.z, second.z)


def warm_up(dtype: torch.dtype = torch.float64, **options) -> np.ndarray:
    """The proxy's weights after three steps."""
    proxy = build_lm(SIZES, vocab_size=VOCABULARY, seed=1, dtype=dtype)
    config = ProxyConfig(warmup_optimizer=OPTIMIZER, warmup_iters=3, **options)
    trainer = ProxyWarmup(config, proxy, BatchSchedule(RandomUnits(9, 1), 5, seed=1, rank=0, world_size=1), ALONE)
    for _ in range(3):
        trainer.step()
    return _flat(proxy)


def test_proxy_warm_up_in_micro_batches_and_in_bf16() -> None:
    whole = warm_up()
    np.testing.assert_allclose(warm_up(warmup_micro_batch_size=2), whole, atol=1e-12)
    low, start = (
        warm_up(torch.float32, warmup_params_dtype="bf16"),
        _flat(build_lm(SIZES, vocab_size=VOCABULARY, seed=1)),
    )
    assert 0 < np.linalg.norm(low - whole) < 0.1 * np.linalg.norm(whole - start)


def test_proxy_warm_up_lowers_the_loss() -> None:
    proxy = build_lm(SIZES, vocab_size=VOCABULARY, seed=1)
    config = ProxyConfig(warmup_optimizer=OptimizerConfig(lr=1e-2), warmup_iters=40)
    schedule = BatchSchedule(
        RandomUnits(4, 1), 4, seed=1, rank=0, world_size=1
    )  # four units: they can be learnt by heart
    trainer = ProxyWarmup(config, proxy, schedule, ALONE)
    losses = [trainer.step()["loss"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
