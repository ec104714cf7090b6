"""What stages of two arms took, in numbers that can be added up by hand."""


def stage(arm, number, name, flops, seconds, evaluation_seconds=None, needs=()):
    record = {"arm": arm, "round": number, "stage": name, "flops": flops, "seconds": seconds, "peak_bytes": 1}
    return record | {"evaluation_seconds": evaluation_seconds, "needs": list(needs)}


STAGES = [
    stage("shared", 0, "warmup target", 100.0, 12.0, 2.0),
    stage("shared", 0, "warmup proxy", 7.0, 3.0),
    stage("shared", 0, "warmup decay_branch", 1000.0, 1000.0),
    stage("shared", 0, "warmup evaluate", 0.0, 500.0),
    *(stage("bliss", n, "bilevel", 30.0, 20.0, needs=["warmup/proxy", "warmup/target"]) for n in (1, 2)),
    *(stage("bliss", n, "score", 20.0, 5.0, needs=[f"bliss/round_0{n}/bilevel"]) for n in (1, 2)),
    *(stage(arm, n, "select", 0.0, 1.0) for n in (1, 2) for arm in ("bliss", "random")),
    *(stage("random", n, "score", 0.0, 0.0) for n in (1, 2)),
    *(stage(arm, n, "pretrain", 200.0, 24.0, 4.0, ["warmup/target"]) for n in (1, 2) for arm in ("bliss", "random")),
    *(stage(arm, n, "decay_branch", 9e9, 9e9) for n in (1, 2) for arm in ("bliss", "random")),
    *(
        stage(arm, n, "evaluate", 0.0, 99.0, needs=["warmup/decay_branch"])
        for n in (1, 2)
        for arm in ("bliss", "random")
    ),
]


def evaluations(losses, names=("lambada", "c4"), rises=(0.0, 1.0)):
    """Losses at the end of the warm-up (10 iterations of 100 tokens), then in the middle and at the end of two rounds
    of 20; each name's stands higher by its rise."""
    places = [(10, 0), (20, 1), (30, 1), (40, 2), (50, 2)]
    return [
        {
            "iteration": iteration,
            "tokens": 100 * iteration,
            "round": number,
            "losses": {name: loss + rise for name, rise in zip(names, rises, strict=True)},
        }
        for (iteration, number), loss in zip(places, losses, strict=True)
    ]
