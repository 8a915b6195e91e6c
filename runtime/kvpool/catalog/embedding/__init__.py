"""Embeddings of prompts: 512 numbers that lie close together where prompts have much in common. Pure."""

from kvpool.catalog.embedding.encoder import DIMENSIONS, PromptEncoder, Vector
from kvpool.catalog.embedding.hashed_ngrams import HashedNgrams

__all__ = ["DIMENSIONS", "HashedNgrams", "PromptEncoder", "Vector"]
