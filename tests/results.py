"""Results of tasks, as an evaluation writes them."""

from __future__ import annotations


def result(values: dict[str, float], items: int = 400, **changes) -> dict:
    tasks = {
        name: {
            "metric": "acc" if name == "boolq" else "acc_norm", "value": value, "stderr": 0.02, "num_items": items,
            "metrics": {"acc": value}, "data": {"file": f"{name}.jsonl", "sha256": "0" * 64, "known": name != "mine"},
        }
        for name, value in values.items()
    }  # fmt: skip
    average = sum(values.values()) / len(values)
    return {"format": 1, "lm_eval_version": "0.4.13", "tasks": tasks, "average": average,
            "average_tasks": list(values), **changes}  # fmt: skip
