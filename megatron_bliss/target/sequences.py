"""Training sequences of the target: megatron-core's GPTDataset over one prefix, or its blend over several.

Documents are shuffled, joined and cut into sequences of ``seq_length`` tokens, over as many epochs as are needed. In a
blend every prefix does so by itself, and BlendedDataset draws from them such that after any number of sequences each
prefix has had its share, to within one sequence.
Sequence k of a segment is a function of (corpus, seed, k) alone: not of the number of ranks, nor of where a run was
stopped.

Shapes: b sequences of one micro-batch, s tokens.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_bliss.base.files import read_json, sha256_file, write_json
from megatron_bliss.base.parallel import Groups, broadcast_object, failing_together

CACHE_MARKER = "complete.json"


@dataclass(frozen=True)
class _Tokenizer:
    """The little that GPTDataset asks of a tokenizer: the ids are in the corpus already."""

    vocab_size: int | None = None
    eod: int | None = None

    @property
    def unique_identifiers(self) -> dict:
        return {"class": type(self).__name__}


@dataclass(frozen=True)
class MicroBatch:
    """tokens and labels int64 [b, s]; loss_mask fp32 [b, s], 1 where the label counts."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on ``device``."""
        return MicroBatch(*(part.to(device, non_blocking=True) for part in (self.tokens, self.labels, self.loss_mask)))


@dataclass(frozen=True)
class SequenceSource:
    """Where sequences come from, how many there are and in which order: all that decides their tokens."""

    prefix: str
    vocab_size: int
    seq_length: int
    num_samples: int
    seed: int
    blend: Sequence[tuple[str, float]] = ()
    """Further (prefix, share of the sequences); ``prefix`` has the rest."""


class TrainingSequences:
    """The sequences of a source, dealt to data-parallel ranks in micro-batches."""

    def __init__(
        self, source: SequenceSource, groups: Groups, *, cache_folder: str | Path, num_workers: int = 0
    ) -> None:
        """Collective. The shuffled order is made once on the main rank and kept in ``cache_folder``.

        ValueError where a blend leaves nothing to the first corpus, or a corpus has not one sequence.
        """
        self.source, self.groups, self.num_workers = source, groups, num_workers
        shares = _shares(source.prefix, source.blend)
        digest = None
        with failing_together(groups):
            if groups.is_main:
                digest = prepare_cache(list(shares), Path(cache_folder))
        self.digest: str = broadcast_object(digest, groups)
        """SHA-256 of the index, or of those of a blend: a resumed run compares it with its checkpoint's."""
        config = GPTDatasetConfig(
            random_seed=source.seed % 2**32,
            sequence_length=source.seq_length,
            path_to_cache=str(cache_folder),
            tokenizer=_Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        for builds in (True, False):  # the main rank writes the cache, the others then read it
            with failing_together(groups):
                if groups.is_main == builds:
                    self.dataset = _open(shares, config, source.num_samples)
                    if builds:
                        write_json(Path(cache_folder) / CACHE_MARKER, {"index_sha256": digest})

    def micro_batches(self, first: int, count: int, micro_batch_size: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of ``count`` sequences per iteration, from sequence ``first`` to the end.

        Within an iteration the k-th micro-batch of data-parallel rank r holds sequences k x size x ranks + r x size and
        the ``micro_batch_size`` - 1 after it.
        """
        groups = self.groups
        stride = micro_batch_size * groups.data_parallel_size
        assert count % stride == 0
        starts = range(first + groups.data_parallel_rank * micro_batch_size, self.source.num_samples, stride)
        loader = DataLoader(
            self.dataset,
            batch_sampler=[range(start, start + micro_batch_size) for start in starts],
            num_workers=self.num_workers,
            collate_fn=_stack,
            generator=torch.Generator(),  # so that opening a loader draws nothing from the program's generator
            pin_memory=groups.device.type == "cuda",
        )
        for micro_batch in map(self._checked, loader):
            yield micro_batch.to(groups.device)

    def _checked(self, parts: tuple[Tensor, Tensor, Tensor]) -> MicroBatch:
        largest = int(parts[1].max())
        if largest >= self.source.vocab_size:
            raise ValueError(
                f"found token id {largest} in {self.source.prefix}, expected ids below the vocabulary's "
                f"{self.source.vocab_size}: the corpus was made with another tokenizer than its manifest says"
            )
        return MicroBatch(*parts)


def _stack(samples: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    tokens, labels, loss_mask = (torch.stack([sample[key] for sample in samples]) for key in _KEYS)
    return tokens, labels, loss_mask


_KEYS = ("tokens", "labels", "loss_mask")


SURPLUS = 1.005
"""A blend may take a few sequences more from a corpus than its share of all: megatron-core's own margin."""


def _shares(prefix: str, blend: Sequence[tuple[str, float]]) -> dict[str, float]:
    """{prefix: share of the sequences}, the first being what the others leave."""
    rest = 1.0 - sum(share for _, share in blend)
    if any(share <= 0 for _, share in blend) or rest <= 0 or prefix in dict(blend) or len(dict(blend)) < len(blend):
        described = ", ".join(f"{other} {share:g}" for other, share in blend)
        raise ValueError(
            f"found a blend of {described}, expected different prefixes with positive shares that leave some of the "
            f"sequences to {prefix}: change data.blend_prefixes or data.blend_weights"
        )
    return {prefix: rest, **dict(blend)}


def _open(shares: dict[str, float], config: GPTDatasetConfig, num_samples: int) -> GPTDataset | BlendedDataset:
    if len(shares) == 1:
        return _open_one(next(iter(shares)), config, num_samples)
    counts = [math.ceil(share * num_samples * SURPLUS) + 1 for share in shares.values()]
    parts = [_open_one(prefix, config, count) for prefix, count in zip(shares, counts, strict=True)]
    return BlendedDataset(parts, list(shares.values()), num_samples, config)


def _open_one(prefix: str, config: GPTDatasetConfig, num_samples: int) -> GPTDataset:
    corpus = IndexedDataset(prefix, multimodal=False, mmap=True)
    lengths = corpus.sequence_lengths
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens <= config.sequence_length:
        raise ValueError(
            f"found {tokens} tokens in {prefix}, expected more than data.seq_length={config.sequence_length}: lower "
            "data.seq_length, or give the stage more data (a larger corpus, or a larger selection.fraction)"
        )
    documents = np.arange(len(lengths), dtype=np.int32)
    return GPTDataset(corpus, prefix, documents, num_samples, Split.train, config)


def prepare_cache(prefixes: str | Sequence[str], folder: Path) -> str:
    """Empty a cache that is unfinished or belongs to other indexes; returns the SHA-256 of the index, or of them all.

    megatron-core's own key does not look inside the index.
    """
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    digests = [sha256_file(f"{prefix}.idx") for prefix in prefixes]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    marker = folder / CACHE_MARKER
    if folder.exists() and not (marker.is_file() and read_json(marker).get("index_sha256") == digest):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return digest
