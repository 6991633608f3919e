"""Evaluation: the predictor beside tuned baselines, with significance and a report."""

UNTRAINED = ("query", "mean_context", "recency_mix", "text", "general", "ridge", "ridge_context")
"""What needs no training by its user (`prime_jax.evaluate.untrained`), the simplest first."""
