"""Choose the data a language model is pre-trained on by bilevel optimisation (BLISS), on megatron-core."""

import warnings

__version__ = "0.1.0"

# megatron-core warns at import that Transformer Engine and Apex are absent; both are optional here.
for _package in ("Apex is", "Transformer Engine and Apex are", "Transformer Engine is"):
    warnings.filterwarnings("ignore", message=f".*{_package} not installed")
