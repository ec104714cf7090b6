"""Import everything that ``make setup`` installs, and say which Python and torch this environment has.

  python tools/check_setup.py [EXTRA ...]

EXTRA: extras of setup.py that have to be there, too (default: none). Ends with status 1 and what to do where a package
is missing, is of a version that setup.py does not take, or does not import.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement

from megatron_bliss.base.command import command

PACKAGE = "megatron_bliss"


def requirements(extras: Iterable[str]) -> list[Requirement]:
    """What setup.py asks for on this machine, with the given extras."""
    found = [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    environments = [{"extra": extra} for extra in ("", *extras)]
    return [one for one in found if one.marker is None or any(one.marker.evaluate(env) for env in environments)]


def problem(requirement: Requirement, modules: dict[str, list[str]]) -> str | None:
    """What is wrong with one requirement, or None. modules: distribution → names that can be imported."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}, expected {requirement.specifier}"
    for name in modules.get(requirement.name.lower().replace("-", "_"), []):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken installation raises
            return f"{requirement.name} {version} does not import: {type(error).__name__}: {error}"
    return None


def importable() -> dict[str, list[str]]:
    """{distribution: names that can be imported from it}, both with underscores."""
    found: dict[str, list[str]] = {}
    for name, distributions in metadata.packages_distributions().items():
        if name.isidentifier() and not name.startswith("_"):
            for distribution in set(distributions):
                found.setdefault(distribution.lower().replace("-", "_"), []).append(name)
    return found


def describe() -> str:
    """Python, torch's build and what it sees, megatron-core."""
    import torch

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    seen = torch.cuda.device_count()
    devices = f"{seen} GPU{'s' if seen > 1 else ''}" if seen else "no GPU in sight"
    versions = f"torch {torch.__version__} ({build}, {devices}), megatron-core {metadata.version('megatron-core')}"
    return f"Python {sys.version.split()[0]}, {versions}"


@command("setup", errors=())
def main(extras: list[str]) -> int:
    """Print what is wrong, or what is there; returns the exit status."""
    warnings.simplefilter("ignore")
    modules = importable()
    problems = [found for found in (problem(one, modules) for one in requirements(extras)) if found]
    for found in problems:
        print(f"setup: {found}", file=sys.stderr)
    if problems:
        print("setup: remove .venv and run `make setup` again; README.md, 'On GPUs', has other builds", file=sys.stderr)
        return 1
    print(f"ready: {describe()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
