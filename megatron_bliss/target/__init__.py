"""The LLM that is pre-trained: a megatron-core GPTModel under tensor x pipeline x data parallelism."""
