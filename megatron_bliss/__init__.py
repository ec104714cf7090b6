"""Choose the data a language model is pre-trained on by bilevel optimisation (BLISS), on megatron-core."""

import logging
import warnings

__version__ = "0.1.0"

# megatron-core warns at import that Transformer Engine and Apex are absent; both are optional here.
for _package in ("Apex is", "Transformer Engine and Apex are", "Transformer Engine is"):
    warnings.filterwarnings("ignore", message=f".*{_package} not installed")

# megatron-core imports torch's extension builder, which warns where there is a CUDA toolkit and no GPU, as on a login
# node. Nothing is built here; what a run computes on, it says itself.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime is found" not in record.msg)
