"""The score model: the language model's trunk, a masked mean over tokens, one linear unit (eq. 1).

(1) s_i = a(f(theta_s; xi_i)), a = sigmoid or identity.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.transformer import LanguageModel, Trunk

ACTIVATIONS = {"sigmoid": torch.sigmoid, "identity": lambda score: score}


class ScoreModel(Trunk):
    """``model(tokens[b, s], lengths[b]) -> scores[b]``, a applied; padding after ``lengths`` changes nothing."""

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
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"found activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}: change score.activation"
            )
        super().__init__(lm_trunk, seed=seed, dtype=dtype, device=device)
        self.activation = activation
        self.head = nn.Linear(lm_trunk.hidden_size, 1, dtype=dtype, device=device)
        draw = torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(seed + 2))
        with torch.no_grad():
            self.head.weight.copy_(draw.mul_(head_init_std))
            self.head.bias.zero_()

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Scores [b] of tokens [b, s], of which the first ``lengths`` [b] of each row are real (eq. 1).

        Mean and linear unit are at least fp32: scores in bf16 would be a few hundred numbers, full of ties.
        """
        longest = max(int(lengths.max()), 1)
        hidden_states = self.hidden_states(tokens[:, :longest])
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        real = torch.arange(longest, device=tokens.device) < lengths.unsqueeze(1)
        mean = (hidden_states.to(dtype) * real.unsqueeze(-1)).sum(1) / lengths.clamp(min=1).unsqueeze(1)
        unit = F.linear(mean, self.head.weight.to(dtype), self.head.bias.to(dtype))
        return ACTIVATIONS[self.activation](unit.squeeze(-1))


def build_score_model(
    config: ScoreConfig,
    architecture: Architecture,
    *,
    seed: int,
    trunk_from: LanguageModel | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ScoreModel:
    """A score model of ``architecture``, its trunk new or a copy of ``trunk_from``'s."""
    model = ScoreModel(architecture, config.activation, config.head_init_std, seed, dtype=dtype, device=device)
    if trunk_from is not None:
        _copy_trunk(trunk_from, model)
    return model


@torch.no_grad()
def _copy_trunk(source: LanguageModel, model: ScoreModel) -> None:
    tied = {"untie_embeddings_and_output_weights": True, "init_method_std": 0.0}  # neither shapes the trunk
    found, expected = replace(source.architecture, **tied), replace(model.architecture, **tied)
    if found != expected:
        raise ValueError(f"found a trunk of {found}, expected {expected}: set score.init_from to fresh")
    weights = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("head."):
            parameter.copy_(weights[name])
