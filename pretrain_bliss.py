#!/usr/bin/env python3
"""Pre-train a target LLM on the data that BLISS selects: ``torchrun pretrain_bliss.py --config FILE``."""

import sys

from megatron_bliss.arguments import check_layout, parse_arguments


def main() -> int:
    """Parse the options, join the process groups, run the rounds, leave."""
    try:
        config = parse_arguments()
    except ValueError as error:
        print(f"pretrain_bliss.py: error: {error}", file=sys.stderr)
        return 2

    from megatron_bliss import parallel, rounds  # after parsing: importing megatron-core takes seconds

    groups = parallel.initialize(config.platform, config.target, config.seed)
    try:
        check_layout(config, world_size=groups.world_size, data_parallel_size=groups.data_parallel_size)
        rounds.run(config, groups)
    finally:
        parallel.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
