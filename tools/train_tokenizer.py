"""Train a tokenizer on text: byte-level BPE (tokenizer.json) or SentencePiece (.model), with <|endoftext|> as
EOD.

The same files and options give the same tokenizer.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator

from megatron_bliss.base.command import command
from megatron_bliss.base.files import atomic_file
from megatron_bliss.data.ingest.sources import SUFFIXES, expand_inputs, read_documents

EOD_TOKEN = "<|endoftext|>"
NUM_BYTES = 256


def texts(files: list[str], keys: list[str], max_bytes: int) -> Iterator[str]:
    """Texts of files of any kind in order, up to ``max_bytes`` of UTF-8 (0: all); unusable lines are passed over."""
    used = 0
    for file in files:
        for found in read_documents(file, keys):  # preprocess_data.py reports what cannot be used
            for text in found.texts:
                used += len(text.encode("utf-8"))
                yield text
                if max_bytes and used >= max_bytes:
                    return


def train_byte_level_bpe(corpus: Iterator[str], vocab_size: int) -> bytes:
    """A byte-level BPE ``tokenizer.json``: every text can be encoded, EOD is id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str(pretty=True).encode("utf-8")


def train_sentencepiece(corpus: Iterator[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE ``.model``: unknown characters fall back to bytes, white space is kept, EOD is id 1."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in corpus for line in text.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,
            character_coverage=0.9995,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=EOD_TOKEN,
            num_threads=1,  # sums in another order give another model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"SentencePiece cannot train {vocab_size} pieces on this text ({error})") from error
    return model.getvalue()


TRAINERS = {"huggingface": train_byte_level_bpe, "sentencepiece": train_sentencepiece}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=f"files, folders or globs of {', '.join(SUFFIXES)}")
    add("--output", required=True, help="tokenizer.json or .model to write")
    add("--json-keys", nargs="+", default=["text"], help="keys that hold the text; several are joined by a newline")
    add("--tokenizer-type", default="huggingface", choices=list(TRAINERS), help="byte-level BPE or SentencePiece BPE")
    add("--vocab-size", type=int, default=8192, help="number of ids, EOD and the 256 bytes included")
    add("--max-megabytes", type=float, default=0, help="read no more text than this (0: all)")
    return parser.parse_args(arguments)


@command("train_tokenizer", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    if options.vocab_size <= NUM_BYTES + 2:
        raise ValueError(f"vocabulary of {options.vocab_size}, expected more than {NUM_BYTES + 2}: change --vocab-size")
    if os.path.isdir(options.output):
        raise ValueError(f"found a folder at {options.output}, expected the name of a file: change --output")
    corpus = texts(expand_inputs(options.input), options.json_keys, int(options.max_megabytes * 1e6))
    model = TRAINERS[options.tokenizer_type](corpus, options.vocab_size)
    os.makedirs(os.path.dirname(options.output) or ".", exist_ok=True)
    with atomic_file(options.output) as stream:
        stream.write(model)
    print(f"{options.output}: {len(model):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
