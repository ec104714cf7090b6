import json
import shutil
from pathlib import Path

import pytest

from megatron_bliss.data.tokenizers import BytesTokenizer, load_recorded_tokenizer, load_tokenizer
from tests.data.corpora import PASSAGES
from tools import train_tokenizer

KINDS = ("huggingface", "sentencepiece", "bytes")


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back_from_its_tokens(tokenizer_files, kind):
    tokenizer = load_tokenizer(kind, tokenizer_files[kind])
    texts = [*PASSAGES, "tabs\tand  spaces\nand lines\n\n", "日本 🙂"]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.eod for ids in encoded for token in ids)
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_tokenizer_is_found_again(tokenizer_files, kind):
    tokenizer = load_tokenizer(kind, tokenizer_files[kind])
    again = load_recorded_tokenizer(json.loads(json.dumps(tokenizer.identity())))
    assert again.identity() == tokenizer.identity()
    with pytest.raises(ValueError, match=r"was made with fffff" if tokenizer.path else "was made with"):
        load_recorded_tokenizer({**tokenizer.identity(), "sha256": "f" * 64})


def test_bytes_need_no_file():
    tokenizer = BytesTokenizer()
    assert tokenizer.vocab_size == 257 and tokenizer.eod == 256
    assert tokenizer.encode_batch(["aß"]) == [[97, 195, 159]]
    assert tokenizer.decode([97, 195, 256]) == "a\ufffd"


def test_megatrons_names_for_the_kinds_are_understood(tokenizer_files):
    pairs = [("HuggingFaceTokenizer", "huggingface"), ("GPTSentencePieceTokenizer", "sentencepiece")]
    for name, kind in pairs:
        assert load_tokenizer(name, tokenizer_files[kind]).kind == kind


def test_a_folder_with_a_tokenizer_json_is_a_tokenizer(tokenizer_files, tmp_path):
    shutil.copy(tokenizer_files["huggingface"], tmp_path / "tokenizer.json")
    assert load_tokenizer("huggingface", tmp_path).vocab_size == 400


def test_truncation_and_padding_settings_of_a_file_are_ignored(tokenizer_files, tmp_path):
    content = json.loads(Path(tokenizer_files["huggingface"]).read_text())
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(content))
    plain, altered = (
        load_tokenizer("huggingface", path) for path in (tokenizer_files["huggingface"], tmp_path / "t.json")
    )
    assert altered.encode_batch([PASSAGES[0], "a"]) == plain.encode_batch([PASSAGES[0], "a"])


def test_errors_say_what_to_change(tokenizer_files, tmp_path):
    hugging_face, sentencepiece = tokenizer_files["huggingface"], tokenizer_files["sentencepiece"]
    with pytest.raises(ValueError, match="unknown tokenizer type 'gpt'.*--tokenizer-type"):
        load_tokenizer("gpt", hugging_face)
    with pytest.raises(ValueError, match="needs a file: give --tokenizer-model"):
        load_tokenizer("huggingface")
    with pytest.raises(FileNotFoundError, match="absent.json does not exist"):
        load_tokenizer("huggingface", tmp_path / "absent.json")
    with pytest.raises(ValueError, match="not a Hugging Face tokenizer.json"):
        load_tokenizer("huggingface", sentencepiece)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer("sentencepiece", hugging_face)
    for kind, path in (("huggingface", hugging_face), ("sentencepiece", sentencepiece)):
        with pytest.raises(ValueError, match=r"no end-of-document token: looked for <absent>.*--eod-token"):
            load_tokenizer(kind, path, eod_token="<absent>")


def test_a_file_without_an_end_of_document_token_says_what_it_has(tokenizer_files, tmp_path):
    content = Path(tokenizer_files["huggingface"]).read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"looked for <\|endoftext\|>.*its special tokens are <\|other\|>"):
        load_tokenizer("huggingface", tmp_path / "t.json")
    assert load_tokenizer("huggingface", tmp_path / "t.json", eod_token="<|other|>").eod == 0


def test_training_again_gives_the_same_file(tokenizer_files, tmp_path):
    source = tokenizer_files["huggingface"].replace("bpe.json", "text.jsonl")
    for kind, size in (("huggingface", "400"), ("sentencepiece", "330")):
        options = ["--input", source, "--output", str(tmp_path / kind), "--tokenizer-type", kind, "--vocab-size", size]
        assert train_tokenizer.main(options) == 0
        assert (tmp_path / kind).read_bytes() == Path(tokenizer_files[kind]).read_bytes()


def test_a_vocabulary_that_cannot_be_trained_is_refused(tokenizer_files, tmp_path, capsys):
    source = tokenizer_files["huggingface"].replace("bpe.json", "text.jsonl")
    options = ["--input", source, "--output", str(tmp_path / "t"), "--tokenizer-type", "sentencepiece"]
    assert train_tokenizer.main([*options, "--vocab-size", "100"]) == 1
    assert "change --vocab-size" in capsys.readouterr().err
    assert train_tokenizer.main([*options, "--vocab-size", "100000"]) == 1
    assert "cannot train 100000 pieces" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
