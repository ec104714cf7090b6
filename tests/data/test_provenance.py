"""What is known of units, as numbers."""

import numpy as np
import pytest

from megatron_bliss.data.compare import shares_of
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.provenance import provenance_codes
from megatron_bliss.data.subset import write_subset
from tests.data.corpora import write_corpus, write_lines


def test_provenance_becomes_codes_and_names_for_the_units_of_a_subset(tmp_path):
    domains = ["b", "a", "a", None, "b", "a"]
    rows = [{"text": f"text {n}", **({"domain": domain} if domain else {})} for n, domain in enumerate(domains)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    preprocess(PreprocessSettings(inputs=[source], output_prefix=str(tmp_path / "X"), tokenizer_type="bytes"))
    for prefix, ids in (
        (str(tmp_path / "X"), np.arange(6)),
        (write_subset(tmp_path / "X", [2, 3, 4], tmp_path, label="some"), np.array([2, 3, 4])),
    ):
        codes, names = provenance_codes(prefix, "domain")
        assert [names[code] for code in codes] == [domains[unit] or "unknown" for unit in ids]
    assert shares_of(prefix) == {"a": 1 / 3, "b": 1 / 3, "unknown": 1 / 3} and shares_of(prefix, "format") == {}
    with pytest.raises(ValueError, match="no column 'colour', expected one of file, line"):
        provenance_codes(prefix, "colour")
    write_corpus(tmp_path / "Y", [2, 2])
    assert shares_of(tmp_path / "Y") == {}
    with pytest.raises(ValueError, match="so no unit's domain is known"):
        provenance_codes(tmp_path / "Y", "domain")
