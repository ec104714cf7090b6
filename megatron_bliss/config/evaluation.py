"""What the target is measured by: the section ``evaluation``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from megatron_bliss.config.bounds import bounded


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss of the target on data.test_prefixes, and its zero-shot results on tasks."""

    micro_batch_size: int = bounded(16, minimum=1)
    """Samples of one forward pass over a test set."""
    max_samples: int = bounded(0, minimum=0)
    """Samples used per test set (0: all)."""
    tasks: list[str] = field(default_factory=list)
    """Tasks on which the target is evaluated after its warm-up and each round: lm-eval's sciq, arc_easy, arc_challenge,
    logiqa, openbookqa, boolq, hellaswag, piqa, winogrande, lambada_openai, or your own by the names of their files."""
    data_dir: str = ""
    """Folder of the tasks' data files, made by tools/prepare_evaluation.py."""
    tokenizer_model: Optional[str] = None
    """Tokenizer file of the tasks (default: the one recorded in the corpus's manifest, where it still lies there)."""
    limit: int = bounded(0, minimum=0)
    """Items used per task, the first ones (0: all)."""
    batch_tokens: int = bounded(16384, minimum=1)
    """Tokens of one forward pass of one model replica over tasks, padding included."""
    allow_unknown_data: bool = False
    """Take copies of lm-eval's ten sets that are neither the known ones nor recorded in data_dir's checksums.json."""
