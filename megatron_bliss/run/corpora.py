"""The corpora of a run: shards to choose from, the guide, held-out sets, what is blended in.

All that is cut from the corpus are index views in ``RUN/shards``; no token is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_bliss.base.parallel import broadcast_object, failing_together
from megatron_bliss.bilevel.guide_weightings import GUIDE_WEIGHTINGS
from megatron_bliss.config.data import DataConfig
from megatron_bliss.data.batches import BatchSource, open_labelled
from megatron_bliss.data.compare import shares_of
from megatron_bliss.data.deal import deal_shards
from megatron_bliss.data.guide import GuideSets
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.data.provenance import provenance_codes
from megatron_bliss.data.splits import PARTS, parse_split, split_bounds
from megatron_bliss.data.subset import write_subset
from megatron_bliss.data.unit_groups import UnitGroups, group_units
from megatron_bliss.run.session import Session, derive_seed

PROVENANCE_FIELDS = ("domain", "format", "label")
"""Columns of the provenance by which selections are described."""


def make_shards(session: Session, folder: Path) -> dict:
    """Split the corpus, and deal what is chosen from to rounds + 1 disjoint shards; the first is the warm-up's."""
    data, rounds, seed = session.config.data, session.config.rounds, derive_seed(session.config.seed, "shards")
    prefixes, parts = [], {}
    with failing_together(session.groups):
        if session.groups.is_main:
            bounds, dealt = deal_units(data, rounds, session.config.seed)
            for number, ids in enumerate(dealt):
                policy = {"name": "shard", "number": number, "of": rounds + 1, "by": data.shard_by, "seed": seed}
                prefixes.append(write_subset(data.train_prefix, ids, folder, label=f"shard{number}", policy=policy))
            for name, first, last in zip(PARTS[1:], bounds, bounds[1:], strict=False):
                if last > first:
                    policy = {"name": "split", "part": name, "split": data.split}
                    part = write_subset(data.train_prefix, np.arange(first, last), folder, label=name, policy=policy)
                    parts[name] = Path(part).name
    names = [Path(prefix).name for prefix in prefixes]
    return {"prefixes": names, "parts": parts, "domains": shares_by_field(data.train_prefix)}


def deal_units(data: DataConfig, rounds: int, seed: int) -> tuple[list[int], list[np.ndarray]]:
    """Where each part of the corpus ends (see ``split_bounds``), and the units of each of the rounds + 1 shards."""
    num_units = read_manifest(data.train_prefix)["counts"]["units"]
    bounds = split_bounds(num_units, parse_split(data.split))
    if bounds[0] <= rounds:
        raise ValueError(
            f"found {bounds[0]} units to choose from in {data.train_prefix}, expected at least one for each "
            f"of {rounds + 1} shards: give a larger corpus, or change data.split or rounds"
        )
    files = provenance_codes(data.train_prefix, "file")[0][: bounds[0]] if data.shard_by == "file" else None
    return bounds, deal_shards(bounds[0], rounds + 1, by=data.shard_by, seed=derive_seed(seed, "shards"), files=files)


def shares_by_field(prefix: str) -> dict[str, dict[str, float]]:
    """{provenance field: {value: share of units}} of a corpus; empty where it does not know its sources."""
    shares = {field: shares_of(prefix, field) for field in PROVENANCE_FIELDS}
    return {field: share for field, share in shares.items() if share}


def shard_prefix(session: Session, round_number: int) -> str:
    """The shard of a round (0: the warm-up's)."""
    folder = session.folder.path / "shards"
    return str(folder / session.folder.require(folder, "any other stage")["prefixes"][round_number])


def shard_domains(session: Session, round_number: int) -> UnitGroups | None:
    """The domains of a round's shard, in all rounds the same: the most frequent of the whole corpus, and the rest.

    None where the corpus knows no domains, or a single one. The file is read by the main rank; collective.
    """
    folder = session.folder.path / "shards"
    shares = session.folder.require(folder, "any other stage").get("domains", {}).get(PROVENANCE_FIELDS[0], {})
    if len(shares) < 2:
        return None
    found = None
    with failing_together(session.groups):
        if session.groups.is_main:
            found = group_units(shard_prefix(session, round_number), PROVENANCE_FIELDS[0], list(shares))
    return broadcast_object(found, session.groups)


def open_guide(session: Session) -> BatchSource:
    """What says what is wanted: the sets given, or the corpus's own part."""
    data, prefixes = session.config.data, _guide_prefixes(session)
    if len(prefixes) == 1:
        return open_labelled(prefixes[0], data.seq_length, session.vocab_size)
    return _open_sets(session, prefixes, data.guide_weights)


def open_upper_level(session: Session, guide_weighting: str) -> BatchSource:
    """What the upper level is solved on: the guide, and behind it what a control holds it against, with weights 0."""
    if not GUIDE_WEIGHTINGS[guide_weighting].against_control:
        return open_guide(session)
    guide, references = _guide_prefixes(session), session.config.data.reference_prefixes
    weights = [*(session.config.data.guide_weights or [1.0] * len(guide)), *[0.0] * len(references)]
    return _open_sets(session, [*guide, *references], weights)


def test_prefixes(session: Session) -> list[str]:
    """Held-out sets of the guide's kind: those given, or the corpus's own part."""
    return session.config.data.test_prefixes or [_part(session, "test")]


def held_out_prefixes(session: Session) -> list[str]:
    """Sets on which every arm is measured: of the guide's kind, then those that the guide does not speak for."""
    return [*test_prefixes(session), *session.config.data.other_prefixes]


def _guide_prefixes(session: Session) -> list[str]:
    return session.config.data.guide_prefixes or [_part(session, "validation")]


def _open_sets(session: Session, prefixes: Sequence[str], weights: Sequence[float]) -> GuideSets:
    sets = [open_labelled(prefix, session.config.data.seq_length, session.vocab_size) for prefix in prefixes]
    return GuideSets(sets, [Path(prefix).name for prefix in prefixes], weights)


def _part(session: Session, name: str) -> str:
    folder = session.folder.path / "shards"
    return str(folder / session.folder.require(folder, "any other stage")["parts"][name])
