"""Evaluation: the predictor beside tuned baselines, with significance and a report."""

UNTRAINED = ("query", "mean_context", "recency_mix", "text", "ridge", "ridge_context")
"""What needs no training of a model (`prime_jax.evaluate.untrained`), the simplest first."""
