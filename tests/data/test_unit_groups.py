"""Units by the most frequent values of a provenance column, in the order of a subset, and the rest together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.data.compare import shares_of
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.subset import write_subset
from megatron_bliss.data.unit_groups import MOST_GROUPS, group_units


def corpus(folder: Path, domains: list[str | None]) -> str:
    """One unit for each of ``domains``."""
    records = [{"text": f"unit {n}"} | ({} if name is None else {"domain": name}) for n, name in enumerate(domains)]
    (folder / "pool.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    preprocess(PreprocessSettings([str(folder / "pool.jsonl")], str(folder / "pool"), tokenizer_type="bytes"))
    return str(folder / "pool")


def test_units_of_a_subset_have_the_groups_of_their_domains(tmp_path: Path) -> None:
    domains = ["a", None, "b", "a", "<script>", None, "b", "a"]
    prefix = corpus(tmp_path, domains)
    subset = write_subset(prefix, np.array([1, 2, 4, 7]), tmp_path, label="some")
    groups = group_units(subset, "domain", list(shares_of(prefix)))
    assert groups.names == ("a", "b", "unknown", "<script>") and groups.codes.dtype == np.int8
    assert [groups.names[code] for code in groups.codes] == ["unknown", "b", "<script>", "a"]


def test_rare_values_are_one_group(tmp_path: Path) -> None:
    count = MOST_GROUPS + 100
    domains = [f"d{number:03}" for number in range(count) for _ in range(1 + (number < MOST_GROUPS))]
    prefix = corpus(tmp_path, domains)
    groups = group_units(prefix, "domain", list(shares_of(prefix)))
    assert groups.names == (*(f"d{number:03}" for number in range(MOST_GROUPS)), "other")
    assert (groups.codes == MOST_GROUPS).sum() == 100
    frequent = write_subset(prefix, np.arange(2 * MOST_GROUPS), tmp_path, label="frequent")
    same = group_units(frequent, "domain", list(shares_of(prefix)))
    assert same.names == groups.names[:-1]  # no unit is of another group


def test_a_domain_of_the_name_of_the_rest_is_of_it(tmp_path: Path) -> None:
    prefix = corpus(tmp_path, ["other", "other", *(f"d{number:03}" for number in range(MOST_GROUPS + 5))])
    groups = group_units(prefix, "domain", list(shares_of(prefix)))
    assert groups.names[0] == "other" and len(groups.names) == len(set(groups.names)) == MOST_GROUPS
    assert (groups.codes == 0).sum() == 2 + 6


def test_a_corpus_without_domains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no unit of .* has a domain"):
        group_units(corpus(tmp_path, [None, None]), "domain", [])
