import numpy as np

from megatron_bliss.data.compare import domain_shares


def test_domain_shares():
    assert domain_shares(np.array([1, 0, 0, 3]), ["a", "b", "none", "c"]) == {"a": 0.5, "b": 0.25, "c": 0.25}
    assert list(domain_shares(np.array([2, 1, 1, 0]), ["z", "y", "x"])) == ["y", "x", "z"]
    assert domain_shares(np.zeros(0, np.int64), ["a"]) == {}
