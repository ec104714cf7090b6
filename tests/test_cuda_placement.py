"""Every tensor where a GPU machine wants it, checked without one: on tensors that claim to be CUDA's.

The same work is done on the CPU and on the claimed device (``tests/claimed_cuda.py``). What CUDA or NCCL would refuse
raises; the numbers must be the same bits, because the arithmetic is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import utils
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel.layers import get_global_memory_buffer
from torch.utils._pytree import tree_map

from megatron_bliss.base.parallel import Groups
from megatron_bliss.bilevel import curvature
from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.objective import Loss, Objective, validation_loss
from megatron_bliss.bilevel.precision import precision_warnings
from megatron_bliss.bilevel.softmax import global_softmax
from megatron_bliss.bilevel.teacher import TargetTeacher
from megatron_bliss.bilevel.train import ProxyWarmup
from megatron_bliss.config.models import ProxyConfig, TargetConfig
from megatron_bliss.data.batches import BatchSchedule
from megatron_bliss.data.tokenizers import load_tokenizer
from megatron_bliss.evaluation.generation import generate
from megatron_bliss.evaluation.packing import Request
from megatron_bliss.evaluation.plain_models import PlainBackbone
from megatron_bliss.evaluation.request_cache import RequestCache
from megatron_bliss.evaluation.scoring import score
from megatron_bliss.evaluation.target_model import TargetBackbone
from megatron_bliss.models.transformer import LanguageModel, build_lm
from megatron_bliss.scorers.models import ModelScorer, Reading
from megatron_bliss.scorers.scorer import NotFinite, Scorer
from megatron_bliss.target.checkpoint import load_target_and_optimizer, save_target
from megatron_bliss.target.loss import evaluate_loss
from megatron_bliss.target.model import Target, build_target
from megatron_bliss.target.sequences import MicroBatch
from megatron_bliss.target.trainer import TargetTrainer
from tests.bilevel.problems import architecture, random_batch, random_teacher, random_weights, score_model
from tests.bilevel.trainers import CONFIG, OPTIMIZER, SIZES, VOCABULARY, RandomUnits, make_trainer
from tests.claimed_cuda import PlacementError, claimed_cuda, to_cpu
from tests.distributed import run_distributed
from tests.targets import LLAMA, NEOX, PRETRAINING, SEQ_LENGTH, VOCAB_SIZE, grouped, layout, make_batches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device says more: tests/test_gpu.py")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with grouped(layout()) as made:
        yield made


@contextlib.contextmanager
def on_claimed(groups: Groups) -> Iterator[Groups]:
    """The ranks as on a GPU machine, where base/platform.py leaves megatron-core's ``device="cuda"`` alone."""
    with claimed_cuda() as device, contextlib.ExitStack() as stack:
        for module in (utils, clip_grads, optimizer, schedules):
            stack.enter_context(mock.patch.object(module, "torch", torch))
        stack.enter_context(mock.patch.dict(get_global_memory_buffer().buffer, clear=True))
        yield dataclasses.replace(groups, device=device)


def numbers(result):
    """Tensors of a result as arrays that compare bit by bit."""
    return tree_map(lambda value: to_cpu(value).tolist() if isinstance(value, torch.Tensor) else value, result)


def assert_same(work: Callable, groups: Groups) -> None:
    """``work(groups)`` gives the same on both devices."""
    expected = numbers(work(groups))
    with on_claimed(groups) as claimed:
        found = numbers(work(claimed))
    assert found == expected


def test_misplaced_tensors_are_caught(groups: Groups) -> None:
    with claimed_cuda() as device:
        here, there = torch.arange(3, device=device), torch.arange(3)
        assert torch.equal(to_cpu(here[there] + torch.tensor(1)), there + 1)
        with pytest.raises(PlacementError, match="aten::add.*on cuda:0.*on cpu"):
            here + there
        with pytest.raises(PlacementError, match="aten::index"):
            there[here]
        with pytest.raises(PlacementError, match="aten::cat"):
            torch.cat((here, there))
        with pytest.raises(PlacementError, match="numpy"):
            here.numpy()
        with pytest.raises(PlacementError, match="NCCL"):
            dist.all_reduce(there, group=groups.world_group)
        dist.all_reduce(here, group=groups.world_group)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"curvature": "hessian", "micro_batch_size": 3, "kl_direction": "target_to_proxy"},
        {"solver": "conjugate_gradient", "solver_steps": 2, "params_dtype": "bf16"},
        {"solver": "neumann", "solver_steps": 2, "lower_iters": 1},
    ],
    ids=["sgd", "hessian", "conjugate gradient in bf16", "neumann"],
)
def test_bilevel_steps_and_their_resumption_stay_on_the_device(changes: dict, groups: Groups) -> None:
    config = dataclasses.replace(CONFIG, **changes)

    def work(groups: Groups):
        trainer = make_trainer(config, torch.float32, groups)
        steps = [trainer.step()]
        saved = tree_map(lambda value: to_cpu(value).clone() if isinstance(value, torch.Tensor) else value,
                         trainer.state_dict())  # fmt: skip
        again = make_trainer(config, torch.float32, groups)
        again.load_state_dict(saved)
        steps.append(again.step())
        warnings = again.watch(steps[-1])
        return steps, warnings, again.z, dict(again.proxy.named_parameters()), again.check_precision()

    assert_same(work, groups)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_and_products_stay_on_the_device(family: str, recompute: bool, groups: Groups) -> None:
    sizes = architecture(family, tied=family == "llama", groups=1 if family == "llama" else 2)

    def work(groups: Groups):
        device = groups.device
        model = build_lm(sizes, seed=1, device=device)
        batch = random_batch(5, 9).to(device)
        teacher = type(random_teacher(1, 1))(*(t.to(device) for t in random_teacher(5, 9, dtype=torch.float32)))
        weights = random_weights(5, dtype=torch.float32).to(device)
        z = torch.nn.utils.parameters_to_vector(model.parameters()).detach() * 0.5
        execution = Execution(groups.world_group, 2, recompute)
        losses = [
            Loss(Objective(0.3, direction, 0.1, len(batch)), batch, weights, teacher)
            for direction in ("proxy_to_target", "target_to_proxy")
        ]
        products = [
            curvature.curvature_product(model, loss, z, execution, curvature=kind)
            for kind in curvature.CURVATURES
            for loss in losses
        ]
        phi = validation_loss(batch, groups.world_group)
        gradients = [curvature.gradient(model, loss, execution) for loss in (*losses, phi)]
        low = precision_warnings(model, batch, torch.bfloat16, "gauss_newton")
        found = [(p.gradient.flat, p.product.flat, p.influence, p.sample_losses, p.loss, p.kl) for p in products]
        return found, [(g.gradient.flat, g.sample_losses, g.sample_kl) for g in gradients], phi.weights, low

    assert_same(work, groups)


def test_the_proxys_warm_up_stays_on_the_device(groups: Groups) -> None:
    def work(groups: Groups):
        proxy = build_lm(SIZES, vocab_size=VOCABULARY, seed=1, device=groups.device)
        batches = BatchSchedule(RandomUnits(20, 1), 4, seed=5, rank=0, world_size=1)
        trainer = ProxyWarmup(ProxyConfig(warmup_optimizer=OPTIMIZER, warmup_iters=3), proxy, batches, groups)
        return [trainer.step() for _ in range(3)]

    assert_same(work, groups)


def test_scores_and_what_is_said_of_broken_ones_are_the_same_on_the_device(groups: Groups) -> None:
    lengths = np.array([5, 0, 9, 3, 12, 7])
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, lengths.sum()).astype(np.uint16)

    def work(groups: Groups):
        model = score_model(vocab=VOCABULARY, dtype=torch.float32)
        reader = Scorer(ModelScorer(model, Reading(groups.device, batch_tokens=16)), 10, "mean")
        found = reader.score(tokens, lengths)
        with torch.no_grad():
            model.head.bias.fill_(torch.nan)
        with pytest.raises(NotFinite, match="6 scores"):
            reader.score(tokens, lengths)
        scores = torch.tensor([0.0, torch.inf, 1.0], device=groups.device)
        ids = torch.tensor([7, 8, 9], device=groups.device)
        with pytest.raises(ValueError, match="unit 8: inf"):
            global_softmax(scores, groups.world_group, unit_ids=ids)
        return found.tolist()

    assert_same(work, groups)


def requests(vocab_size: int) -> list[Request]:
    """Some with a common beginning, so that rows hold branches."""
    generator = np.random.default_rng(1)
    texts = [tuple(generator.integers(vocab_size, size=size).tolist()) for size in (9, 5, 12)]
    return [Request((*text, *end), end) for text in texts for end in ((1,), (2, 3), (2, 4))]


def evaluate_a_proxy(groups: Groups, folder: Path):
    """Answers to requests, the same from the cache, and generated texts."""
    tokenizer, folder = load_tokenizer("bytes"), folder / groups.device.type
    lm: LanguageModel = build_lm(SIZES, vocab_size=tokenizer.vocab_size, seed=1, device=groups.device)
    backbone = PlainBackbone(lm, lm.hidden_states, lm.output_weight, groups)
    asked = requests(tokenizer.vocab_size)
    answers = score(backbone, asked, batch_tokens=32, cache=RequestCache(folder, backbone))
    cached = RequestCache(folder, backbone).find(asked)
    jobs = [([1, 2, 3], [], 2), ([4], [], 1)]
    return answers, list(cached.values()), generate(backbone, tokenizer, jobs, batch_tokens=32)


def test_the_evaluation_of_a_proxy_stays_on_the_device(groups: Groups, tmp_path: Path) -> None:
    assert_same(lambda groups: evaluate_a_proxy(groups, tmp_path), groups)


def micro_batches(groups: Groups, count: int) -> Iterator[MicroBatch]:
    generator = torch.Generator().manual_seed(groups.data_parallel_rank)
    for _ in range(count):
        tokens = torch.randint(VOCAB_SIZE, (PRETRAINING.micro_batch_size, SEQ_LENGTH), generator=generator)
        yield MicroBatch(tokens, tokens.roll(-1, 1), torch.ones(tokens.shape)).to(groups.device)


def train_a_target(groups: Groups, target: Target, **changes):
    """Losses, teaching (offloaded, too) and training of a target; and the trainer."""
    loss = evaluate_loss(target, make_batches(), groups)
    tokens = torch.arange(3 * SEQ_LENGTH).view(3, SEQ_LENGTH) * 7 % VOCAB_SIZE
    taught = [TargetTeacher(target, groups, VOCAB_SIZE, 2, offload=offload)(tokens) for offload in (False, True)]
    for teacher in taught:
        assert {tensor.device.type for tensor in teacher} == {groups.device.type}
    target = [chunk.to(groups.device) for chunk in target]
    pretraining = dataclasses.replace(PRETRAINING, **changes)
    trainer = TargetTrainer(target, pretraining, groups, seq_length=SEQ_LENGTH, total_iterations=10)
    batches = micro_batches(groups, 3 * trainer.num_micro_batches)
    steps = [dataclasses.astuple(trainer.step(batches, lambda *_: True)) for _ in range(3)]
    with trainer.settled():
        last = evaluate_loss(target, make_batches(), groups)
    return trainer, (loss, taught[0].hidden_states, taught[1].hidden_states, steps, trainer.take_loss(), last)


@pytest.mark.parametrize("is_llama", [False, True])
def test_a_target_trains_saves_and_answers_on_the_device(is_llama: bool, groups: Groups, tmp_path: Path) -> None:
    """megatron-core's model, schedule and optimizer, a checkpoint, and evaluation with branches."""
    sizes, dtype = (LLAMA, torch.bfloat16) if is_llama else (NEOX, torch.float32)

    def work(groups: Groups):
        options = {"seq_length": SEQ_LENGTH, "params_dtype": dtype}
        target = build_target(layout(), sizes, groups, seed=3, **options)
        trainer, found = train_a_target(groups, target)
        backbone = TargetBackbone(trainer.target, groups)
        answers, digest = score(backbone, requests(VOCAB_SIZE), batch_tokens=64), backbone.digest()
        folder, again = tmp_path / groups.device.type, build_target(layout(), sizes, groups, seed=4, **options)
        save_target(folder, 3, trainer.target, groups, shared={}, optimizer=trainer.optimizer)
        resumed = TargetTrainer(again, PRETRAINING, groups, seq_length=SEQ_LENGTH, total_iterations=10)
        load_target_and_optimizer(folder / "step_00000003", again, resumed.optimizer, groups)
        resumed.resume(3, [0.0, 0.0])
        for each in (trainer, resumed):
            step = each.step(micro_batches(groups, each.num_micro_batches), lambda *_: True)
            found = (*found, dataclasses.astuple(step))
        assert found[-1] == found[-2]
        return found, answers, digest

    assert_same(work, groups)


LAYOUTS = {
    # the second rank's half of the vocabulary is padding alone
    "tensor parallel": dataclasses.replace(layout(2, 1, sequence_parallel=True), make_vocab_size_divisible_by=256),
    "pipelined": layout(1, 2),
    "data parallel": layout(),
}
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


def on_two_ranks(rank: int, world_size: int, folder: str) -> dict[str, bool]:
    """Whether both devices gave the same, by layout."""
    found = {}
    for name, config in LAYOUTS.items():
        with grouped(config) as groups:

            def work(groups: Groups, config: TargetConfig = config):
                options = {"seq_length": SEQ_LENGTH, "params_dtype": torch.bfloat16}
                target = build_target(config, NEOX, groups, seed=3, **options)
                teacher = TargetTeacher(target, groups, VOCAB_SIZE)
                trainer = make_trainer(CONFIG, torch.float32, groups, target_teacher=teacher, vocab_size=VOCAB_SIZE)
                steps = [trainer.step() for _ in range(2)]
                trainer.watch(steps[-1])
                return steps, train_a_target(groups, target, **OVERLAPPED)[1]

            assert_same(work, groups)
            found[name] = True
            if name == "data parallel":
                assert_same(lambda groups: evaluate_a_proxy(groups, Path(folder)), groups)
    return found


def test_two_ranks_bring_claimed_tensors_alone_to_collectives(tmp_path: Path) -> None:
    """With hidden states handed from stage to stage, sharded optimizer states and the bilevel step's sums."""
    assert run_distributed(on_two_ranks, 2, str(tmp_path)) == [dict.fromkeys(LAYOUTS, True)] * 2
