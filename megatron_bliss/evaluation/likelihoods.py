"""How likely a model finds the right answers: bits per byte, which tells models apart that accuracy cannot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from lm_eval.api.task import ConfigurableTask


def bits_per_byte(task: ConfigurableTask, samples: Sequence[Mapping]) -> tuple[float, float]:
    """Mean over a task's items of -log2 p(right continuation) / its bytes in UTF-8, and its standard error.

    samples: of lm-eval's evaluator, with ``doc``, ``arguments`` [(context, continuation)] and ``filtered_resps``
    [(log-likelihood, greedy)]. The bytes are those of the continuation as the task asks for it, with the space before
    it. Where the choices are contexts (winogrande), the continuation is that behind the right one.
    """
    values = []
    for sample in samples:
        number = right_answer(task, sample["doc"])
        (_, continuation), (log_likelihood, _) = sample["arguments"][number], sample["filtered_resps"][number]
        values.append(-log_likelihood / math.log(2) / len(continuation.encode("utf-8")))
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def right_answer(task: ConfigurableTask, item: Mapping) -> int:
    """Which of an item's requests is the right one: the only one, where there are no choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0
    gold = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
    return gold if isinstance(gold, int) else task.doc_to_choice(item).index(gold)
