#!/usr/bin/env python3
"""Pre-train a target LLM on the data that BLISS selects: ``torchrun pretrain_bliss.py --config FILE``."""

import os
import sys
import traceback

from megatron_bliss.run.checks import check_layout, parse_arguments


def main() -> int:
    """Parse the options, join the process groups, run the rounds, leave."""
    config = parse_arguments()

    from megatron_bliss.base import parallel
    from megatron_bliss.run import rounds  # after parsing: importing megatron-core takes seconds

    groups = parallel.initialize(config.platform, config.target, config.seed)
    sizes = {"world_size": groups.world_size, "data_parallel_size": groups.data_parallel_size}
    warnings = check_layout(config, **sizes)
    for warning in warnings if groups.is_main else []:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    rounds.run(config, groups)
    parallel.destroy()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:  # the user's to mend: what was found, what was expected, what to change
        rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"pretrain_bliss.py: error{rank}: {error}", file=sys.stderr)
        status = 2
    except Exception:
        traceback.print_exc()
        status = 1
    # At once: leaving NCCL's groups in order would wait for ranks in a collective that this one never joins.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
