"""What a study compares, as its YAML file says: arms under variants of a run's options, over paired seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_bliss.study.options import merged, nested, swept_name, swept_variants

KEYS = ("base", "arms", "variants", "seeds", "control", "longer", "processes", "agreement", "sweep")
"""What the file may hold."""
SET_BY_STUDY = ("config", "run_folder", "seed", "stage", "round", "arm")
"""Options of a run that no variant can have."""
ONE_VARIANT = {"base": {}}
"""The variants of a study that names none."""
LONGER = "longer-"
"""Begins the name of the variant in which one arm alone trains on."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Study:
    """Which runs a study makes, and what it holds every arm against."""

    base: dict[str, Any]
    """Options of all runs, nested as in a run's YAML file."""
    arms: list[str]
    """Arms of a variant that names none."""
    variants: dict[str, dict[str, Any]]
    """Variant -> the options that it changes; ``arms`` among them where it has its own."""
    seeds: list[int]
    control: str
    """VARIANT/ARM."""
    longer: dict[str, str]
    """Arm -> VARIANT/ARM: cheap arms that train on, for as many FLOPs as others take with their selection."""
    processes: int
    """Of each run."""
    agreement: list[str]
    """VARIANT/ARM: those whose scores are held against each other."""
    sweep: dict[str, Any]
    """{"option": name, "series": {variant: the one it was made of}} of variants that ``sweep`` makes; else empty."""

    def arms_of(self, variant: str) -> list[str]:
        """The arms that a variant runs."""
        return self.variants[variant].get("arms", self.arms)

    def is_control(self, variant: str, arm: str) -> bool:
        """Whether this is the arm that all others are held against."""
        return f"{variant}/{arm}" == self.control

    def is_reference(self, variant: str, arm: str) -> bool:
        """Whether other arms are held against this one: the control, and the control's arm that trains on."""
        return f"{variant}/{arm}" in (self.control, self.longer.get(self.control.split("/")[1]))

    def to_yaml(self) -> str:
        """The study as it was understood."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


def read_study(path: Path | str, seeds: Sequence[int] | None = None) -> Study:
    """Read a study's file; ``seeds`` stand over those in it. ValueError says what to change."""
    path = Path(path)
    content = _read_mapping(path)
    unknown = [str(key) for key in content if key not in KEYS]
    if unknown:
        raise ValueError(f"found {', '.join(unknown)} in {path}, expected only {', '.join(KEYS)}: change these keys")
    arms = _names(content.get("arms"), f"arms in {path}", "arms of a run, such as [bliss, random]")
    found_control = content.get("control", "random")
    variants, sweep = _variants(content.get("variants"), path), {}
    if "sweep" in content:
        option, values = _sweep(content["sweep"], path)
        start = variants if content.get("variants") is not None else {"": {}}
        sweep = {"option": option, "series": {swept_name(name, option, one): name for name in start for one in values}}
        made = swept_variants(option, values, start, arms, str(found_control).rpartition("/")[2])
        variants = _variants(made, path)
    control = _control(found_control, arms, variants, path)
    longer = _longer(content.get("longer"), variants[control.split("/")[0]], control.split("/")[1], path)
    variants |= longer
    found_seeds = list(seeds) if seeds is not None else content.get("seeds")
    study = Study(
        base=_base(content.get("base"), path),
        arms=arms,
        variants=variants,
        seeds=_seeds(found_seeds, path),
        control=control,
        longer={variant.removeprefix(LONGER): f"{variant}/{variant.removeprefix(LONGER)}" for variant in longer},
        processes=content.get("processes", 1),
        agreement=_agreement(content.get("agreement", False), arms, variants, control, path),
        sweep=sweep,
    )
    if type(study.processes) is not int or study.processes < 1:
        raise ValueError(f"found processes {study.processes!r} in {path}, expected 1 or more: change processes")
    return study


def _read_mapping(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"found no keys in {path}, expected options: a mapping with names and values")
    return content


def _base(found: object, path: Path) -> dict:
    """The options of all runs: those of the YAML files that ``config`` names, later over earlier, then the others."""
    options = _options({} if found is None else found, f"base of {path}", forbidden=(*SET_BY_STUDY[1:], "arms"))
    files, given = options.pop("config", []), {}
    for name in files if isinstance(files, list) else [files]:
        start = path.parent / str(name)
        if not start.is_file():
            raise ValueError(f"found no file {start}, expected the options that base.config in {path} names: change it")
        found_there = {
            name: value for name, value in _read_mapping(start).items() if name not in (*SET_BY_STUDY, "arms")
        }
        given = merged(given, nested(found_there))
    return merged(given, options)


def _options(found: object, place: str, forbidden: Sequence[str]) -> dict:
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"found {found!r} as {place}, expected options and their values: change it")
    for name in found:
        if name in forbidden:
            raise ValueError(f"found {name} in {place}, expected no {name}: the study sets it, take it out")
    return nested(found)


def _variants(found: object, path: Path) -> dict[str, dict]:
    if found is None:
        return dict(ONE_VARIANT)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"found variants {found!r} in {path}, expected names, each with options that it changes")
    for name in found:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith(LONGER):
            raise ValueError(
                f"found a variant {name!r} in {path}, expected letters, digits and _ . + - in its name (quoted, where "
                f"YAML would read a number), and no {LONGER} before it: it becomes a folder's name"
            )
    variants = {}
    for name, options in found.items():
        place = f"variant {name} in {path}"
        variants[name] = _options({} if options is None else options, place, forbidden=SET_BY_STUDY)
        if "arms" in variants[name]:
            variants[name]["arms"] = _names(variants[name]["arms"], f"arms of {place}", "arms of a run")
    return variants


def _sweep(found: object, path: Path) -> tuple[str, list]:
    """The option and its values."""
    values = next(iter(found.values())) if isinstance(found, dict) and len(found) == 1 else None
    is_list = isinstance(values, list) and all(isinstance(value, str | int | float) for value in values)
    if not is_list or len(set(map(str, values))) < max(2, len(values)):
        raise ValueError(
            f"found sweep {found!r} in {path}, expected one option with two or more different values, such as "
            "{bilevel.upper_iters: [25, 100]}: change sweep"
        )
    (option,) = found
    if not isinstance(option, str) or option in (*SET_BY_STUDY, "arms"):
        raise ValueError(f"found sweep of {option} in {path}, expected an option of a run: the study sets {option}")
    return option, values


def _names(found: object, place: str, expected: str) -> list[str]:
    """A list of different names."""
    is_list = isinstance(found, list) and all(isinstance(name, str) for name in found)
    if not is_list or not found or len(set(found)) < len(found):
        raise ValueError(f"found {found!r} as {place}, expected a list of different {expected}: change it")
    return list(found)


def _seeds(found: object, path: Path) -> list[int]:
    if not isinstance(found, list) or not found or not all(type(seed) is int and seed >= 0 for seed in found):
        raise ValueError(f"found seeds {found!r} for {path}, expected whole numbers from 0, such as [1, 2, 3]")
    if len(set(found)) < len(found):
        raise ValueError(f"found seeds {found} for {path}, expected each of them once: runs with one seed are the same")
    return list(found)


def _control(found: object, arms: list[str], variants: Mapping[str, Mapping], path: Path) -> str:
    """``ARM`` stands for that arm of the first variant that runs it."""
    places = _places(arms, variants)
    for place in places:
        if found in (place, place.split("/")[1]):
            return place
    raise ValueError(
        f"found control {found!r} in {path}, expected an arm that the study runs ({', '.join(places)}): set control, "
        "or add the arm to a variant"
    )


def _places(arms: list[str], variants: Mapping[str, Mapping]) -> list[str]:
    """Every VARIANT/ARM."""
    return [f"{variant}/{arm}" for variant, options in variants.items() for arm in options.get("arms", arms)]


def _agreement(found: object, arms: list[str], variants: Mapping[str, Mapping], control: str, path: Path) -> list[str]:
    """``true``: all arms but those of the control's name and those that train on."""
    places = _places(arms, variants)
    if found is True:
        found = [one for one in places if one.split("/")[1] != control.split("/")[1] and not one.startswith(LONGER)]
    elif found is False:
        return []
    named = _names(found, f"agreement in {path}", "VARIANT/ARM, or true for all arms")
    unknown = [name for name in named if name not in places]
    if unknown or len(named) < 2:
        raise ValueError(
            f"found agreement {named} in {path}, expected two or more that the study runs ({', '.join(places)}): "
            "change agreement"
        )
    return named


def _longer(found: object, options: Mapping[str, Any], control: str, path: Path) -> dict[str, dict]:
    """A variant for each arm that trains on: the control's options, and over them those of ``longer``."""
    if found is None:
        return {}
    if not isinstance(found, dict) or control not in found:
        raise ValueError(
            f"found longer {found!r} in {path}, expected arms, {control} among them, each with the options that make "
            "it train on, such as pretraining.train_iters: change longer"
        )
    variants = {}
    for arm, given in found.items():
        changed = _options(given, f"longer of {arm} in {path}", forbidden=(*SET_BY_STUDY, "arms"))
        variants[f"{LONGER}{arm}"] = merged(options, changed) | {"arms": [arm]}
    return variants
