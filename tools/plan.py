#!/usr/bin/env python3
"""What a run will take, before it runs: FLOPs and time of every stage, memory of a rank, data and disk.

plan.py --config my.yaml --world-size 64 --device h100 --memory-gib 80 [--any.option VALUE ...]
plan.py --paper-table

Takes every option of pretrain_bliss.py beside its own; the corpus need not be there yet, and nothing is written.
--paper-table prints the FLOPs that the BLISS paper reports beside those of examples/pythia_*_c4 under its settings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_bliss.base.command import command
from megatron_bliss.base.files import write_json
from megatron_bliss.run.checks import check_options
from megatron_bliss.run.options import parse_options
from megatron_bliss.target.throughput import PEAK_TFLOPS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This tool's options, and the others, which are the run's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="python pretrain_bliss.py --help lists the run's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--world-size", type=int, default=1, help="ranks that torchrun will start, over all nodes")
    add("--device", help=f"cpu, or one of {', '.join(name.lower() for name in PEAK_TFLOPS)}")
    add("--peak-tflops", type=float, default=0.0, help="peak of one device in platform.params_dtype")
    add("--mfu", type=float, default=0.4, help="share of the peak that the target's training reaches")
    add("--proxy-mfu", type=float, default=0.0, help="that of proxy and score model (default: --mfu)")
    add("--memory-gib", type=float, default=0.0, help="memory of one device")
    add("--corpus-tokens", type=float, help="tokens of a corpus that is not made yet, such as 1.6e11")
    add("--vocab-size", type=int, help="ids of the tokenizer of a corpus that is not made yet")
    add("--paper-table", action="store_true", help="the paper's FLOPs beside ours, instead of a plan of a run")
    add("--json", metavar="FILE", help="write the plan, or that table, there, too")
    return parser.parse_known_args(arguments)


@command("plan.py: error", status=2)  # as in pretrain_bliss.py
def main(arguments: list[str] | None = None) -> int:
    """Print the plan; returns the exit status."""
    options, others = parse_arguments(arguments)
    if options.paper_table:
        return print_paper_table(options.json, others)
    config = parse_options(others)  # a wrong one ends the program, as it would end the run
    check_options(config)

    from megatron_bliss.plan.plan import Machine, make_plan  # after parsing: importing megatron-core takes seconds
    from megatron_bliss.plan.text import format_plan

    machine = Machine(
        world_size=options.world_size,
        device=options.device,
        peak_tflops=options.peak_tflops or config.logging.device_peak_tflops,
        mfu=options.mfu,
        proxy_mfu=options.proxy_mfu,
        memory_gib=options.memory_gib,
    )
    tokens = None if options.corpus_tokens is None else int(options.corpus_tokens)
    plan = make_plan(config, machine, corpus_tokens=tokens, vocab_size=options.vocab_size)
    _write(options.json, plan)
    print(format_plan(plan))
    return 0


def print_paper_table(json_file: str | None, others: list[str]) -> int:
    """The paper's FLOPs beside those of the example configurations; returns the exit status."""
    if others:
        raise ValueError(
            f"found {' '.join(others)} beside --paper-table, expected no options of a run, since the table is of the "
            "examples: take one of the two away"
        )
    from megatron_bliss.plan.paper import ARM, PUBLISHED, paper_table
    from megatron_bliss.plan.paper import EXAMPLES as NAMES
    from megatron_bliss.plan.paper_text import format_paper_table
    from megatron_bliss.plan.plan import Machine, make_plan

    plans = {}
    for size, name in NAMES.items():
        files = [EXAMPLES / name / "config.yaml", EXAMPLES / "c4" / "paper.yaml"]
        given = [argument for file in files for argument in ("--config", str(file))]
        plans[size] = make_plan(parse_options([*given, "--arms", f"{ARM},{PUBLISHED}"]), Machine(world_size=1))
    table = paper_table(plans)
    _write(json_file, table)
    print(format_paper_table(table))
    return 0


def _write(file: str | None, content: dict) -> None:
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)


if __name__ == "__main__":
    sys.exit(main())
