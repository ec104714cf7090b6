"""Text from outside stays text."""

from megatron_bliss.report.parts import escape


def test_escape_makes_attributes_safe():
    assert escape("\"'<>&\x00\n") == "&quot;&#x27;&lt;&gt;&amp; \n"
