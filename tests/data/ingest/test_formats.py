"""Text to a corpus: the bytes of megatron-core's builder from every format, any number of workers, pieces, shards."""

import json
import os

import numpy as np
import pytest

from megatron_bliss.data.ingest import encoding, piece_maker
from megatron_bliss.data.ingest.shards import deal, merge_shards
from megatron_bliss.data.ingest.sources import expand_inputs
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.data.tokenizers import load_tokenizer
from tests.data.corpora import documents
from tests.data.ingest.source_files import FORMATS, build_with_megatron, make, same_files, write_source
from tools import preprocess_data

ALL = (".bin", ".idx", ".rejected.jsonl", ".provenance.parquet")


def flat(count: int, seed: int = 0) -> list[dict]:
    """Documents of one line each, so that .txt can hold them."""
    return [{**record, "text": record["text"].replace("\n", " ")} for record in documents(count, seed)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_bytes_of_megatron_core(tmp_path, tokenizer_files, suffix, monkeypatch):
    monkeypatch.setattr(piece_maker, "BLOCK_BYTES", 2000)
    records, model = flat(60), tokenizer_files["huggingface"]
    files = [
        write_source(tmp_path / f"{name}.{suffix}", part) for name, part in (("a", records[:45]), ("b", records[45:]))
    ]
    build_with_megatron(tmp_path / "Y", [record["text"] for record in records], "huggingface", model, append_eod=True)
    options = {"tokenizer_type": "huggingface", "tokenizer_model": model, "append_eod": True}
    for name, changes in {"X": {}, "P": {"piece_megabytes": 0.001}}.items():
        manifest, corpus = make(tmp_path, files, name, **options, **changes)
        assert same_files(tmp_path / "Y", corpus.prefix)
        assert read_provenance(corpus.prefix).column("line").to_pylist() == [*range(1, 46), *range(1, 16)]
        assert manifest["counts"]["documents"] == 60 and len(manifest["sources"]) == 2
    url = read_provenance(corpus.prefix).column("url")[0].as_py()
    assert url is None if "txt" in suffix else url == records[0]["url"]


def test_workers_share_files_of_every_kind_and_nothing_shows(tmp_path, tokenizer_files):
    records = flat(160)
    files = [
        write_source(tmp_path / f"{number}.{suffix}", records[number * 40 : number * 40 + 40])
        for number, suffix in enumerate(("jsonl.gz", "parquet", "json.zst", "jsonl"))
    ]
    options = {"tokenizer_type": "huggingface", "tokenizer_model": tokenizer_files["huggingface"]}
    _, one = make(tmp_path, files, "one", **options)
    _, four = make(tmp_path, files, "four", workers=3, piece_megabytes=0.001, **options)
    assert same_files(one.prefix, four.prefix, ALL)
    assert read_manifest(one.prefix) == read_manifest(four.prefix)


@pytest.mark.parametrize("unit", ["document", "window"])
@pytest.mark.parametrize("provenance", [True, False])
def test_shards_joined_are_the_whole(tmp_path, unit, provenance):
    files = [write_source(tmp_path / f"{name}.jsonl", flat(12 + 9 * seed, seed)) for seed, name in enumerate("abcd")]
    with open(files[2], "ab") as stream:
        stream.write(b"{\n")
    options = {"unit": unit, "window_length": 23, "append_eod": True, "max_bad_fraction": 0.1, "provenance": provenance}
    whole, corpus = make(tmp_path, files, "whole", **options)
    for shards in (1, 3):
        for shard in range(1, shards + 1):
            part, _ = make(tmp_path, files, "parts", shard=(shard, shards), **options)
            assert part["shard"] == [shard, shards]
        merged = merge_shards(str(tmp_path / "parts"), shards)
        assert same_files(corpus.prefix, tmp_path / "parts", ALL if provenance else ALL[:3])
        assert {**merged, "tokenizer": None} == {**whole, "tokenizer": None}
        assert merge_shards(str(tmp_path / "parts"), shards) == merged
        assert not os.path.exists(tmp_path / "parts.pieces")
        for suffix in (*ALL, ".manifest.json"):
            if os.path.exists(tmp_path / f"parts{suffix}"):
                os.unlink(tmp_path / f"parts{suffix}")


def test_a_lone_token_at_the_end_of_a_shard_goes_into_the_next_window(tmp_path):
    files = [write_source(tmp_path / f"{name}.jsonl", [{"text": "1234567"}, {"text": "12345678"}]) for name in "ab"]
    options = {"unit": "window", "window_length": 16}  # 8 + 9 tokens: one is over
    _, whole = make(tmp_path, files, "whole", **options)
    for shard in (1, 2):
        _, part = make(tmp_path, files, "parts", shard=(shard, 2), **options)
        assert part.bin_bytes == 32
    merge_shards(str(tmp_path / "parts"), 2)
    assert same_files(whole.prefix, tmp_path / "parts", ALL) and whole.bin_bytes == 68


def test_shards_are_dealt_by_bytes_and_none_is_empty(tmp_path):
    sizes = [1, 1, 1000, 1, 1, 500, 500, 1]
    files = [str(tmp_path / f"{number}.jsonl") for number in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        with open(file, "wb") as stream:
            stream.write(b"\n" * size)
    for shards in range(1, 9):
        dealt = [deal(files, shard, shards) for shard in range(1, shards + 1)]
        assert sum(dealt, []) == files and all(dealt)
    assert deal(files, 1, 2) == files[:4]
    with pytest.raises(ValueError, match="9 shards of 8 files"):
        deal(files, 1, 9)


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece", "bytes"])
def test_what_makes_the_tokens_does_not_show(tmp_path, tokenizer_files, kind):
    source = write_source(tmp_path / "a.jsonl", documents(40))
    options = {"tokenizer_type": kind, "tokenizer_model": tokenizer_files[kind]}
    _, fast = make(tmp_path, [source], "auto", **options)
    _, own = make(tmp_path, [source], "own", tokenizer_backend="own", **options)
    assert same_files(fast.prefix, own.prefix)


def test_gigatoken_that_errs_is_replaced_and_the_block_done_again(tmp_path, tokenizer_files, monkeypatch, capsys):
    source = write_source(tmp_path / "a.jsonl", documents(30))
    options = {"tokenizer_type": "huggingface", "tokenizer_model": tokenizer_files["huggingface"]}
    _, right = make(tmp_path, [source], "right", **options)
    encode, calls = encoding.GigaTokenEncoder._encode, []

    def wrong(self, texts):
        tokens, lengths = encode(self, texts)
        calls.append(len(texts))
        return (tokens + (len(calls) > 1), lengths)  # the probe passes

    monkeypatch.setattr(encoding.GigaTokenEncoder, "_encode", wrong)
    _, mended = make(tmp_path, [source], "mended", **options)
    assert len(calls) == 2 and same_files(right.prefix, mended.prefix)
    assert "GigaToken differs on a text that begins with" in capsys.readouterr().err

    def panic(self, texts):
        if len(calls) > 3:
            raise BaseException("a panic in Rust")
        return wrong(self, texts) if not calls.append(0) and len(calls) < 2 else encode(self, texts)

    calls.clear()
    calls += [0, 0]
    monkeypatch.setattr(encoding.GigaTokenEncoder, "_encode", panic)
    _, survived = make(tmp_path, [source], "survived", piece_megabytes=0.001, **options)
    assert same_files(right.prefix, survived.prefix) and "a panic in Rust" in capsys.readouterr().err


def test_a_tokenizer_that_gigatoken_cannot_read_goes_through_its_own_library(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "river": 1, "</s>": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    source = write_source(tmp_path / "a.jsonl", [{"text": "the river"}])
    _, corpus = make(tmp_path, [source], tokenizer_type="huggingface", tokenizer_model=str(tmp_path / "words.json"))
    assert corpus[0].tolist() == [0, 1] and "Hugging Face tokenizers is used" in capsys.readouterr().err


def test_a_long_document_is_checked_by_its_beginning(tokenizer_files, monkeypatch):
    monkeypatch.setattr(encoding, "CHECKED_LENGTH", 20)
    encoder = encoding.make_encoder(load_tokenizer("huggingface", tokenizer_files["huggingface"]))
    lengths, own = [], encoder.tokenizer.encode_batch
    monkeypatch.setattr(encoder.tokenizer, "encode_batch", lambda texts: lengths.extend(map(len, texts)) or own(texts))
    encoder.encode(["once upon a time there was a river " * 9])
    assert lengths == [20] and encoder.warning is None
    monkeypatch.setattr(encoder, "_encode", lambda texts: (np.zeros(3, int), np.array([3])))
    text = "once upon a time there was a river " * 9
    tokens, _ = encoder.encode([text])
    assert "differs on a text" in encoder.warning and tokens.tolist() == own([text])[0]


def test_gigatoken_is_made_anew_when_its_cache_has_grown(tokenizer_files, monkeypatch):
    monkeypatch.setattr(encoding, "GROWTH_LIMIT", -1)
    encoder = encoding.make_encoder(load_tokenizer("huggingface", tokenizer_files["huggingface"]))
    before = encoder._fast
    first, _ = encoder.encode(["once upon a time"])
    assert encoder._fast is not before and encoder.warning is None
    assert encoder.encode(["once upon a time"])[0].tolist() == first.tolist()


def test_progress_as_json_lines_ends_with_the_whole(tmp_path, capsys):
    source = write_source(tmp_path / "a.jsonl", documents(20))
    options = ["--input", source, "--output-prefix", str(tmp_path / "X"), "--tokenizer-type", "bytes"]
    assert preprocess_data.main([*options, "--progress", "json"]) == 0
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert last["fraction"] == 1 and last["documents"] == 20 and last["eta_seconds"] == 0
    assert last["text_bytes"] == os.path.getsize(source)
    for name in ("megabytes_per_second", "documents_per_second", "tokens_per_second"):
        assert last[name] > 0


def test_the_command_joins_shards_once_all_are_finished(tmp_path, capsys):
    files = [write_source(tmp_path / f"{name}.jsonl.zst", documents(5)) for name in "ab"]
    prefix = ["--output-prefix", str(tmp_path / "X")]
    options = ["--input", *files, *prefix, "--tokenizer-type", "bytes", "--progress", "none"]
    assert preprocess_data.main([*options, "--shard", "1/2"]) == 0
    assert preprocess_data.main([*prefix, "--merge-shards", "2"]) == 1
    assert "X.shard_0002_of_0002.manifest.json does not exist: finish shard 2/2" in capsys.readouterr().err
    assert preprocess_data.main([*options, "--shard", "2/2"]) == 0
    assert preprocess_data.main([*prefix, "--merge-shards", "2"]) == 0
    assert "10 documents" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        preprocess_data.main([*options, "--shard", "two"])


def test_inputs_of_every_kind_are_found_in_a_folder(tmp_path):
    for suffix in FORMATS:
        write_source(tmp_path / f"a.{suffix}", flat(2))
    (tmp_path / "a.csv").write_text("no")
    assert [os.path.basename(path)[2:] for path in expand_inputs([str(tmp_path)])] == sorted(FORMATS)
