"""Tier 4: the catalog and small records in PostgreSQL, embeddings of prompts in Qdrant."""
