"""What training minimises."""

from prime_jax.losses.jasper import JasperObjective
from prime_jax.losses.objective import Objective

AnyObjective = Objective | JasperObjective
