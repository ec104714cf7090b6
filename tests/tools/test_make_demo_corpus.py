import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_bliss.data import cloze
from megatron_bliss.data.demo import domains, installation

MODULES = (
    "argparse.py",
    "shutil.py",
    "turtle.py",
    "optparse.py",
    "logging",
    "email",
    "asyncio",
    "json",
    "tkinter",
    "unittest",
)
SCRIPT = """
import sys, sysconfig
root = sys.argv[1]
sysconfig.get_paths = lambda: {"stdlib": root + "/stdlib", "purelib": root + "/packages"}
from tools.make_demo_corpus import main
sys.exit(main(["--output", sys.argv[2], "--megabytes", "0.5", "--files", "2"]))
"""


@pytest.fixture(scope="module")
def small_installation(tmp_path_factory):
    """A few modules of the standard library and a licence, as if they were all that is installed."""
    root = tmp_path_factory.mktemp("installation")
    for name in MODULES:
        source, target = Path(sysconfig.get_paths()["stdlib"]) / name, root / "stdlib" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "test*"))
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    licence = root / "packages/thing.dist-info/LICENSE"
    licence.parent.mkdir(parents=True)
    licence.write_text("Permission is hereby granted, free of charge, without warranty of any kind.\n" * 60)
    return root


def run(root, output, hash_seed):
    """Make a corpus in a process of its own; returns what it printed."""
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", SCRIPT, str(root), str(output)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def made(small_installation, tmp_path_factory):
    """A small corpus; its folder and what was printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(small_installation, folder, 1)


def read(folder, pattern):
    """Records of the files that match."""
    return [json.loads(line) for path in sorted(folder.glob(pattern)) for line in gzip.open(path)]


def test_the_same_files_every_time(small_installation, made, tmp_path):
    run(small_installation, tmp_path, 2)
    names = sorted(path.name for path in made[0].iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir()) and len(names) == 6
    for name in names:
        assert (made[0] / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_pool_holds_every_domain_in_quantity_and_mixed(made):
    folder, printed = made
    records = read(folder, "pool-*.jsonl.gz")
    names = ["prose", "code", "licence", "table", "boilerplate", "encoded", "shuffled", "mojibake"]
    assert {record["domain"] for record in records} == set(names) and all(name in printed for name in names)
    assert all(set(record) == {"text", "url", "timestamp", "domain"} and record["text"].strip() for record in records)
    assert [record["domain"] for record in records[:40]] != sorted(record["domain"] for record in records[:40])
    sizes = {name: sum(len(record["text"]) for record in records if record["domain"] == name) for name in names}
    assert sizes["prose"] > 50_000 and min(sizes.values()) > 5_000


def test_held_out_prose_is_nowhere_in_the_pool(made):
    folder, _ = made
    paragraphs = {part for record in read(folder, "pool-*") for part in record["text"].split("\n\n")}
    words = {" ".join(sorted(record["text"].split())) for record in read(folder, "pool-*")}
    held_out = {name: read(folder, f"{name}.jsonl.gz") for name in ("validation", "heldout", "heldout_cloze")}
    assert all(held_out.values())
    for record in held_out["validation"] + held_out["heldout"]:
        assert not paragraphs & set(record["text"].split("\n\n"))
        assert " ".join(sorted(record["text"].split())) not in words
    assert not {r["text"] for r in held_out["validation"]} & {r["text"] for r in held_out["heldout"]}


def test_the_other_set_holds_what_is_no_prose_and_not_in_the_pool(made):
    folder, printed = made
    other = read(folder, "heldout_other.jsonl.gz")
    assert {record["domain"] for record in other} == {"code", "table"} and "heldout_other" in printed
    assert not {record["text"] for record in other} & {record["text"] for record in read(folder, "pool-*.jsonl.gz")}
    assert 4_000 < sum(len(record["text"]) for record in other) < 25_000


def test_cloze_passages_end_in_a_word_that_was_there_before(made):
    passages = read(made[0], "heldout_cloze.jsonl.gz")
    assert len(passages) >= 3
    for record in passages:
        words = record["text"].split()
        assert 40 <= len(words) <= 80 and words[-1].isalpha() and words[-1].islower()
        assert words[-1] in record["text"].lower()[: -len(words[-1])]


def test_cloze_takes_no_answer_that_cannot_be_known():
    sentence = "The gardener looked at the old tree that stood beside the wall of the garden and said nothing at all. "
    assert list(cloze.passages(sentence * 2 + "Then he cut down the tree.")) == [
        sentence * 2 + "Then he cut down the tree"
    ]
    assert list(cloze.passages(sentence * 2 + "Then he went away to Paris.")) == []


def test_code_holds_no_documentation():
    source = 'def f(x):\n    """Say what f does."""\n    # and how\n    return x + 1\n'
    assert installation.without_documentation(source) == "def f(x):\n\n    return x + 1"
    assert installation.documentation("a.py", source) == ["Say what f does."]


def test_sentences_are_prose_and_code_and_tables_are_not():
    line = "The function returns the first of the values that are larger than the limit, or nothing if there are none."
    assert installation.is_prose(line)
    for other in (
        line[:60],
        line.lower(),
        line[:-1],
        "x = f(y); " * 12 + "The end.",
        "Name Type Default Size Unit " * 6 + "Ok.",
    ):
        assert not installation.is_prose(other)
    marked = "The :func:`~os.path.join` function of ``os`` is *not*\n   the one you **want** here."
    assert installation.clean_paragraph(marked) == "The os.path.join function of os is not the one you want here."


def test_damaged_text_keeps_no_readable_sentence():
    generator = random.Random(0)
    text = "The quick brown fox jumps over the lazy dog, and nobody knows where it has gone since then. " * 8
    [(_, mixed)] = domains.shuffled([("a", text)], generator)
    assert sorted(mixed.split()) == sorted(text.split()) and mixed != text
    for name, misread in domains.MISREADINGS.items():
        broken = misread(text, generator)
        assert sum(not character.isascii() for character in broken) > 0.1 * len(broken), name
        json.dumps(broken).encode("utf-8")
    documents = domains.encoded([("a", text)], generator)
    for _ in range(20):
        encoded = next(documents)[1]
        assert max(map(len, encoded.split(" "))) >= 4 and "the" not in encoded.split()
