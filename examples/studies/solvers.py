"""Which solver of eq. (5) selects best, and what it costs: arms x seeds on a corpus whose domains are known.

    python examples/studies/solvers.py --output runs/solvers.md      (data: bash examples/quickstart/run.sh --short
                                                                      --data-folder runs/quickstart-short-data)

For each seed a proxy is warmed up once; every arm starts from it, takes the same number of upper steps, and scores the
same sample of units. Reported: how much of the wanted domain is among the best fifth, over its share of the pool; the
probability that a unit of that domain scores above another one (AUC); seconds of the upper steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for tools/, when run as a script

from megatron_bliss.base.files import atomic_file  # noqa: E402
from megatron_bliss.base.parallel import World  # noqa: E402
from megatron_bliss.bilevel.hypergradient import score_batch  # noqa: E402
from megatron_bliss.bilevel.published import PublishedTrainer  # noqa: E402
from megatron_bliss.bilevel.train import BilevelTrainer, ProxyWarmup  # noqa: E402
from megatron_bliss.config.bilevel import BilevelConfig  # noqa: E402
from megatron_bliss.config.models import ModelConfig, ProxyConfig, ScoreConfig  # noqa: E402
from megatron_bliss.config.training import OptimizerConfig  # noqa: E402
from megatron_bliss.data.batches import BatchSchedule, UnitDataset, ValidationSet  # noqa: E402
from megatron_bliss.data.manifest import read_manifest  # noqa: E402
from megatron_bliss.data.provenance import read_provenance  # noqa: E402
from megatron_bliss.models.score import ScoreModel, build_score_model  # noqa: E402
from megatron_bliss.models.transformer import LanguageModel, build_lm  # noqa: E402
from tools.benchmarks.measure import machine  # noqa: E402

CPU = torch.device("cpu")
ALONE = World(None, 0, 1, CPU)
SELECTED = 0.2
ARMS = {
    "gauss_newton": ("one warm-started Gauss-Newton step per upper step (the default)", {}),
    "published": ("the published scheme", None),
    "identity": ("z = gradient of the validation loss", {"solver": "identity"}),
    "conjugate_gradient": (
        "five conjugate-gradient products a step",
        {"solver": "conjugate_gradient", "solver_steps": 5},
    ),
    "hessian": ("one warm-started Hessian step per upper step", {"curvature": "hessian"}),
}
"""Arm -> (what it is, changes to the default BilevelConfig; None: PublishedTrainer)."""


@dataclass(frozen=True)
class Corpus:
    """The pool with the units that are scored and whether each is of the wanted domain; the guide."""

    pool: UnitDataset
    guide: ValidationSet
    vocab_size: int
    units: np.ndarray
    wanted: np.ndarray

    def schedules(self, batch_size: int, seed: int) -> tuple[BatchSchedule, BatchSchedule]:
        """Training and validation batches."""
        options = {"seed": seed, "rank": 0, "world_size": 1}
        return BatchSchedule(self.pool, batch_size, **options), BatchSchedule(self.guide, batch_size, **options)


@dataclass(frozen=True)
class Result:
    """One arm under one seed. ``enrichment``: share of the wanted domain in the best fifth over that in the pool."""

    arm: str
    seed: int
    pool_share: float
    selected_share: float
    auc: float
    seconds: float
    failure: str = ""

    @property
    def enrichment(self) -> float:
        return self.selected_share / self.pool_share


def read_corpus(options: argparse.Namespace) -> Corpus:
    """The files that examples/quickstart/run.sh makes, or others of these names; ValueError without the domain."""
    folder = Path(options.data_folder)
    pool = UnitDataset(str(folder / "pool"), options.seq_length)
    generator = np.random.default_rng(0)
    units = np.sort(generator.choice(len(pool), min(options.sample_units, len(pool)), replace=False))
    domains = np.array(read_provenance(folder / "pool", units).column("domain").to_pylist())
    wanted = domains == options.domain
    if not 0 < wanted.sum() < len(wanted):
        found = ", ".join(sorted(set(domains.tolist())))
        raise ValueError(f"found domains {found}, expected {options.domain} and others: change --domain")
    vocab_size = read_manifest(str(folder / "pool"))["tokenizer"]["vocab_size"]
    return Corpus(pool, ValidationSet(str(folder / "validation"), options.seq_length), vocab_size, units, wanted)


def warmed_up_proxy(corpus: Corpus, options: argparse.Namespace, seed: int) -> LanguageModel:
    """A proxy after ``--warmup-iters`` steps of plain training."""
    model = ModelConfig(
        architecture="gpt_neox",
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.num_attention_heads,
    )
    proxy = build_lm(model, vocab_size=corpus.vocab_size, seed=seed)
    optimizer = OptimizerConfig(lr=3e-3, lr_warmup_iters=min(20, options.warmup_iters))
    config = ProxyConfig(warmup_optimizer=optimizer, warmup_iters=options.warmup_iters)
    warmup = ProxyWarmup(config, proxy, corpus.schedules(options.batch_size, seed)[0], ALONE)
    for _ in range(options.warmup_iters):
        warmup.step()
    return proxy


def run_arm(arm: str, seed: int, warm: LanguageModel, corpus: Corpus, options: argparse.Namespace) -> Result:
    """Upper steps from a copy of the warmed-up proxy, then the scores of the sample."""
    proxy = copy.deepcopy(warm)
    score_model = build_score_model(ScoreConfig(), proxy.architecture, seed=seed, trunk_from=proxy)
    step = _trainer(arm, proxy, score_model, corpus.schedules(options.batch_size, seed + 1000), options).step
    failure, start = "", time.perf_counter()
    for index in range(options.upper_iters):
        try:
            step()
        except FloatingPointError as error:
            failure = f"stopped at step {index + 1}: {error}"
            break
    seconds = time.perf_counter() - start
    scores = score_units(score_model, corpus)
    selected = scores >= np.quantile(scores, 1 - SELECTED)
    share = float(corpus.wanted[selected].mean())
    return Result(arm, seed, float(corpus.wanted.mean()), share, auc(scores, corpus.wanted), seconds, failure)


def _trainer(arm: str, proxy: LanguageModel, score_model: ScoreModel, schedules, options: argparse.Namespace):
    optimizer = OptimizerConfig(lr=options.lr)
    config = BilevelConfig(
        kl_weight=0.0,
        upper_iters=options.upper_iters,
        global_batch_size=options.batch_size,
        validation_batch_size=options.batch_size,
        proxy_optimizer=optimizer,
        score_optimizer=optimizer,
    )
    changes = ARMS[arm][1]
    if changes is None:
        return PublishedTrainer(config, proxy, score_model, None, *schedules, ALONE)
    return BilevelTrainer(replace(config, **changes), proxy, score_model, None, *schedules, ALONE)


def score_units(score_model: ScoreModel, corpus: Corpus, batch_size: int = 128) -> np.ndarray:
    """Scores of the sample, float32 [units]."""
    starts = range(0, len(corpus.units), batch_size)
    parts = [score_batch(score_model, corpus.pool.batch(corpus.units[i : i + batch_size])).numpy() for i in starts]
    return np.concatenate(parts)


def auc(scores: np.ndarray, wanted: np.ndarray) -> float:
    """Probability that a wanted unit scores above another one; ties count half."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    positives, negatives = int(wanted.sum()), int((~wanted).sum())
    return float((ranks[wanted].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def markdown(results: list[Result], options: argparse.Namespace) -> str:
    """Means over seeds, then every run."""
    description = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine(CPU).items())
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in vars(options).items() if name != "output"
    )
    lines = ["# Solvers of the linear system", "", description + ".", "", settings + ".", ""]
    lines += ["Enrichment: share of the wanted domain in the best fifth / its share of the pool.", ""]
    lines += [
        "| arm | | enrichment, mean (least-most) | AUC, mean | seconds, median |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    lines += [_summary([r for r in results if r.arm == arm]) for arm in dict.fromkeys(r.arm for r in results)]
    lines += ["", "| arm | seed | in the best fifth | in the pool | enrichment | AUC | seconds | |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    lines += [
        f"| {r.arm} | {r.seed} | {r.selected_share:.1%} | {r.pool_share:.1%} | {r.enrichment:.2f} | {r.auc:.3f} |"
        f" {r.seconds:.1f} | {r.failure} |"
        for r in results
    ]
    return "\n".join(lines) + "\n"


def _summary(runs: list[Result]) -> str:
    enrichment = [r.enrichment for r in runs]
    return (
        f"| {runs[0].arm} | {ARMS[runs[0].arm][0]} | {statistics.mean(enrichment):.2f}"
        f" ({min(enrichment):.2f}-{max(enrichment):.2f}) | {statistics.mean(r.auc for r in runs):.3f} |"
        f" {statistics.median(r.seconds for r in runs):.1f} |"
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data-folder", default="runs/quickstart-data", help="folder with pool and guide (validation)")
    add("--domain", default="prose", help="the domain that the guide is of")
    add("--arms", default=",".join(ARMS), help="comma-separated")
    add("--seeds", default="1,2,3", help="comma-separated")
    add("--upper-iters", type=int, default=120, help="upper steps of every arm")
    add("--warmup-iters", type=int, default=150, help="plain training steps of the proxy")
    add("--batch-size", type=int, default=32, help="samples per step, of training and of validation")
    add("--seq-length", type=int, default=64, help="tokens per sample")
    add("--lr", type=float, default=1e-3, help="learning rate of proxy and score model in the upper steps")
    add("--sample-units", type=int, default=6000, help="units that are scored")
    add("--num-layers", type=int, default=2, help="of proxy and score model")
    add("--hidden-size", type=int, default=96, help="of proxy and score model")
    add("--num-attention-heads", type=int, default=4, help="of proxy and score model")
    add("--output", help="Markdown file to write; the table is printed in any case")
    options = parser.parse_args(arguments)
    unknown = set(options.arms.split(",")) - set(ARMS)
    if unknown:
        parser.error(f"found arms {', '.join(sorted(unknown))}, expected some of {', '.join(ARMS)}: change --arms")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    options, results = parse_arguments(arguments), []
    try:
        corpus = read_corpus(options)
        for seed in map(int, options.seeds.split(",")):
            warm = warmed_up_proxy(corpus, options, seed)
            for arm in options.arms.split(","):
                results.append(run_arm(arm, seed, warm, corpus, options))
                print(f"seed {seed}: {_summary(results[-1:])}", file=sys.stderr, flush=True)
    except (ValueError, OSError) as error:
        print(f"solvers: {error}", file=sys.stderr)
        return 1
    page = markdown(results, options)
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.output, "w") as stream:
            stream.write(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
