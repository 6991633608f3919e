"""Hybrid training: watch an optimizer, predict where it goes, correct with few gradients, keep what helps.

Wraps any jitted optax step; start at `wrap.HybridTrainer`. Knows jax and optax only.
"""
