"""Which units share n-grams with evaluation files: exactly those, from raw text and from a corpus alike."""

import gzip
import itertools
import json
import random
import re
import tracemalloc
import unicodedata
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_bliss.data import decontamination, shared_ngrams
from megatron_bliss.data.decontamination import DecontaminationSettings, decontaminate
from megatron_bliss.data.evaluation_text import read_records, strings_of
from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.manifest import adopt_manifest, read_manifest
from megatron_bliss.data.shared_ngrams import EvaluationText, SharedNgrams
from megatron_bliss.data.subset import root_units, units_within
from megatron_bliss.data.verify import verify_corpus
from megatron_bliss.data.words import words_of
from tests.data.corpora import documents, write_corpus, write_lines

COUNT = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
COUNT += ["thirteen", "fourteen"]


def search(records, ngram=13, shortest=8):
    """What finds the n-grams of one evaluation file with these records, each a list of texts."""
    text = EvaluationText(ngram, shortest)
    text.add_file("evaluation")
    for line, texts in enumerate(records, 1):
        text.add_record(line, texts)
    return SharedNgrams(text)


def hit_units(records, units, **settings):
    hits, of_files = search(records, **settings).hits(units, range(len(units)))
    assert of_files.tolist() == [len(hits)]
    return [hit.unit for hit in hits]


def results(folder):
    """The lines of contaminated.jsonl."""
    return [json.loads(line) for line in (folder / "contaminated.jsonl").read_text().splitlines()]


def make_corpus(tmp_path, records, name="X", **settings):
    source, prefix = write_lines(tmp_path / f"{name}.jsonl", records), str(tmp_path / name)
    preprocess(PreprocessSettings(inputs=[source], output_prefix=prefix, **{"tokenizer_type": "bytes"} | settings))
    return source, prefix


def test_words_are_split_at_all_but_letters_numbers_and_marks():
    assert words_of("Don't  PANIC_now: 3.5\n—\tx²") == ["don", "t", "panic", "now", "3", "5", "x2"]
    assert words_of("Straße ﬁn İ ΐ Ϊ\u0301 \u00a0हिन्दी日本語 \U0001d400b \ud800z") == [
        "strasse", "fin", "i\u0307", "ΐ", "ΐ", "हिन्दी日本語", "ab", "z",
    ]  # fmt: skip
    assert words_of("") == words_of("…!?") == []
    for code in range(0x250):
        text = unicodedata.normalize("NFKC", f"{chr(code)}é").casefold()
        text = unicodedata.normalize("NFKC", text)
        expected = "".join(one if unicodedata.category(one)[0] in "LMN" else " " for one in text).split()
        assert words_of(f"{chr(code)}é") == expected
        assert code >= 128 or words_of(chr(code)) == [word[:-1] for word in expected if len(word) > 1]


def test_thirteen_words_are_a_hit_and_twelve_are_none():
    text = " ".join(COUNT)
    units = ["a " + " ".join(COUNT[:13]) + " b", " ".join(COUNT[:12]), " ".join(COUNT[1:13]), " ".join(COUNT[1:])]
    units += [" ".join([*COUNT[:6], "other", *COUNT[6:]]), " ".join(reversed(COUNT))]
    assert hit_units([[text]], units) == [0, 3]
    (first, second), _ = search([["x"], [text]]).hits([text, units[3]], [0, 1])
    assert first == (0, 0, 2, " ".join(COUNT[:13]), 2) and second == (1, 0, 2, " ".join(COUNT[1:]), 1)


def test_case_punctuation_and_line_breaks_make_no_difference():
    written = "ONE, “Two”\n\nthree;four\u2014Five\u00a0six (seven) eight... nine\tten eleven/twelve 'Thirteen'!"
    assert hit_units([[" ".join(COUNT)]], [written]) == [0]
    assert hit_units([[written]], [" ".join(COUNT)]) == [0]
    assert hit_units([["Über " + "café " * 12]], ["U\u0308BER " + "cafe\u0301-" * 12]) == [0]


def test_no_ngram_reaches_from_one_string_or_unit_into_the_next():
    first, second = " ".join(COUNT[:9]), " ".join(COUNT[9:])
    whole = " ".join(COUNT)
    assert hit_units([[first, second]], [f"{COUNT[1]} {COUNT[2]} {second}"]) == []
    assert hit_units([[whole]], [first, second]) == []
    found = search([[whole]])
    assert found.hits([first, second], [0, 0])[0] == []  # two documents in one unit
    assert [hit.unit for hit in found.hits([first, whole, second, whole], [0, 0, 4, 4])[0]] == [0, 4]


def test_a_short_text_counts_as_a_whole_and_a_shorter_one_not_at_all():
    eight, seven = " ".join(COUNT[:8]), " ".join(COUNT[3:10])
    found = search([[eight, seven], [seven]])
    assert found.lengths == [8] and found.ngrams == [1]
    assert [hit.unit for hit in found.hits([f"x {eight} y", seven, " ".join(COUNT[1:8])], [0, 1, 2])[0]] == [0]
    text = EvaluationText(13, 8)
    text.add_file("a")
    text.add_record(1, [seven])
    text.add_record(2, [seven, eight])
    assert (text.records, text.left_out) == ([2], [1])
    assert hit_units([[seven]], [" ".join(COUNT)], shortest=7) == [0]


def test_hashes_that_collide_give_no_false_hit(monkeypatch):
    generator = random.Random(0)
    records = [[" ".join(generator.choices("abcde", k=generator.randint(2, 9)))] for _ in range(30)]
    units = [" ".join(generator.choices("abcdef", k=12)) for _ in range(60)]
    expected = hit_units(records, units, ngram=5, shortest=3)
    assert 0 < len(expected) < 60
    counts = search(records, ngram=5, shortest=3).ngrams
    for number in (0, 1, 7):
        monkeypatch.setattr(shared_ngrams, "mixed", lambda hashes, number=number: hashes % np.uint64(number + 1))
        assert hit_units(records, units, ngram=5, shortest=3) == expected
        assert search(records, ngram=5, shortest=3).ngrams == counts


def brute_force(files, units, ngram, shortest):
    """For each unit: its shared n-grams; and for each file its own n-grams. Plain sets of tuples of words."""

    def runs(words, size):
        return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}

    own = []
    for records in files:
        split = [re.findall(r"[a-zé]+", text.lower()) for texts in records for text in texts]
        own.append({run for words in split if len(words) >= shortest for run in runs(words, min(ngram, len(words)))})
    known = set().union(*own)
    sizes = {len(run) for run in known}
    split = [re.findall(r"[a-zé]+", unit.lower()) for unit in units]
    return [set().union(*(runs(words, size) for size in sizes)) & known for words in split], own


@pytest.mark.parametrize("seed", range(12))
def test_random_text_over_a_small_vocabulary_as_by_brute_force(seed):
    generator = random.Random(seed)
    letters = "abcdé"[: generator.randint(2, 5)]
    ngram = generator.randint(1, 7)
    shortest = generator.randint(1, ngram)

    def text(most, other=""):
        return "".join(one + generator.choice([" ", ", ", "\n"]) for one in generator.choices(letters + other, k=most))

    files = [
        [
            [text(generator.randint(0, 12)) for _ in range(generator.randint(0, 3))]
            for _ in range(generator.randint(1, 6))
        ]
        for _ in range(3)
    ]
    units = [text(generator.randint(0, 30), "xyzABC") for _ in range(80)]
    collected = EvaluationText(ngram, shortest)
    for number, records in enumerate(files):
        collected.add_file(str(number))
        for line, texts in enumerate(records, 1):
            collected.add_record(line, texts)
    found = SharedNgrams(collected)
    hits, of_files = found.hits(units, range(80))
    shared, own = brute_force(files, units, ngram, shortest)
    assert [(hit.unit, hit.shared) for hit in hits] == [(unit, len(one)) for unit, one in enumerate(shared) if one]
    assert found.ngrams == [len(one) for one in own]
    assert of_files.tolist() == [sum(bool(one & of_file) for one in shared) for of_file in own]
    for hit in hits:
        _, own_of_record = brute_force([[files[hit.file][hit.line - 1]]], [], ngram, shortest)
        assert tuple(hit.ngram.split()) in shared[hit.unit] & own_of_record[0]
        earlier = [*itertools.chain(*files[: hit.file]), *files[hit.file][: hit.line - 1]]
        assert not brute_force([earlier], [units[hit.unit]], ngram, shortest)[1][0] & shared[hit.unit]


def test_all_strings_of_a_record_count_or_those_under_keys():
    record = {"a": "1", "b": [{"c": ["2", 3, None, {"d": "4"}]}, "5"], "e": {"a": {"x": "6"}}, "f": b"\xff", "g": b"7"}
    assert strings_of(record) == ["1", "2", "4", "5", "6", "7"]
    assert strings_of(record, ["a", "d"]) == ["1", "4", "6"]
    assert strings_of(["1", ["2"]]) == ["1", "2"] and strings_of("1", ["a"]) == []


def test_evaluation_files_of_every_kind(tmp_path):
    records = [{"q": "é a", "c": {"text": ["b", "c"]}}, {"q": "d", "c": {"text": []}}]
    expected = [(1, ["é a", "b", "c"]), (2, ["d"])]
    assert list(read_records(write_lines(tmp_path / "a.jsonl.gz", records))) == expected
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    assert list(read_records(str(tmp_path / "a.jsonl.zst"))) == expected
    for text in (json.dumps(records), json.dumps(records, indent=2), "\ufeff" + json.dumps(records)):
        (tmp_path / "a.json").write_text(text)
        assert list(read_records(str(tmp_path / "a.json"))) == expected
    (tmp_path / "one.json").write_text(json.dumps(records[0], indent=2))
    assert [texts for _, texts in read_records(str(tmp_path / "one.json"))] == [["é a", "b", "c"]]
    (tmp_path / "a.txt").write_text("é a\n\n d\n")
    assert list(read_records(str(tmp_path / "a.txt"), ["q"])) == [(1, ["é a"]), (3, [" d"])]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=1)
    assert list(read_records(str(tmp_path / "a.parquet"))) == expected
    assert list(read_records(str(tmp_path / "a.parquet"), ["q"])) == [(1, ["é a"]), (2, ["d"])]
    write_lines(tmp_path / "one.jsonl", [["a", "b"]])
    assert list(read_records(str(tmp_path / "one.jsonl"))) == [(1, ["a"]), (2, ["b"])]


@pytest.fixture
def planted(tmp_path):
    """40 documents, of which 3, 17 and 18 hold evaluation text, and the evaluation file."""
    records = documents(40)
    for unit in (3, 17, 18):
        records[unit]["text"] += "\nAnd so: " + ", ".join(COUNT[unit % 2 :]).upper() + "."
    items = [{"question": "too short"}, {"question": "?", "choices": ["no", " ".join(COUNT)]}]
    return records, write_lines(tmp_path / "eval.jsonl.gz", items)


def test_raw_text_and_corpus_give_the_same_answer(planted, tmp_path, tokenizer_files):
    records, evaluation = planted
    answers = []
    for name in ("bytes", "huggingface"):
        options = {"tokenizer_type": name, "tokenizer_model": tokenizer_files[name]}
        source, prefix = make_corpus(tmp_path, records, name, **options)
        settings = DecontaminationSettings([evaluation], str(tmp_path / f"{name}.corpus"), corpus=prefix)
        record = decontaminate(settings)
        numbers = np.load(tmp_path / f"{name}.corpus" / "contaminated.npy")
        assert numbers.dtype == np.int64 and numbers.tolist() == [3, 17, 18]
        answers.append([{"line": one.pop("unit") + 1, **one} for one in results(tmp_path / f"{name}.corpus")])
        assert record == json.loads((tmp_path / f"{name}.corpus" / "decontamination.json").read_text())
        assert record["counts"] == {"units": 40, "units_hit": 3, "share_hit": 3 / 40}
        assert record["corpus"] == {"prefix": prefix, "digest": read_manifest(prefix)["digest"]}
    record = decontaminate(replace(settings, output=str(tmp_path / "raw"), corpus=None, inputs=[source]))
    answers.append(
        [{name: value for name, value in one.items() if name != "file"} for one in results(tmp_path / "raw")]
    )
    assert answers[0] == answers[1] == answers[2] and not (tmp_path / "raw" / "contaminated.npy").exists()
    assert answers[0][0] == {
        "line": 4, "evaluation": evaluation, "evaluation_line": 2, "ngram": " ".join(COUNT[1:]), "shared_ngrams": 1,
    }  # fmt: skip
    (one,) = record["evaluation"]
    assert len(one.pop("sha256")) == 64
    assert one == {"file": evaluation, "records": 2, "records_left_out": 1, "ngrams": 2, "units_hit": 3}
    assert record["counts"]["rejected"] == 0 and record["inputs"][0]["file"] == source


@pytest.mark.parametrize("block", [1, 200, 1 << 20])
def test_windows_and_blocks_of_any_size(planted, tmp_path, monkeypatch, block):
    monkeypatch.setattr(decontamination, "BLOCK_TOKENS", block)
    monkeypatch.setattr(decontamination, "BLOCK_BYTES", block)
    records, evaluation = planted
    records.insert(0, {"text": "it ends with " + " ".join(COUNT[:7])})
    records.insert(1, {"text": " ".join(COUNT[7:]) + " and goes on"})
    source, prefix = make_corpus(tmp_path, records, unit="window", window_length=5000)
    decontaminate(DecontaminationSettings([evaluation], str(tmp_path / "out"), corpus=prefix))
    corpus, found = IndexedCorpus(prefix), results(tmp_path / "out")
    assert len(corpus) < len(records)
    text = [bytes(token for token in corpus[unit] if token < 256).decode() for unit in range(len(corpus))]
    expected = [unit for unit, one in enumerate(text) if "THIRTEEN, FOURTEEN" in one]
    assert expected and np.load(tmp_path / "out" / "contaminated.npy").tolist() == expected
    assert sum(one["shared_ngrams"] for one in found) < 2 * len(found) + 1
    decontaminate(DecontaminationSettings([evaluation], str(tmp_path / "raw"), inputs=[source]))
    assert [one["line"] for one in results(tmp_path / "raw")] == [6, 20, 21]


def test_drop_leaves_the_complement_in_stock_order(planted, tmp_path):
    records, evaluation = planted
    source, prefix = make_corpus(tmp_path, records)
    settings = DecontaminationSettings([evaluation], str(tmp_path / "out"), corpus=prefix, drop=True)
    record = decontaminate(settings)
    subset = str(tmp_path / "out" / record["subset"])
    kept = [unit for unit in range(40) if unit not in (3, 17, 18)]
    assert root_units(subset).tolist() == kept and verify_corpus(subset)["units"] == 37
    stock, whole = IndexedDataset(subset), IndexedCorpus(prefix)
    for row, unit in enumerate(kept):
        np.testing.assert_array_equal(stock[row], whole[unit])
    assert read_manifest(subset)["policy"]["ngram"] == 13
    # a subset of the subset: its numbers are its own, and nothing is left to find
    again = decontaminate(replace(settings, output=str(tmp_path / "again"), corpus=subset))
    assert again["counts"]["units_hit"] == 0
    assert units_within(str(tmp_path / "again" / again["subset"]), subset).tolist() == list(range(37))


def test_drop_of_raw_text_leaves_the_other_lines_as_they_were(planted, tmp_path):
    records, evaluation = planted
    lines = [json.dumps(record, ensure_ascii=False, indent=None).encode() + b" " for record in records]
    bad = [b"{broken", b'{"text": " "}', b'{"other": 1}', b"", b'{"text": "\xff"}']
    crawl = write_lines(tmp_path / "a.json.gz", lines[:10] + bad + lines[10:])
    (tmp_path / "b.txt").write_text("Une règle\n\n" + " ".join(COUNT) + "\nlast\n")
    table = [{"text": "row", "url": "u", "meta": {}}, {"text": " ".join(COUNT)}, {"text": "r", "meta": {"label": "l"}}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "c.parquet")
    inputs = [crawl, str(tmp_path / "b.txt"), str(tmp_path / "c.parquet")]
    settings = DecontaminationSettings([evaluation], str(tmp_path / "out"), inputs=inputs, drop=True)
    record = decontaminate(settings)
    hits = [(one["file"], one["line"]) for one in results(tmp_path / "out")]
    assert hits == [(crawl, 4), (crawl, 23), (crawl, 24), (inputs[1], 3), (inputs[2], 2)]
    clean = gzip.decompress((tmp_path / "out" / "clean.jsonl.gz").read_bytes()).split(b"\n")
    assert clean[:37] == [line for unit, line in enumerate(lines) if unit not in (3, 17, 18)]
    assert [json.loads(line) for line in clean[37:-1]] == [
        {"text": "Une règle"}, {"text": "last"}, {"text": "row", "url": "u"}, {"text": "r", "label": "l"},
    ]  # fmt: skip
    assert record["counts"] == {"units": 46, "units_hit": 5, "share_hit": 5 / 46, "rejected": 4}
    assert [one["line"] for one in record["first_rejects"]] == [11, 12, 13]
    assert record["clean"]["documents"] == 41 == len(clean) - 1
    made = (tmp_path / "out" / "clean.jsonl.gz").read_bytes()
    decontaminate(replace(settings, output=str(tmp_path / "again")))
    assert (tmp_path / "again" / "clean.jsonl.gz").read_bytes() == made


def test_memory_does_not_grow_with_the_corpus(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(decontamination, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(decontamination, "BLOCK_TOKENS", 1 << 14)
    records, evaluation = planted
    peaks = []
    for times in (5, 50):
        source, prefix = make_corpus(tmp_path, records * times, str(times))
        settings = DecontaminationSettings([evaluation], "", inputs=[source])
        for one in (settings, replace(settings, inputs=(), corpus=prefix)):
            folder = tmp_path / f"{times}{len(peaks)}"
            tracemalloc.start()
            decontaminate(replace(one, output=str(folder)))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert len(results(folder)) == 3 * times
    assert peaks[2] < peaks[0] + (1 << 20) and peaks[3] < peaks[1] + (1 << 20)


def test_a_run_that_fails_leaves_no_result(planted, tmp_path, monkeypatch):
    records, evaluation = planted
    source, _ = make_corpus(tmp_path, records)
    monkeypatch.setattr(SharedNgrams, "hits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decontaminate(DecontaminationSettings([evaluation], str(tmp_path / "out"), inputs=[source], drop=True))
    assert not list((tmp_path / "out").iterdir())


def test_bad_input_is_named_with_what_to_change(planted, tmp_path):
    records, evaluation = planted
    source, prefix = make_corpus(tmp_path, records)
    settings = DecontaminationSettings([evaluation], str(tmp_path / "out"), inputs=[source])
    write_corpus(tmp_path / "foreign", [4, 4], 200)
    (tmp_path / "foreign.manifest.json").unlink()
    adopt_manifest(tmp_path / "foreign", None)
    files = {
        "short.jsonl": b'{"a": "too short"}\n', "empty.txt": b"", "broken.jsonl": b'{"a": "b"}\n{\n',
        "bad.txt": b"a\n\xff", "cut.jsonl.gz": gzip.compress(b'{"a": 1}\n')[:-6], "no.parquet": b"PAR",
        "blank.jsonl": b"\n",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    everything = write_lines(tmp_path / "all.jsonl", [{"text": " ".join(COUNT)}])
    for change, message in (
        ({"ngram": 0}, "found --ngram 0, expected 1 or more: change --ngram"),
        ({"shortest": 14}, "found --shortest 14, expected 1 to 13 .*: change --shortest"),
        ({"shortest": 0}, "found --shortest 0, expected 1 to 13"),
        ({"inputs": ()}, "expected one of them: change --corpus or --input"),
        ({"tokenizer_model": "x"}, "found --tokenizer-model for raw text"),
        ({"inputs": [str(tmp_path / "blank.jsonl")]}, "found no text in the input, .*: change --input or --input-keys"),
        ({"inputs": ["nowhere.jsonl"]}, "no input file at nowhere.jsonl.*: change --input"),
        ({"inputs": [everything], "drop": True}, "found evaluation text in all 1 units, expected some without"),
        ({"inputs": (), "corpus": str(tmp_path / "foreign")}, "found no tokenizer in .*foreign.manifest.json"),
        ({"inputs": (), "corpus": str(tmp_path / "nowhere")}, "nowhere.manifest.json does not exist"),
        ({"evaluation": ["nowhere.jsonl"]}, "no input file at nowhere.jsonl.*: change --evaluation"),
        ({"evaluation": [__file__]}, "unknown suffix, expected .*: change --evaluation"),
        ({"json_keys": ["text"]}, "found no text of 8 words or more under text in .*, --json-keys"),
        ({"evaluation": [str(tmp_path / "short.jsonl")]}, "found no text of 8 words or more in .*short.jsonl"),
        ({"evaluation": [evaluation, str(tmp_path / "empty.txt")]}, "found no text of 8 words or more in .*empty.txt"),
        ({"evaluation": [str(tmp_path / "broken.jsonl")]}, "found .*broken.jsonl, line 2: broken JSON .*, expected"),
        ({"evaluation": [str(tmp_path / "bad.txt")]}, "found .*bad.txt, line 2: invalid UTF-8 at byte 0, expected"),
        ({"evaluation": [str(tmp_path / "cut.jsonl.gz")]}, "found .*cut.jsonl.gz: damaged gzip file.*expected a whole"),
        ({"evaluation": [str(tmp_path / "no.parquet")]}, "found .*no.parquet: damaged parquet file.*expected a whole"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            decontaminate(replace(settings, **change))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "decontamination.json").exists()
    decontaminate(settings)
    with pytest.raises(
        ValueError, match="found .*decontamination.json, expected a folder without a result: change --out"
    ):
        decontaminate(settings)
