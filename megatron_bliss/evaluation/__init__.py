"""Zero-shot evaluation: lm-eval's tasks on local files, over the target in its own parallel layout and other models.

Nothing of lm-eval is imported before one of these names is used: it is an optional extra of this package.
"""

from importlib import import_module

_HOMES = {
    "evaluate_tasks": "harness",
    "TargetModel": "target_model",
    "ProxyModel": "plain_models",
    "HuggingFaceModel": "plain_models",
    "TASK_NAMES": "data_files",
    "find_tasks": "data_files",
    "read_task": "data_files",
    "write_checksums": "data_files",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("lm_eval", "datasets", "transformers"):
            raise ImportError(
                f"evaluation needs {error.name}, which is not installed: pip install 'megatron_bliss[eval]'"
            ) from error
        raise
