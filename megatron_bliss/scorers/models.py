"""A score model (models/score.py) that reads windows: batches of like lengths, rows copied, one check per block.

Windows of a block are sorted by length and cut into batches of a bounded number of tokens, padding included, so that
little of it is padding. A thread makes the next batches while the device works on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_bliss.base.platform import DTYPES
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.score import ScoreModel, score_model_of
from megatron_bliss.models.score_architecture import NgramArchitecture, ScoreArchitecture
from megatron_bliss.scorers.record import record_of
from megatron_bliss.scorers.windows import Windows

BATCHES_AHEAD = 2
"""Made by the thread before they are asked for."""
ALIKE = 0.92
"""Shortest window of a batch, as a share of its longest, so that less than a twelfth of it is padding ..."""
FEWEST_PLACES, FEWEST_SHARE = 4096, 16
"""... unless the batch would be smaller than so many places, or than a sixteenth of what it may be."""


@dataclass
class Padding:
    """Tokens that a model has read, and places of its batches, padding included."""

    tokens: int = 0
    places: int = 0

    @property
    def waste(self) -> float:
        """Share of the places that were padding."""
        return 1 - self.tokens / self.places if self.places else 0.0


@dataclass(frozen=True)
class Reading:
    """How a model reads."""

    device: torch.device = torch.device("cpu")
    batch_tokens: int = 1 << 14
    """Places of a batch; a batch has one window at least."""
    params_dtype: str = "fp32"
    """Of the trunk; the mean over tokens and the linear unit stay fp32."""
    compile: bool = False
    """Fuse the trunk's element-wise work with torch.compile."""


@dataclass(frozen=True)
class _Described:
    activation: str
    trunk: dict
    ngrams: dict | None
    eod: int | None


class ModelScorer:
    """The model, ready to read. Its parameters are moved and cast as ``reading`` says."""

    kind = "model"

    def __init__(self, model: ScoreModel, reading: Reading = Reading()) -> None:
        self.model, self.reading, self.padding = model, reading, Padding()
        self._weights = model.state_dict()
        self.vocab_size = model.score_architecture.trunk.vocab_size
        self._ready: ScoreModel | None = None

    def describe(self) -> dict:
        """What the folder says of it beside its weights."""
        parts, ngrams = self.model.score_architecture, getattr(self.model, "ngrams", None)
        return {
            "activation": self.model.activation,
            "trunk": asdict(parts.trunk),
            "ngrams": None if ngrams is None else asdict(parts.ngrams),
            "eod": None if ngrams is None else ngrams.eod,
        }

    def weights(self) -> dict[str, np.ndarray]:
        """Arrays by name, fp32."""
        return {name: tensor.detach().float().cpu().numpy() for name, tensor in self._weights.items()}

    @classmethod
    def load(cls, described: Mapping, weights: Mapping[str, np.ndarray]) -> ModelScorer:
        """From what :meth:`describe` and :meth:`weights` gave; ValueError for anything else.

        Nothing is allocated before the weights are known to have the sizes described.
        """
        kept = record_of(_Described, described)
        trunk = record_of(Architecture, kept.trunk)
        ngrams = None if kept.ngrams is None else record_of(NgramArchitecture, kept.ngrams)
        if trunk.num_layers > len(weights):
            raise ValueError(f"found {len(weights)} weights in a scorer of {trunk.num_layers} layers: export it again")
        model = score_model_of(ScoreArchitecture(trunk, ngrams), kept.activation, kept.eod, device="meta")
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(array.shape) for name, array in weights.items()}
        if found != expected:
            name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise ValueError(
                f"found weights {name} {found.get(name)} in a scorer, expected {expected.get(name)}: export it again"
            )
        model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, assign=True)
        return cls(model.requires_grad_(False))

    def score_windows(self, tokens: np.ndarray, windows: Windows) -> np.ndarray:
        """Scores float32 [k] of windows over tokens [t]; where some are not finite, so are theirs."""
        model = self._model()
        order = np.argsort(-windows.sizes, kind="stable")
        parts = list(self._batches(windows.sizes[order]))
        scores = torch.empty(len(windows), dtype=torch.float32, device=self.reading.device)
        with torch.no_grad():
            for part, (padded, lengths, longest) in zip(parts, self._made(tokens, windows, order, parts), strict=True):
                scores[part] = model(padded, lengths, longest).float()
        found = np.empty(len(windows), np.float32)
        found[order] = scores.cpu().numpy()
        return found

    def _model(self) -> ScoreModel:
        if self._ready is None:
            how = self.reading
            model = self.model.to(how.device).to(DTYPES[how.params_dtype]).eval()
            self._ready = torch.compile(model, dynamic=True) if how.compile else model
        return self._ready

    def _batches(self, sizes: np.ndarray) -> Iterator[slice]:
        """Parts of windows that are sorted, longest first."""
        start, most = 0, self.reading.batch_tokens
        while start < len(sizes):
            longest = max(int(sizes[start]), 1)
            alike = int(np.searchsorted(-sizes, -ALIKE * longest, side="right")) - start
            fewest = max(most // FEWEST_SHARE, FEWEST_PLACES) // longest
            rows = max(1, min(most // longest, max(alike, fewest)))
            yield slice(start, min(start + rows, len(sizes)))
            start += rows

    def _made(
        self, tokens: np.ndarray, windows: Windows, order: np.ndarray, parts: list[slice]
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """The batches on the device: int32 [b, s], int64 [b], s."""
        with ThreadPoolExecutor(1) as thread:
            made = []
            for part in parts:
                made.append(thread.submit(self._padded, tokens, windows, order[part]))
                if len(made) > BATCHES_AHEAD:
                    yield self._on_device(*made.pop(0).result())
            for one in made:
                yield self._on_device(*one.result())

    def _padded(self, tokens: np.ndarray, windows: Windows, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        sizes = windows.sizes[chosen]
        padded = np.zeros((len(chosen), max(int(sizes[0]), 1)), dtype=np.int32)
        for row, start, size in zip(padded, windows.starts[chosen].tolist(), sizes.tolist(), strict=True):
            row[:size] = tokens[start : start + size]
        self.padding.tokens += int(sizes.sum())
        self.padding.places += padded.size
        return torch.from_numpy(padded), torch.from_numpy(sizes)

    def _on_device(self, padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, int]:
        if torch.cuda.is_available():
            padded, lengths = padded.pin_memory(), lengths.pin_memory()
        moved = (one.to(self.reading.device, non_blocking=True) for one in (padded, lengths))
        return *moved, padded.shape[1]


def batch_tokens(model: ScoreModel, params_dtype: str, memory_gib: float) -> int:
    """Places of a batch whose pass is estimated to stay under a bound, parameters not counted."""
    arch = model.score_architecture
    itemsize = torch.empty(0, dtype=DTYPES[params_dtype]).element_size()
    trunk = asdict(arch.trunk)
    # a block's widest moment: both sides of the activation beside the residual, its norms, what attention gave, and
    # queries, keys and values with their rotated copies, freed by then, but in pieces that do not fit what comes; then
    # the mean in fp32. Held against measured peaks of Pythia and Llama, which are 0.8 to 1 of it.
    widths = 13 * trunk["hidden_size"] + 2 * trunk["ffn_hidden_size"]
    per_token = itemsize * widths + 4 * trunk["hidden_size"] + arch.table_pass_bytes(1)
    return max(1, int(memory_gib * 2**30 / per_token))
