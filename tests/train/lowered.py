"""Reading a lowered training step: which matrix products it holds, and under which name each stands."""

import re
from typing import Any, NamedTuple


class MatrixProduct(NamedTuple):
    """One product of a program.

    Attributes:
        factors: Element types of its two factors, such as ("bf16", "f32").
        scope: Where it stands, outermost first, such as "jit(step)/transpose(jvp(info_nce))/dot_general".
    """

    factors: tuple[str, str]
    scope: str


def matrix_products(lowered: Any) -> list[MatrixProduct]:
    """All matrix products of what `jax.jit(...).lower(...)` gave, in the order of the program."""
    text = lowered.as_text(debug_info=True)
    names = dict(re.findall(r'^(#loc\d+) = loc\("([^"]*)"', text, re.MULTILINE))
    found = []
    for line in text.splitlines():
        if "stablehlo.dot_general" not in line and "stablehlo.dot " not in line:
            continue
        types = re.search(r": \(tensor<([^>]*)>, tensor<([^>]*)>\)", line)
        at = re.search(r"loc\((#loc\d+)\)", line)
        assert types is not None, line
        assert at is not None, line
        left, right = (part.split("x")[-1] for part in types.groups())
        found.append(MatrixProduct((left, right), names.get(at[1], "")))
    return found


def with_a_float32_factor(products: list[MatrixProduct], by_choice: set[str]) -> list[str]:
    """Scopes of the products with a float32 factor that are under none of the names `by_choice`."""
    allowed = re.compile(
        "|".join(rf"(?:^|[/(]){re.escape(name)}(?:[/)]|$)" for name in sorted(by_choice)) or r"(?!)"
    )
    return [one.scope for one in products if "f32" in one.factors and not allowed.search(one.scope)]
