"""Why a steered model predicts what it predicts (JASPER plan, task 12)."""
