"""Corpora and raw text through a scorer: the same bytes from one process, from many, and after kills."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.data.indexed import IndexedCorpus, write_index
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.manifest import adopt_manifest, read_manifest
from megatron_bliss.data.subset import write_subset
from megatron_bliss.data.tokenizers import BytesTokenizer
from megatron_bliss.scorers import corpus_job, text_job
from megatron_bliss.scorers.claims import Claims
from megatron_bliss.scorers.corpus_job import score_corpus
from megatron_bliss.scorers.folder import ScorerFolder, load_scorer, save_scorer
from megatron_bliss.scorers.job import WORK, Share
from megatron_bliss.scorers.ngrams import NgramForm, NgramScorer
from megatron_bliss.scorers.scorer import Scorer
from megatron_bliss.scorers.text_job import TextSettings, score_text

ROOT = Path(__file__).parents[2]
TOKENIZER = BytesTokenizer()
ALONE = Share()


@pytest.fixture
def scorer(tmp_path: Path) -> ScorerFolder:
    table = np.random.default_rng(1).normal(size=256).astype(np.float32)
    kept = Scorer(NgramScorer(NgramForm(2, 257, 256), table), 50, "mean", "document", False, {"arm": "bliss"})
    save_scorer(tmp_path / "scorer", kept, TOKENIZER.identity())
    return load_scorer(tmp_path / "scorer")


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 90, 500)
    with CorpusWriter(str(tmp_path / "corpus"), 257) as writer:
        writer.add(generator.integers(0, 256, lengths.sum()), lengths)
    adopt_manifest(tmp_path / "corpus", TOKENIZER.identity())
    return str(tmp_path / "corpus")


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(corpus_job, "BLOCK_UNITS", 8)
    monkeypatch.setattr(text_job, "BLOCK_UNITS", 8)


def expected(prefix: str, scorer: ScorerFolder) -> np.ndarray:
    corpus = IndexedCorpus(prefix)
    return np.concatenate([scorer.scorer.score(corpus[i], np.array([len(corpus[i])])) for i in range(len(corpus))])


def test_a_corpus_is_scored_unit_by_unit(corpus, scorer, small_blocks, tmp_path: Path) -> None:
    assert score_corpus(corpus, scorer, tmp_path / "out", ALONE, show=False)
    scores = np.load(tmp_path / "out" / "scores.npy")
    assert scores.dtype == np.float32 and np.array_equal(scores, expected(corpus, scorer))
    record = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert record["corpus_digest"] == read_manifest(corpus)["digest"] and record["scorer"]["digest"] == scorer.digest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scores.json", "scores.npy"]
    assert score_corpus(corpus, scorer, tmp_path / "out", ALONE, show=False)  # nothing is done twice
    with pytest.raises(ValueError, match="differ in scorer .*change --output"):
        score_corpus(corpus, scorer.with_long_documents("max"), tmp_path / "out", ALONE, show=False)


def test_a_subset_is_scored_where_its_units_lie(corpus, scorer, small_blocks, tmp_path: Path) -> None:
    ids = np.flatnonzero(np.arange(500) % 3 == 1)
    subset = write_subset(corpus, ids, tmp_path / "subset", label="third")
    score_corpus(subset, scorer, tmp_path / "out", ALONE, show=False)
    assert np.array_equal(np.load(tmp_path / "out" / "scores.npy"), expected(corpus, scorer)[ids])


@pytest.mark.skipif(sys.platform == "darwin", reason="a file with holes takes its whole size there")
def test_units_beyond_two_and_four_gibibytes_are_read_where_they_lie(corpus, scorer, small_blocks, tmp_path) -> None:
    """A .bin of 50 GB, almost all of it holes, with units about every boundary that a narrower number would have."""
    small, size = IndexedCorpus(corpus), 50 * 10**9
    places = [0, 2**31 - 2, 2**31 + 400, 2**32 - 2, 2**32 + 400, 2**35, size - 2 * int(small.lengths[6])]
    with open(tmp_path / "far.bin", "wb") as stream:
        for unit, place in enumerate(places):
            stream.seek(place)
            stream.write(small[unit].tobytes())
        stream.truncate(size)
    with open(tmp_path / "far.idx", "wb") as stream:
        write_index(stream, small[0].dtype, small.lengths[: len(places)], np.array(places))
    far = IndexedCorpus(tmp_path / "far")
    scores = np.concatenate(list(corpus_job._scored(scorer.scorer, far, 0, len(places), lambda count: None)))
    assert np.array_equal(scores, expected(corpus, scorer)[: len(places)])


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_do_their_part_and_the_last_puts_all_together(corpus, scorer, small_blocks, tmp_path, shards) -> None:
    found = []
    for index in reversed(range(shards)):
        found.append(score_corpus(corpus, scorer, tmp_path / "out", Share(index, shards, alone=True), show=False))
        assert (tmp_path / "out" / "scores.npy").exists() == found[-1]
    assert found == [False] * (shards - 1) + [True]
    assert np.array_equal(np.load(tmp_path / "out" / "scores.npy"), expected(corpus, scorer))


def test_another_tokenizer_is_refused_with_both_digests(corpus, scorer, tmp_path: Path) -> None:
    path = Path(f"{corpus}.manifest.json")
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["sha256"] = "f" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"ffffffffffff, EOD 256 of .*{TOKENIZER.sha256[:12]}"):
        score_corpus(corpus, scorer, tmp_path / "out", ALONE, show=False)


def test_unfinished_work_of_another_scorer_is_not_gone_on_with(corpus, scorer, small_blocks, tmp_path: Path) -> None:
    score_corpus(corpus, scorer, tmp_path / "out", Share(0, 2, alone=True), show=False)
    with pytest.raises(ValueError, match="unfinished work with scorer"):
        score_corpus(corpus, scorer.with_long_documents("max"), tmp_path / "out", ALONE, show=False)


SLOW = """
import sys, time
from pathlib import Path
from megatron_bliss.scorers import corpus_job, text_job
from megatron_bliss.scorers.folder import load_scorer
from megatron_bliss.scorers.job import Share
from megatron_bliss.scorers.scorer import Scorer
from megatron_bliss.data.tokenizers import BytesTokenizer
corpus_job.BLOCK_UNITS = text_job.BLOCK_UNITS = 8
score = Scorer.score
Scorer.score = lambda *arguments: (time.sleep(0.01), score(*arguments))[1]
kind, source, scorer, out = sys.argv[1:]
found = load_scorer(scorer)
if kind == "corpus":
    corpus_job.score_corpus(source, found, Path(out), Share(), show=False)
else:
    settings = text_job.TextSettings([source], max_bad_fraction=0.1, piece_bytes=3000)
    text_job.score_text(settings, found, BytesTokenizer(), Path(out), Share(), show=False)
"""


def start(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SLOW, *map(str, arguments)], env=environment)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_text(path: Path, count: int, seed: int = 1) -> None:
    """JSON lines with some that cannot be used in between."""
    generator, lines = np.random.default_rng(seed), []
    for number in range(count):
        text = "".join(map(chr, generator.integers(97, 123, generator.integers(1, 90))))
        lines.append(json.dumps({"text": text, "url": f"u{number}"}))
        if number % 40 == 7:
            lines += ["", "{broken"]
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("kind", ["corpus", "text.jsonl", "text.jsonl.gz"])
def test_killed_processes_and_many_of_them_leave_the_same_bytes(kind, corpus, scorer, tmp_path: Path) -> None:
    source = corpus if kind == "corpus" else tmp_path / kind
    if kind != "corpus":
        write_text(source, 300)
    arguments = "corpus" if kind == "corpus" else "text", source, tmp_path / "scorer"
    assert start(*arguments, tmp_path / "whole").wait() == 0
    out, generator, kills = tmp_path / "killed", np.random.default_rng(1), 0
    for _ in range(6):
        process = start(*arguments, out)
        while not (out / WORK / "job.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    together = [start(*arguments, out) for _ in range(2)]
    assert [process.wait() for process in together] == [0, 0]
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".txt", ".parquet"])
@pytest.mark.parametrize("ends", [False, True])
def test_raw_text_has_the_scores_and_rows_of_its_corpus(suffix, ends, scorer, small_blocks, tmp_path: Path) -> None:
    source = tmp_path / f"text{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa

        texts = ["some text " * (1 + number % 9) for number in range(100)]
        texts[5] = texts[50] = None
        pq.write_table(pa.table({"text": texts, "url": [f"u{number}" for number in range(100)]}), source)
    elif suffix == ".txt":
        source.write_bytes(b"".join(b"\xff\xfe bad\n" if n == 9 else b"line %d of some\n\n" % n for n in range(100)))
    else:
        write_text(source, 120)
    found = ScorerFolder(
        Scorer(scorer.scorer.windows, 50, "mean", ends_documents=ends),
        scorer.tokenizer,
        scorer.weights_sha256,
        "scorer",
    )
    settings = TextSettings([str(source)], max_bad_fraction=0.1, piece_bytes=1000)
    assert score_text(settings, found, TOKENIZER, tmp_path / "out", ALONE, show=False)
    options = {"max_bad_fraction": 0.1, "append_eod": ends}
    preprocess(PreprocessSettings([str(source)], str(tmp_path / "same"), "bytes", **options))
    score_corpus(str(tmp_path / "same"), found, tmp_path / "from_corpus", ALONE, show=False)
    scores = np.load(tmp_path / "out" / "scores.npy")
    assert len(scores) >= 97 and np.array_equal(scores, np.load(tmp_path / "from_corpus" / "scores.npy"))
    rows = [pq.read_table(path) for path in (tmp_path / "out/provenance.parquet", tmp_path / "same.provenance.parquet")]
    assert rows[0].equals(rows[1])
    rejected = [path.read_text() for path in (tmp_path / "out/rejected.jsonl", tmp_path / "same.rejected.jsonl")]
    assert rejected[0] == rejected[1] and (suffix.endswith("gz") is False or "{broken" not in rejected[0])
    counts = json.loads((tmp_path / "out" / "scores.json").read_text())["counts"]
    assert counts["units"] == len(scores) and counts["rejected"] == rejected[0].count("\n") > 0
    assert np.load(tmp_path / "out" / "lengths.npy").sum() == counts["tokens"]


def test_text_with_too_many_bad_lines_is_refused_with_a_list_of_them(scorer, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    settings = TextSettings([str(tmp_path / "text.jsonl")])
    with pytest.raises(ValueError, match="1 of 2 lines could not be used"):
        score_text(settings, scorer, TOKENIZER, tmp_path / "out", ALONE, show=False)
    assert "no key 'text'" in (tmp_path / "out" / "rejected.jsonl").read_text()


def test_a_claim_is_taken_once_and_given_back(tmp_path: Path) -> None:
    with Claims(tmp_path, stale=30) as one, Claims(tmp_path, stale=30) as other:
        assert one.take("a") and not other.take("a") and other.take("b")
        assert one.take("c") and other.take("a")  # who takes another gives back the first
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("owner", ["elsewhere 1 0", "damaged"])
def test_an_old_claim_of_another_machine_is_taken_over_and_a_fresh_one_is_not(tmp_path: Path, owner: str) -> None:
    path = tmp_path / "a.claim"
    path.write_text(owner)
    with Claims(tmp_path, stale=30) as claims:
        assert not claims.take("a")
        os.utime(path, (time.time() - 100,) * 2)
        assert claims.take("a")


def test_a_claim_of_a_dead_process_here_is_taken_over_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    with Claims(tmp_path) as claims:
        owner = claims._mine.split()
        (tmp_path / "a.claim").write_text(f"{owner[0]} {process.pid} 0")
        (tmp_path / "b.claim").write_text(f"{owner[0]} {os.getppid()} 0")
        assert claims.take("a") and not claims.take("b")
