"""The FLOPs that the BLISS paper (arXiv 2510.06048) reports, beside those that a plan of the same schedule comes to.

The paper counts pretraining by the rule 6 N D: N parameters, D tokens. A plan counts matrix products, as stages record
them (models/flops.py, bilevel/flops.py): a token attends to half of its sequence on average, looking up an embedding is
free, and a forward pass alone is a third of a training pass. The paper does not say what went into each of its numbers;
:data:`DERIVATIONS` are ways of counting from which they would follow, or would not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from megatron_bliss.models.presets import Architecture, flops_per_token, parameter_count, trunk_count

UNIT = 1e19
"""FLOPs in which the paper reports."""
STAGES = ("pretraining", "proxy warm-up", "bilevel", "scoring")
REPORTED = {
    "410M": {"pretraining": "6.35", "proxy warm-up": "0.07", "bilevel": "0.13", "scoring": "1.53", "total": "8.08"},
    "1B": {"pretraining": "17.67", "proxy warm-up": "0.07", "bilevel": "0.261", "scoring": "1.53", "total": "19.53"},
}
"""The paper's table, in UNIT and as printed: the digits say how exactly a number is known."""
EXAMPLES = {"410M": "pythia_410m_c4", "1B": "pythia_1b_c4"}
"""The example configurations of the same targets; examples/c4/paper.yaml over them gives the paper's settings."""
ARM, PUBLISHED = "bliss", "published"
"""The arm that is held against the paper, and the one that makes the steps of its released code."""


@dataclass(frozen=True)
class Schedule:
    """What the paper trains and scores, in tokens."""

    segments: int = 5
    """Of the target: a random one, and four on selections."""
    steps: int = 10_000
    """Of a segment."""
    batch_size: int = 512
    seq_length: int = 1024
    upper_steps: int = 3_000
    """Bilevel steps before each segment on a selection."""
    upper_batch_size: int = 32
    share: float = 0.2
    """Of the scored samples that are kept."""

    @property
    def segment_tokens(self) -> int:
        return self.steps * self.batch_size * self.seq_length

    @property
    def target_tokens(self) -> int:
        """The paper's 26.2B."""
        return self.segments * self.segment_tokens

    @property
    def bilevel_tokens(self) -> int:
        """Training samples of all upper steps, each taken once."""
        return (self.segments - 1) * self.upper_steps * self.upper_batch_size * self.seq_length

    @property
    def scored_tokens(self) -> int:
        """Shards of which the share that is kept lasts for a segment."""
        return round((self.segments - 1) * self.segment_tokens / self.share)


SCHEDULE = Schedule()


@dataclass(frozen=True)
class Models:
    """What a plan says of the models, and of the bilevel stage as the released code runs it."""

    target: Architecture
    proxy: Architecture
    score_parameters: int
    published: float
    """FLOPs of the bilevel stages of the arm ``published``."""


def six_n_d(parameters: int, tokens: float) -> float:
    """FLOPs of training by the paper's rule."""
    return 6.0 * parameters * tokens


def forward_n_d(parameters: int, tokens: float) -> float:
    """The same of a forward pass alone."""
    return 2.0 * parameters * tokens


def full_attention_flops(arch: Architecture, tokens: float, seq_length: int = SCHEDULE.seq_length) -> float:
    """Training on ``tokens`` by three forward passes, in which every token attends to its whole sequence."""
    return 3.0 * flops_per_token(arch, 2 * seq_length - 1) * tokens  # attention is counted to (length + 1) / 2


def implied_parameters(size: str, tokens: float = SCHEDULE.target_tokens) -> float:
    """N for which 6 N D is the paper's pretraining of a target."""
    return float(REPORTED[size]["pretraining"]) * UNIT / (6.0 * tokens)


def gives_digits(reported: str, flops: float) -> bool:
    """Whether ``flops`` are the number as the paper prints it."""
    decimals = len(reported.partition(".")[2])
    return f"{flops / UNIT:.{decimals}f}" == reported


@dataclass(frozen=True)
class Derivation:
    """A way of counting from which a number of the paper would follow, or would not."""

    stage: str
    way: str
    flops: Callable[[Models], float]


REST_PASSES = 28.5
"""Fitted: forward passes of the proxy that the paper's bilevel stage of the 1B target leaves, the target at 6 N D."""


def _target_and_rest(models: Models) -> float:
    """Bilevel: the target at 6 N D without its input embedding, and the fitted passes of the proxy."""
    proxy = REST_PASSES * full_attention_flops(models.proxy, SCHEDULE.bilevel_tokens) / 3
    return six_n_d(trunk_count(models.target), SCHEDULE.bilevel_tokens) + proxy


DERIVATIONS = (
    Derivation(
        "pretraining",
        "6 N D, N: all parameters",
        lambda models: six_n_d(parameter_count(models.target), SCHEDULE.target_tokens),
    ),
    Derivation(
        "pretraining",
        "6 N D, N: without the input embedding",
        lambda models: six_n_d(trunk_count(models.target), SCHEDULE.target_tokens),
    ),
    Derivation(
        "pretraining",
        "the same, attention to the whole sequence",
        lambda models: full_attention_flops(models.target, SCHEDULE.target_tokens),
    ),
    Derivation(
        "proxy warm-up",
        "6 N D of 31M over a segment, N: all parameters",
        lambda models: six_n_d(parameter_count(models.proxy), SCHEDULE.segment_tokens),
    ),
    Derivation(
        "proxy warm-up",
        "without the input embedding, attention to the whole sequence",
        lambda models: full_attention_flops(models.proxy, SCHEDULE.segment_tokens),
    ),
    Derivation(
        "bilevel",
        "6 N D of the target, N: without the input embedding",
        lambda models: six_n_d(trunk_count(models.target), SCHEDULE.bilevel_tokens),
    ),
    Derivation("bilevel", "the same, and 28.5 passes of the proxy (fitted to 1B)", _target_and_rest),
    Derivation("bilevel", "the released code's step, as the arm published counts it", lambda models: models.published),
    Derivation(
        "scoring",
        "2 N D of 31M, forward only, N: all parameters",
        lambda models: forward_n_d(parameter_count(models.proxy), SCHEDULE.scored_tokens),
    ),
    Derivation(
        "scoring",
        "6 N D of 31M",
        lambda models: six_n_d(parameter_count(models.proxy), SCHEDULE.scored_tokens),
    ),
    Derivation(
        "scoring",
        "6 N D of 31M, over 4 segments a round instead of 5",
        lambda models: six_n_d(parameter_count(models.proxy), 0.8 * SCHEDULE.scored_tokens),
    ),
)
"""In the order of the stages; D is :class:`Schedule`'s, so of pretraining 26.2B tokens."""


def paper_table(plans: Mapping[str, Mapping]) -> dict:
    """The paper's numbers beside a plan's, as plain data; FLOPs.

    plans: {size: what ``make_plan`` says of its example under the paper's settings, the arms ARM and PUBLISHED in it}.
    """
    models = {size: _models(plan) for size, plan in plans.items()}
    return {
        "sizes": {size: {"rows": _rows(size, models[size], plan)} for size, plan in plans.items()},
        "derivations": [_derived(derivation, models) for derivation in DERIVATIONS],
        "implied_parameters": {
            size: {"reported": implied_parameters(size), "counted": parameter_count(one.target)}
            for size, one in models.items()
        },
        "ratios": _ratios(models),
    }


def _models(plan: Mapping) -> Models:
    names = {field.name for field in fields(Architecture)}
    target, proxy = (
        Architecture(**{name: value for name, value in plan["models"][model].items() if name in names})
        for model in ("target", "proxy")
    )
    published = _planned(plan, PUBLISHED, "bilevel")
    return Models(target, proxy, plan["models"]["score model"]["parameters"], published)


def _planned(plan: Mapping, arm: str, *stages: str, key: str = "flops") -> float:
    """FLOPs, or tokens, of some stages of an arm, all rounds together."""
    return sum(one[key] for one in plan["stages"] if one["arm"] == arm and one["stage"] in stages)


def _rows(size: str, models: Models, plan: Mapping) -> list[dict]:
    """A row per stage, for their sum, and for what only measures: {"stage", "paper", "n_d", "plan", "ratio"}."""
    planned = _by_stage(plan, "flops")
    counted = _by_rule(models, plan)
    planned["total"], counted["total"] = sum(planned.values()), sum(counted.values())
    rows = [
        _row(stage, float(REPORTED[size][stage]) * UNIT, counted[stage], planned[stage]) for stage in (*STAGES, "total")
    ]
    measuring = _planned(plan, "shared", "warmup decay_branch") + _planned(plan, ARM, "decay_branch")
    return [*rows, _row("decay branches", None, None, measuring)]


def _row(stage: str, paper: float | None, n_d: float | None, planned: float) -> dict:
    return {
        "stage": stage,
        "paper": paper,
        "n_d": n_d,
        "plan": planned,
        "ratio": None if paper is None else planned / paper,
    }


def _by_stage(plan: Mapping, key: str) -> dict[str, float]:
    """FLOPs or tokens of a plan by the paper's stages."""
    return {
        "pretraining": _planned(plan, "shared", "warmup target", key=key) + _planned(plan, ARM, "pretrain", key=key),
        "proxy warm-up": _planned(plan, "shared", "warmup proxy", key=key),
        "bilevel": _planned(plan, ARM, "bilevel", key=key),
        "scoring": _planned(plan, ARM, "score", key=key),
    }


def _by_rule(models: Models, plan: Mapping) -> dict[str, float]:
    """A plan's parameters and tokens by the paper's rule: 6 N D where a model is trained, 2 N D where it only reads."""
    target, proxy, score = parameter_count(models.target), parameter_count(models.proxy), models.score_parameters
    tokens = _by_stage(plan, "tokens")
    drawn = SCHEDULE.bilevel_tokens  # without the guide's samples, which a plan's tokens hold, too
    return {
        "pretraining": six_n_d(target, tokens["pretraining"]),
        "proxy warm-up": six_n_d(proxy, tokens["proxy warm-up"]),
        "bilevel": six_n_d(proxy + score, drawn) + forward_n_d(target, drawn),
        "scoring": forward_n_d(score, tokens["scoring"]),
    }


def _derived(derivation: Derivation, models: Mapping[str, Models]) -> dict:
    """{"stage", "way", "flops": {size: FLOPs}, "gives_digits": {size: whether they are the paper's}}."""
    flops = {size: derivation.flops(one) for size, one in models.items()}
    return {
        "stage": derivation.stage,
        "way": derivation.way,
        "flops": flops,
        "gives_digits": {size: gives_digits(REPORTED[size][derivation.stage], value) for size, value in flops.items()},
    }


def _ratios(models: Mapping[str, Models]) -> dict:
    """By what each part of the targets grows from 410M to 1B: no sum of such parts grows by more than the largest."""
    small, large = (models[size].target for size in ("410M", "1B"))
    parts: dict[str, Callable[[Architecture], float]] = {
        "blocks": lambda arch: trunk_count(arch) - arch.vocab_size * arch.hidden_size,
        "embeddings": lambda arch: arch.vocab_size * arch.hidden_size,
        "attention": lambda arch: arch.num_layers * arch.hidden_size,
    }
    reported = [float(REPORTED[size]["pretraining"]) for size in ("410M", "1B")]
    return {"paper": reported[1] / reported[0]} | {name: part(large) / part(small) for name, part in parts.items()}
