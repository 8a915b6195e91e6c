"""kvpool keeps the attention keys and values that LLM servers compute, so that the next prompt does not pay for them again.

The names below are the public face; they are loaded when first used, so that `kvpool.api` and `kvpool.config` import
without numpy or torch.
"""

__version__ = "0.1.0"
