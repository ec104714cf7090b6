"""A small summary of two arms, for tests to change."""

from megatron_bliss.report.summary import build_summary


def evaluations(losses, names=("lambada", "c4")):
    return [
        {"iteration": 50 * i, "tokens": 50 * i * 4096, "losses": {name: loss + k for k, name in enumerate(names)}}
        for i, loss in enumerate(losses, start=1)
    ]


STAGES = [
    {"arm": "shared", "round": 0, "stage": "warmup target", "seconds": 30.0, "peak_bytes": 2**30, "flops": 2e12},
    {"arm": "bliss", "round": 1, "stage": "bilevel", "seconds": 60.0, "peak_bytes": 3 * 2**29, "flops": 5e12},
    {"arm": "bliss", "round": 2, "stage": "bilevel", "seconds": 65.0, "peak_bytes": 2**30, "flops": 5e12},
    {"arm": "bliss", "round": 1, "stage": "select", "seconds": 0.2, "peak_bytes": None, "flops": None},
]
DOMAINS = {
    "domain": {
        "pool": {"prose": 0.2, "code": 0.5, "tables": 0.3},
        "selected": {"bliss": {"prose": 0.6, "code": 0.4}, "random": {"prose": 0.2, "code": 0.5, "tables": 0.3}},
    }
}


def example(**changes):
    content = {"bliss": evaluations([8, 6, 4, 3]), "random": evaluations([8, 7, 6, 5])} | changes
    return build_summary(content, stages=STAGES, domains_by_field=DOMAINS, seed=7, config_text="seed: 7\n")
