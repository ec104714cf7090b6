"""The score model (eq. 1): a trunk with a linear unit, a table of n-grams, or their sum (families/).

(1) s_i = a(f(theta_s; xi_i)), a = sigmoid or identity; f: the raw score, a sum over the model's parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.data.ngrams import bucket_of, hashed_ngrams
from megatron_bliss.models.families import FAMILIES
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.score_architecture import NgramArchitecture, ScoreArchitecture
from megatron_bliss.models.transformer import LanguageModel, Trunk

ACTIVATIONS = {"sigmoid": torch.sigmoid, "identity": lambda score: score}


class ScoreModel(nn.Module):
    """``model(tokens[b, s], lengths[b]) -> scores[b]``, a applied; padding after ``lengths`` changes nothing."""

    activation: str
    score_architecture: ScoreArchitecture

    def raw_scores(self, tokens: Tensor, lengths: Tensor, longest: int | None = None) -> Tensor:
        """f [b] of tokens [b, s], of which the first ``lengths`` [b] of each row are real; at least fp32.

        longest: of the lengths, where it is known, so that no device is asked for it.
        """
        raise NotImplementedError

    def forward(self, tokens: Tensor, lengths: Tensor, longest: int | None = None) -> Tensor:
        """Scores [b] (eq. 1)."""
        return ACTIVATIONS[self.activation](self.raw_scores(tokens, lengths, longest))


class TrunkScoreModel(Trunk, ScoreModel):
    """The language model's trunk, a masked mean over tokens, one linear unit."""

    def __init__(
        self,
        lm_trunk: Architecture,
        activation: str = "sigmoid",
        head_init_std: float = 0.0,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__(lm_trunk, seed=seed, dtype=dtype, device=device)
        self.activation, self.score_architecture = _known(activation), ScoreArchitecture(trunk=lm_trunk)
        self.head = nn.Linear(lm_trunk.hidden_size, 1, dtype=dtype, device=device)
        draw = torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(seed + 2))
        with torch.no_grad():
            self.head.weight.copy_(draw.mul_(head_init_std))
            self.head.bias.zero_()

    def raw_scores(self, tokens: Tensor, lengths: Tensor, longest: int | None = None) -> Tensor:
        """f [b].

        Mean and linear unit are at least fp32: scores in bf16 would be a few hundred numbers, full of ties.
        """
        longest = max(int(lengths.max()), 1) if longest is None else longest
        hidden_states = self.hidden_states(tokens[:, :longest])
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        real = torch.arange(longest, device=tokens.device) < lengths.unsqueeze(1)
        mean = (hidden_states.to(dtype) * real.unsqueeze(-1)).sum(1) / lengths.clamp(min=1).unsqueeze(1)
        unit = F.linear(mean, self.head.weight.to(dtype), self.head.bias.to(dtype))
        return unit.squeeze(-1)


class NgramTable(nn.Module):
    """f = scale x mean over a unit's hashed n-grams of table[bucket]; 0 everywhere at the start.

    N-grams with the token ``eod`` are left out (None: none is), as the arm dsir does; a unit without any has f = 0.
    """

    def __init__(self, arch: NgramArchitecture, eod: int | None, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.arch, self.eod = arch, eod
        self.table = nn.Parameter(torch.zeros(arch.buckets, 1, dtype=dtype, device=device))  # a matrix: it may decay

    def forward(self, tokens: Tensor, lengths: Tensor, longest: int | None = None) -> Tensor:
        """f [b] of tokens [b, s]; the gradient is that of an embedding, which adds up in a fixed order."""
        longest = max(int(lengths.max()), 1) if longest is None else longest
        tokens = tokens[:, :longest].long()  # hashes take 64 bits
        usable = torch.arange(longest, device=tokens.device) < lengths.unsqueeze(1)
        if self.eod is not None:
            usable &= tokens != self.eod
        hashes, complete = zip(*hashed_ngrams(tokens, usable, self.arch.max_ngram), strict=True)
        counts = torch.cat(complete, 1)  # [b, n-grams]
        entries = F.embedding(bucket_of(torch.cat(hashes, 1), self.arch.buckets), self.table).squeeze(-1)
        mean = entries.masked_fill(~counts, 0.0).sum(1) / counts.sum(1).clamp(min=1)
        return self.arch.scale * mean

    def _apply(self, fn, recurse: bool = True):
        """Moves to another device with its model, but keeps its precision: there is nothing to gain in a lower one."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class NgramScoreModel(ScoreModel):
    """A linear model over hashed n-grams."""

    def __init__(self, ngrams: NgramTable, activation: str):
        super().__init__()
        self.activation, self.score_architecture = _known(activation), ScoreArchitecture(ngrams=ngrams.arch)
        self.ngrams = ngrams

    def raw_scores(self, tokens: Tensor, lengths: Tensor, longest: int | None = None) -> Tensor:
        """f [b]."""
        return self.ngrams(tokens, lengths, longest)


class SumScoreModel(TrunkScoreModel):
    """The sum of a trunk's and a table's raw scores."""

    def __init__(self, lm_trunk: Architecture, ngrams: NgramTable, *arguments, **options):
        super().__init__(lm_trunk, *arguments, **options)
        self.score_architecture, self.ngrams = ScoreArchitecture(lm_trunk, ngrams.arch), ngrams

    def raw_scores(self, tokens: Tensor, lengths: Tensor, longest: int | None = None) -> Tensor:
        """f [b]."""
        return super().raw_scores(tokens, lengths, longest) + self.ngrams(tokens, lengths, longest)


def build_score_model(
    config: ScoreConfig,
    architecture: Architecture,
    *,
    seed: int,
    trunk_from: LanguageModel | None = None,
    eod: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ScoreModel:
    """A score model of the family that ``config`` names; its trunk, if any, is new or a copy of ``trunk_from``'s.

    ``architecture``: the proxy's. ``eod``: the token that ends documents, for n-grams.
    """
    parts = FAMILIES[config.family].architecture(config, architecture)
    options = {"dtype": dtype, "device": device}
    ngrams = None if parts.ngrams is None else NgramTable(parts.ngrams, eod, **options)
    if parts.trunk is None:
        return NgramScoreModel(ngrams, config.activation)
    trunk = config.activation, config.head_init_std, seed
    if ngrams is None:
        model = TrunkScoreModel(parts.trunk, *trunk, **options)
    else:
        model = SumScoreModel(parts.trunk, ngrams, *trunk, **options)
    if trunk_from is not None:
        _copy_trunk(trunk_from, model)
    return model


def saved_score_model(state: Mapping, device: torch.device | str = "cpu") -> ScoreModel:
    """The score model in the final.pt of a bilevel stage, by what the file says of it (:func:`describe`)."""
    described = state["score"]
    config = ScoreConfig(**{one.name: described[one.name] for one in fields(ScoreConfig) if one.name in described})
    architecture = Architecture(**state["architecture"])
    model = build_score_model(config, architecture, seed=0, eod=described["eod"], device=device)
    model.load_state_dict(state["score_model"])
    return model


def describe(config: ScoreConfig, eod: int) -> dict:
    """What a score model's file has to say beside its weights and the proxy's architecture."""
    return asdict(config) | {"eod": eod}


def score_model_of(
    parts: ScoreArchitecture, activation: str, eod: int | None, *, device: torch.device | str = "cpu"
) -> ScoreModel:
    """A score model by its parts, with weights that are to be loaded."""
    options = {"dtype": torch.float32, "device": device}
    ngrams = None if parts.ngrams is None else NgramTable(parts.ngrams, eod, **options)
    if parts.trunk is None:
        return NgramScoreModel(ngrams, activation)
    if ngrams is None:
        return TrunkScoreModel(parts.trunk, activation, **options)
    return SumScoreModel(parts.trunk, ngrams, activation, **options)


def _known(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"found activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}: change score.activation"
        )
    return activation


@torch.no_grad()
def _copy_trunk(source: LanguageModel, model: TrunkScoreModel) -> None:
    tied = {"untie_embeddings_and_output_weights": True, "init_method_std": 0.0}  # neither shapes the trunk
    found, expected = replace(source.architecture, **tied), replace(model.architecture, **tied)
    if found != expected:
        raise ValueError(f"found a trunk of {found}, expected {expected}: set score.init_from to fresh")
    weights = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith(("head.", "ngrams.")):
            parameter.copy_(weights[name])
