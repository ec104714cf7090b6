import pickle
import struct

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.data.indexed import HEADER, MAGIC, IndexedCorpus, token_dtype, write_index
from tests.data.corpora import write_corpus

LENGTHS = [3, 1, 7, 5, 2, 4]


def index_with(path, **changes):
    """Rewrite header fields of an index in place."""
    data = bytearray(path.read_bytes())
    names = ("magic", "version", "code", "sequences", "documents")
    fields = {**dict(zip(names, HEADER.unpack(data[: HEADER.size]), strict=True)), **changes}
    data[: HEADER.size] = HEADER.pack(*fields.values())
    path.write_bytes(data)


@pytest.mark.parametrize("vocab_size", [257, 65_499, 65_500, 128_000])
def test_files_are_those_of_megatron_core(tmp_path, vocab_size):
    tokens = write_corpus(tmp_path / "ours", LENGTHS, vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for unit in np.split(tokens, np.cumsum(LENGTHS)[:-1]):
        builder.add_document(torch.from_numpy(unit), [len(unit)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_units_are_read_back_here_and_in_megatron_core(tmp_path):
    tokens = write_corpus(tmp_path / "X", LENGTHS)
    corpus, theirs = IndexedCorpus(tmp_path / "X"), IndexedDataset(str(tmp_path / "X"))
    units = np.split(tokens, np.cumsum(LENGTHS)[:-1])
    assert len(corpus) == len(theirs) == len(LENGTHS) and corpus.num_tokens == sum(LENGTHS)
    for number, unit in enumerate(units):
        np.testing.assert_array_equal(corpus[number], unit)
        np.testing.assert_array_equal(theirs[number], unit)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(corpus))[2], units[2])


def test_gather_equals_one_by_one(tmp_path):
    write_corpus(tmp_path / "X", LENGTHS)
    corpus, ids = IndexedCorpus(tmp_path / "X"), np.array([5, 2, 2, 0])
    for max_length, width in ((4, 4), (100, 7)):
        tokens, lengths = corpus.gather(ids, max_length)
        assert tokens.shape == (4, width) and tokens.dtype == lengths.dtype == np.int64
        for row, unit in enumerate(ids):
            expected = corpus[unit][:max_length]
            assert lengths[row] == len(expected)
            np.testing.assert_array_equal(tokens[row, : lengths[row]], expected)
            assert (tokens[row, lengths[row] :] == 0).all()
    assert corpus.gather(np.zeros(0, dtype=int), 4)[0].shape == (0, 0)
    with pytest.raises(IndexError, match="expected 0 to 5"):
        corpus.gather(np.array([6]), 4)
    with pytest.raises(IndexError, match="unit -1"):
        corpus[-1]


def test_an_index_written_and_read_in_blocks_is_the_same(tmp_path, monkeypatch):
    write_corpus(tmp_path / "whole", LENGTHS * 3)
    monkeypatch.setattr("megatron_bliss.data.indexed.BLOCK", 4)
    monkeypatch.setattr("megatron_bliss.data.indexed.blocks.__defaults__", (4,))
    write_corpus(tmp_path / "parts", LENGTHS * 3)
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "parts.idx").read_bytes()
    assert IndexedCorpus(tmp_path / "parts").num_tokens == 3 * sum(LENGTHS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"magic": b"NOTINDEX\0"}, "starts with b'NOTINDEX"),
        ({"version": 2}, "version 2, expected 1"),
        ({"code": 6}, "dtype code 6"),
        ({"code": 99}, "dtype code 99"),
        ({"sequences": 2**63}, "9223372036854775808 sequences"),
        ({"sequences": 2**64 - 1, "documents": 2**64 - 1}, "sequences"),
        ({"sequences": 5}, "5 sequences"),
        ({"documents": 0}, "0 document entries"),
        ({"documents": 2**61}, "document entries"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, changes, message):
    write_corpus(tmp_path / "X", LENGTHS)
    index_with(tmp_path / "X.idx", **changes)
    with pytest.raises(ValueError, match=message):
        IndexedCorpus(tmp_path / "X")


@pytest.mark.parametrize(
    "offset, format, value, message",
    [
        (HEADER.size + 4, "<i", -1, "sequence 1 has length -1"),
        (HEADER.size + 4, "<i", 2**31 - 1, "sequence 1 of its index needs 2147483647 tokens"),
        (HEADER.size + 4 * 6, "<q", -2, "sequence 0 starts at byte -2"),
        (HEADER.size + 4 * 6 + 8, "<q", 7, "sequence 1 starts at byte 7"),
        (HEADER.size + 4 * 6 + 8, "<q", 2**62, "sequence 1 of its index needs"),
        (HEADER.size + 12 * 6, "<q", 1, "documents from 1 to 6"),
        (HEADER.size + 12 * 6 + 8, "<q", 5, "decrease"),
        (HEADER.size + 12 * 6 + 48, "<q", 7, "documents from 0 to 7"),
    ],
)
def test_hostile_lengths_pointers_and_documents_are_refused(tmp_path, offset, format, value, message):
    write_corpus(tmp_path / "X", LENGTHS)
    data = bytearray((tmp_path / "X.idx").read_bytes())
    struct.pack_into(format, data, offset, value)
    (tmp_path / "X.idx").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        IndexedCorpus(tmp_path / "X")


@pytest.mark.parametrize("keep", [0, 5, HEADER.size - 1, HEADER.size, HEADER.size + 10, -1])
def test_a_truncated_index_is_refused(tmp_path, keep):
    write_corpus(tmp_path / "X", LENGTHS)
    (tmp_path / "X.idx").write_bytes((tmp_path / "X.idx").read_bytes()[:keep])
    with pytest.raises(ValueError, match="X.idx is not a usable index: .* bytes"):
        IndexedCorpus(tmp_path / "X")


@pytest.mark.parametrize("keep, message", [(-2, "truncated"), (-1, "multiple of 2"), (0, "truncated")])
def test_truncated_tokens_are_refused(tmp_path, keep, message):
    write_corpus(tmp_path / "X", LENGTHS)
    (tmp_path / "X.bin").write_bytes((tmp_path / "X.bin").read_bytes()[:keep])
    with pytest.raises(ValueError, match=message):
        IndexedCorpus(tmp_path / "X")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="X.idx does not exist"):
        IndexedCorpus(tmp_path / "X")
    write_corpus(tmp_path / "X", LENGTHS)
    with pytest.raises(FileNotFoundError, match="without the suffix"):
        IndexedCorpus(tmp_path / "X.idx")


def test_mode_bytes_after_the_index_are_allowed(tmp_path):
    write_corpus(tmp_path / "X", LENGTHS)
    with open(tmp_path / "X.idx", "ab") as stream:
        stream.write(bytes(len(LENGTHS)))
    assert len(IndexedCorpus(tmp_path / "X")) == len(LENGTHS)


def test_scattered_pointers_read_right(tmp_path):
    tokens = write_corpus(tmp_path / "X", LENGTHS)
    starts = np.cumsum(LENGTHS) - LENGTHS
    order = np.array([4, 0, 2, 2])
    with open(tmp_path / "X.idx", "wb") as stream:
        write_index(stream, token_dtype(60_000), np.array(LENGTHS)[order], 2 * starts[order])
    corpus = IndexedCorpus(tmp_path / "X")
    for number, unit in enumerate(order):
        np.testing.assert_array_equal(corpus[number], tokens[starts[unit] : starts[unit] + LENGTHS[unit]])


@pytest.mark.parametrize(
    "tokens, lengths, message",
    [
        ([1, 300], [2], "vocabulary ends at 299"),
        ([-1, 2], [2], "token ids from -1"),
        ([1, 2], [3], "2 tokens, but lengths that sum to 3"),
        ([1, 2], [3, -1], "lengths"),
    ],
)
def test_the_writer_refuses_wrong_units_and_leaves_nothing(tmp_path, tokens, lengths, message):
    with pytest.raises(ValueError, match=message), CorpusWriter(tmp_path / "X", 300) as writer:
        writer.add(np.array(tokens), np.array(lengths))
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_of_one_name_is_refused(tmp_path):
    with CorpusWriter(tmp_path / "X", 300) as writer:
        writer.add(np.array([1]), np.array([1]))
        with pytest.raises(ValueError, match="written by another process"):
            CorpusWriter(tmp_path / "X", 300)
    assert len(IndexedCorpus(tmp_path / "X")) == 1


def test_magic_is_megatrons():
    assert MAGIC == b"MMIDIDX\x00\x00" and HEADER.size == 34
