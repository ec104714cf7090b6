"""The page as HTML: whole, escaped, without anything to load; the same page from a study.json alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_bliss.study.html import format_html
from tests.study.studies import run_tool

MARKDOWN = """# Arms <compared>

Loss of `near`, **bold & worse**, 1 < 2.

## At equal tokens

| arm | loss |
| --- | --- |
| hard/<script>alert(1)</script> | **+0.1** |

| arm | stage | time |
| --- | --- | ---: |
| a | b | 1 |

![a "title"](plot.png)
"""


class Tags(HTMLParser):
    """Raises where a tag is closed that is not the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(page: str) -> list[str]:
    parser = Tags()
    parser.feed(page)
    assert not parser.open
    return parser.seen


def test_what_a_page_is_made_of(tmp_path: Path) -> None:
    (tmp_path / "plot.png").write_bytes(b"picture")
    page = format_html(MARKDOWN, tmp_path, "<study>")
    assert "script" not in tags(page) and "<title>&lt;study&gt; - BLISS study</title>" in page
    assert "<h1>Arms &lt;compared&gt;</h1>" in page and "<h2>At equal tokens</h2>" in page
    assert '<p>Loss of <code>near</code>, <b class="worse">bold &amp; worse</b>, 1 &lt; 2.</p>' in page
    assert '<td class="label">hard/&lt;script&gt;alert(1)&lt;/script&gt;</td>' in page
    assert '<td class="number"><b class="worse">+0.1</b></td>' in page and "---" not in page.split("<main>")[1]
    assert '<td class="label">a</td><td class="label">b</td><td class="number">1</td>' in page
    assert '<img alt="a &quot;title&quot;" src="data:image/png;base64,cGljdHVyZQ==">' in page


def test_the_page_of_a_study_holds_all_that_it_shows(finished: Path) -> None:
    page, markdown = (finished / "study.html").read_text(), (finished / "study.md").read_text()
    seen = tags(page)
    assert seen.count("h2") == markdown.count("\n## ") > 2 and seen.count("img") == markdown.count("](") == 2
    assert seen.count("td") == sum(
        line.count(" | ") + 1 for line in re.findall(r"^\|(?! arm \|| --- |  \|).*", markdown, re.M)
    )
    assert not {"script", "link", "iframe"} & set(seen)
    assert not re.search(r'(src|href)="(?!data:)', page) and "default-src 'none'" in page


def test_pages_are_made_again_from_the_json_alone(finished: Path, tmp_path: Path) -> None:
    given = tmp_path / "mine.json"
    given.write_bytes((finished / "study.json").read_bytes())
    result = run_tool(None, tmp_path / "again", "--from", str(given))
    assert result.returncode == 0, result.stderr
    for name in ("study.json", "study.md", "headline.json"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()
    assert (tmp_path / "again/study.md").read_text() in result.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "expected a study's YAML file, or --from"),
        (["--from", "{folder}/x.json", "--plan"], "found options of runs with --from"),
        (["--from", "{folder}/x.json"], "found no control, longer, .* in .*x.json, expected a study.json"),
    ],
)
def test_what_is_no_study_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"seeds": [1]}))
    result = run_tool(None, tmp_path / "never", *(option.format(folder=tmp_path) for option in options))
    assert result.returncode in (1, 2) and re.search(message, result.stderr) and "Traceback" not in result.stderr
    assert not (tmp_path / "never").exists()
