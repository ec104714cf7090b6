"""Numbers and tables as people write them."""

import pytest

from megatron_bliss.base.text import format_bytes, format_flops, format_seconds


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0:00"), (44, "0:44"), (725, "12:05"), (10964, "3:02:44"), (184200, "2d 03:10:00")]
)
def test_durations_read_as_people_write_them(seconds, text):
    assert format_seconds(seconds) == text


def test_sizes_and_operations_have_a_unit_or_a_dash():
    assert [format_bytes(b) for b in (None, 700 * 2**20, 3 * 2**29)] == ["-", "700 MiB", "1.5 GiB"]
    assert [format_flops(f) for f in (None, 0, 5e6, 1.5e15)] == ["-", "-", "5.0 MFLOP", "1.5 PFLOP"]
