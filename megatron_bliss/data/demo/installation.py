"""The text of a Python installation: prose from documentation, licences, and source code without its documentation.

Everything is a function of the installed files: paths are walked in sorted order and no clock or hash seed is used.
"""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PYTHON, HEADERS, DOCUMENTS = (".py", ".pyi", ".pyx"), (".h", ".hpp"), (".txt", ".rst", ".md")
LARGEST_FILE = 800_000
LONGEST_PARAGRAPH = 2500
DOCSTRING = re.compile(r'[rRuUbB]?"""(.*?)"""|[rRuUbB]?\'\'\'(.*?)\'\'\'', re.DOTALL)
BLOCK_COMMENT = re.compile(r"/\*[*!]?(.*?)\*/", re.DOTALL)
LINE_COMMENTS = re.compile(r"(?:^[ \t]*//[^\n]*\n){2,}", re.MULTILINE)
COMMENT_MARK = re.compile(r"^[ \t]*(?:\*|///?!?) ?", re.MULTILINE)
BLANK_LINES = re.compile(r"\n[ \t]*\n")
LEGAL = re.compile(
    r"\b(?:copyright|(?:sub)?licen[cs]e[sder]*|licensors?|warrant[a-z]*|redistribut[a-z]*|liab[a-z]*|damages|herein"
    r"|hereby|without limitation|all rights reserved|trademarks?|permission)\b",
    re.IGNORECASE,
)
LEGAL_FILE = re.compile(r"licen[cs]e|copying|notice|copyright|\beula", re.IGNORECASE)
ROLE = re.compile(r":[a-zA-Z:+]+:`[~!]?([^`<]*?)(?:\s*<[^>`]*>)?`")
LITERAL = re.compile(r"`+[~!]?([^`]*)`+_*")
EMPHASIS = re.compile(r"\*\*?([^*\s][^*]*)\*\*?")
SECTION = re.compile(r"^(?:Args?|Arguments|Parameters|Returns?|Yields|Raises|Notes?|Warning|Examples?):? (?=[A-Z])")
WORD = re.compile(r"[A-Za-z']+")
SYMBOLS = re.compile(r"[_=\\/{}|<>\[\]@#~^$]")
FREQUENT = (
    "the of a an to is in and or for that this be are as if it by with from on not which can will when at has have was "
    "were but all any one its their these those you we they there so than then into only also no more may must should"
)
COMMON_WORDS = frozenset(FREQUENT.split())


@dataclass
class InstallationText:
    """What was found: paragraphs of prose per folder, licence texts, Python source; each with the path it is from."""

    prose: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # folder -> [(path, paragraph)]
    licences: list[tuple[str, str]] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)


def installed_files() -> Iterator[tuple[str, str]]:
    """(name, path) of the standard library's and installed packages' text files, in sorted order."""
    folders = sysconfig.get_paths()
    for label, root in (("stdlib", folders["stdlib"]), ("packages", folders["purelib"])):
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if name not in ("__pycache__", "site-packages"))
            for name in sorted(files):
                path = os.path.join(folder, name)
                if _is_text(name) and os.path.getsize(path) <= LARGEST_FILE:
                    yield f"{label}/{Path(path).relative_to(root).as_posix()}", path


def read_installation(max_code_bytes: int) -> InstallationText:
    """Walk the installation once; prose and licences are taken whole, code until ``max_code_bytes`` are found."""
    found, seen, sources = InstallationText(), set(), {}
    for name, path in installed_files():
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # not text, or not ours to read: there is enough without it
        if LEGAL_FILE.search(Path(name).name) and not name.endswith(PYTHON):
            found.licences.append((name, text))
            continue
        for part in documentation(name, text):
            _sort_paragraphs(name, part, found, seen)
        if name.endswith(".py") and "/test" not in name:
            sources[name] = path
    found.code = _read_code(sources, max_code_bytes)
    for topic, text in _language_reference().items():
        _sort_paragraphs(f"stdlib/pydoc_data/{topic}", text, found, seen)
    return found


def documentation(name: str, text: str) -> list[str]:
    """The documentation inside a file: docstrings, block comments of C headers, or all of a document."""
    if name.endswith(PYTHON):
        return [inspect.cleandoc(double or single) for double, single in DOCSTRING.findall(text)]
    if name.endswith(HEADERS):
        comments = BLOCK_COMMENT.findall(text) + LINE_COMMENTS.findall(text)
        return [COMMENT_MARK.sub("", comment) for comment in comments]
    if name.endswith("METADATA"):
        return [text.partition("\n\n")[2]]
    return [text]


def without_documentation(source: str) -> str:
    """Python source without docstrings and comment lines, so that no documentation is left in it."""
    source = re.sub(r"^[ \t]*#[^\n]*\n", "", DOCSTRING.sub("", source), flags=re.MULTILINE)
    return re.sub(r"\n([ \t]*\n)+", "\n\n", source).strip()


def clean_paragraph(paragraph: str) -> str:
    """One paragraph on one line, without the marks of reStructuredText and Markdown."""
    line = SECTION.sub("", " ".join(paragraph.split()))
    for mark in (ROLE, LITERAL, EMPHASIS):
        line = mark.sub(r"\1", line)
    return line.removeprefix("- ").removeprefix("* ")


def is_prose(line: str) -> bool:
    """Whether a cleaned paragraph reads as English sentences rather than as markup, code or a list."""
    if len(line) < 80 or not line[0].isupper() or line[-1] not in ".!?" or ">>>" in line or "---" in line:
        return False
    words = WORD.findall(line)
    if len(words) < 12 or len(SYMBOLS.findall(line)) > len(words) / 12:
        return False
    common = sum(word.lower() in COMMON_WORDS for word in words)
    letters = sum(map(len, words)) + line.count(" ")
    return common >= 0.28 * len(words) and letters >= 0.88 * len(line)


def _sort_paragraphs(name: str, text: str, found: InstallationText, seen: set[str]) -> None:
    for paragraph in BLANK_LINES.split(text):
        paragraph = paragraph.strip()
        if not 80 <= len(paragraph) <= LONGEST_PARAGRAPH or paragraph[-1] not in ".!?":
            continue
        line = clean_paragraph(paragraph)
        if not is_prose(line):
            continue
        key = "".join(WORD.findall(line)).lower()
        if key in seen:
            continue
        seen.add(key)
        legal_words = len(LEGAL.findall(line))
        if legal_words >= 2:
            found.licences.append((name, line))
        elif not legal_words:  # one such word alone says nothing
            found.prose.setdefault(os.path.dirname(name), []).append((name, line))


def _read_code(sources: dict[str, str], max_bytes: int) -> list[tuple[str, str]]:
    """Source files from all over the installation, in an order given by their names' checksums."""
    code, size = [], 0
    for name in sorted(sources, key=lambda name: (zlib.crc32(name.encode()), name)):
        if size >= max_bytes:
            break
        code.append((name, without_documentation(Path(sources[name]).read_text(encoding="utf-8"))))
        size += len(code[-1][1])
    return code


def _is_text(name: str) -> bool:
    return name.endswith((*PYTHON, *HEADERS, *DOCUMENTS)) or name == "METADATA" or bool(LEGAL_FILE.search(name))


def _language_reference() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return {}
    return dict(sorted(topics.items()))
