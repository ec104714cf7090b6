"""Corpora, subsets and validation sets, as Megatron reads them."""
