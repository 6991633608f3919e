"""Exact search and ranking metrics over plain arrays; knows nothing of models or files."""

INDEXES = ("exact", "faiss", "hnsw", "qdrant")
"""What can search passages (`prime_jax.retrieval.indexes`)."""
