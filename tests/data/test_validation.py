import numpy as np
import pytest

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.tokenizers import load_tokenizer
from megatron_bliss.data.validation import ValidationCorpus, ValidationSettings, parse_split, prepare_validation
from tests.data.corpora import PASSAGES, documents, write_lines
from tools import inspect_index
from tools import prepare_validation as command


def make(tmp_path, records, kind="bytes", path=None, name="V", **changes):
    """A validation set of records, read back."""
    source = write_lines(tmp_path / "validation.jsonl", records)
    settings = {
        "inputs": [source],
        "output_prefix": str(tmp_path / name),
        "tokenizer_type": kind,
        "tokenizer_model": path,
    }
    prepare_validation(ValidationSettings(**settings, **changes))
    return ValidationCorpus(tmp_path / name)


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece", "bytes"])
@pytest.mark.parametrize("max_length", [1024, 24])
def test_the_label_is_the_last_word_and_the_context_the_rest(tmp_path, tokenizer_files, kind, max_length):
    tokenizer = load_tokenizer(kind, tokenizer_files[kind])
    passages = [*PASSAGES, "trailing space is not a word  \n"]
    validation = make(
        tmp_path, [{"text": text} for text in passages], kind, tokenizer_files[kind], max_length=max_length
    )
    tokens, mask, lengths = validation.gather(np.arange(len(passages)), max_length)
    assert not mask[:, 0].any() and mask.dtype == bool and lengths.max() <= max_length
    for row, text in enumerate(passages):
        labelled, word = np.flatnonzero(mask[row]), text.split()[-1]
        assert labelled[-1] == lengths[row] - 1 and (np.diff(labelled) == 1).all()
        assert tokenizer.decode(tokens[row][mask[row]]).strip() == word
        whole = tokenizer.encode_batch([text.rstrip()])[0]
        assert tokens[row, : lengths[row]].tolist() == whole[-max_length:]
        # not a token more than the word: without the first labelled token the word is incomplete
        assert not tokenizer.decode(tokens[row, labelled[1:]]).endswith(word)


def test_label_all_is_every_token_but_the_first_of_a_piece(tmp_path):
    validation = make(tmp_path, [{"text": "x" * 20}, {"text": "y" * 9}], label="all", max_length=8)
    assert IndexedCorpus(tmp_path / "V").lengths.tolist() == [8, 8, 4, 8]  # the ninth y alone predicts nothing
    tokens, mask, lengths = validation.gather(np.arange(4), 8)
    for row in range(4):
        assert mask[row].tolist() == [0 < column < lengths[row] for column in range(8)]
    assert validation.manifest["counts"]["labelled"] == mask.sum() == 7 + 7 + 3 + 7
    assert validation.labels.sum() == mask.sum()


def test_a_shorter_view_keeps_the_label_and_never_labels_its_first_token(tmp_path):
    validation = make(tmp_path, [{"text": "one two three"}])
    tokens, mask, lengths = validation.gather(np.array([0]), 7)
    assert bytes(tokens[0].astype(np.uint8)) == b"o three" and mask[0].tolist() == [False] * 2 + [True] * 5
    tokens, mask, lengths = validation.gather(np.array([0]), 3)
    assert bytes(tokens[0].astype(np.uint8)) == b"ree" and mask[0].tolist() == [False, True, True]


def test_splits_interleave_and_cover(tmp_path):
    records = [{"text": f"context number {number}"} for number in range(11)]
    parts = []
    for part in (1, 2, 3):
        validation = make(tmp_path, records, name=f"V{part}", split=(part, 3))
        texts = [bytes(validation.corpus[unit].astype(np.uint8)).decode() for unit in range(len(validation))]
        assert texts == [record["text"] for record in records[part - 1 :: 3]]
        parts += texts
    assert sorted(parts) == sorted(record["text"] for record in records)


def test_passages_that_cannot_be_used_are_set_aside_up_to_the_limit(tmp_path):
    records = [{"text": "word"}, {"text": ""}, b"{", {"text": "a " + "long" * 10}, {"text": "fine passage"}]
    validation = make(tmp_path, records, max_length=16, max_bad_fraction=0.8)
    assert len(validation) == 1 and validation.manifest["counts"]["rejected"] == 4
    reasons = (tmp_path / "V.rejected.jsonl").read_text()
    assert "a single word" in reasons and "takes 40 tokens, expected fewer than the 16" in reasons
    with pytest.raises(ValueError, match="4 of 5 lines could not be used"):
        make(tmp_path, records, name="W", max_length=16)
    assert not list(tmp_path.glob("W.bin")) and not list(tmp_path.glob("*.tmp"))


def test_a_corpus_is_no_validation_set(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", documents(3))
    preprocess(PreprocessSettings(inputs=[source], output_prefix=str(tmp_path / "X"), tokenizer_type="bytes"))
    with pytest.raises(ValueError, match="X is a corpus, expected a validation set"):
        ValidationCorpus(tmp_path / "X")


def test_labels_of_another_set_are_refused(tmp_path):
    make(tmp_path, [{"text": "one two"}])
    np.save(tmp_path / "V.labels.npy", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"holds uint8\[3\], expected uint8\[7\]"):
        ValidationCorpus(tmp_path / "V")
    (tmp_path / "V.labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match="V.labels.npy does not exist"):
        ValidationCorpus(tmp_path / "V")


def test_impossible_settings_say_which_option_to_change():
    assert parse_split("2/3") == (2, 3)
    for text in ("0/2", "3/2", "2", "a/b", "1/2/3"):
        with pytest.raises(ValueError, match="--split"):
            ValidationSettings(inputs=[], output_prefix="V", tokenizer_type="bytes", split=parse_split(text))
    for changes in ({"label": "first"}, {"max_length": 1}):
        with pytest.raises(ValueError, match="change --"):
            ValidationSettings(inputs=[], output_prefix="V", tokenizer_type="bytes", **changes)


def test_the_command_says_what_it_made_and_refuses_another_split(tmp_path, capsys):
    source = write_lines(tmp_path / "v.jsonl.gz", [{"text": text} for text in PASSAGES])
    options = ["--input", source, "--output-prefix", str(tmp_path / "V"), "--tokenizer-type", "bytes"]
    assert command.main([*options, "--split", "1/2"]) == 0
    assert "2 units" in capsys.readouterr().out
    assert command.main([*options, "--split", "2/2"]) == 1
    assert "finished with another split" in capsys.readouterr().err
    assert inspect_index.main(["sample", str(tmp_path / "V")]) == 0
    assert "[label: 'harbour']" in capsys.readouterr().out
