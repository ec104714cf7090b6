"""Whole models on every rank as models for lm-eval: proxies, and Hugging Face exports of the two block families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_bliss.base.parallel import Groups
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bliss.evaluation.adapter import Adapter
from megatron_bliss.evaluation.backbone import Backbone, Replicas, weights_digest
from megatron_bliss.evaluation.packing import Batch
from megatron_bliss.evaluation.vocabulary import VocabularyPart
from megatron_bliss.models.transformer import LanguageModel

EXPORTED = ("gpt_neox", "llama")
"""Model types whose logits are their last hidden states times an output matrix, and nothing more."""


class PlainBackbone(Backbone):
    """tokens [b, s] -> hidden states [b, s, w] by a function, and an output matrix [v, w]."""

    def __init__(
        self, module: torch.nn.Module, forward: Callable[[Tensor], Tensor], weight: Tensor, groups: Groups | None
    ) -> None:
        self._module, self._forward, self._weight = module, forward, weight.detach()
        self.device, self.replicas = weight.device, Replicas.of_ranks(groups)

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[Batch]) -> list[Tensor]:
        picked = []
        for batch in batches:
            hidden = self._forward(batch.tokens.to(self.device))
            picked.append(hidden[batch.rows.to(self.device), batch.columns.to(self.device)])
        return picked

    def vocabulary(self) -> VocabularyPart:
        return VocabularyPart(self._weight)

    def digest(self) -> str:
        return weights_digest(self._module.named_parameters())


class ProxyModel(Adapter):
    """A proxy; with ``groups`` every rank takes its share of the requests, and all must make the same calls."""

    def __init__(
        self,
        lm: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_tokens: int,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            PlainBackbone(lm, lm.hidden_states, lm.output_weight, groups),
            tokenizer,
            vocab_size=lm.architecture.vocab_size,
            max_length=max_length,
            batch_tokens=batch_tokens,
        )


class HuggingFaceModel(Adapter):
    """A folder with config.json, safetensors and tokenizer.json, of type gpt_neox or llama; nothing is fetched.

    ``max_length`` defaults to the model's own. Texts get no beginning-of-text token unless ``add_bos``.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        max_length: int | None = None,
        batch_tokens: int = 16384,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        groups: Groups | None = None,
        add_bos: bool = False,
        prefix_token: int | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type not in EXPORTED:
            raise ValueError(
                f"found a model of type {config.model_type} in {folder}, expected one of {', '.join(EXPORTED)}: "
                "evaluate others with lm-eval's own hf model"
            )
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
        model.to(groups.device if groups else device).eval()
        super().__init__(
            PlainBackbone(
                model,
                lambda tokens: model.base_model(tokens, use_cache=False).last_hidden_state,
                model.get_output_embeddings().weight,
                groups,
            ),
            load_tokenizer("huggingface", folder),
            vocab_size=config.vocab_size,
            max_length=max_length or config.max_position_embeddings,
            batch_tokens=batch_tokens,
            add_bos=add_bos,
            prefix_token=prefix_token,
        )
