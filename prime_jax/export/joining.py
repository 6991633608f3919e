"""One file of two: what lies in a bundle stands alone, so it holds what it would import of its sister."""

import ast
from collections.abc import Sequence

from prime_jax.export.interface import JOINED

READING = (
    *("FORMATS", "_DTYPES", "PredictorError", "CheckpointError"),
    *("verify", "read_safetensors", "_read_json", "_with_weights", "_opened"),
)
"""What of torch_runtime.py opens a bundle of any kind."""


def joined(source: str, sister: str, names: Sequence[str]) -> str:
    """A module with what it imports of its sister written out.

    Args:
        source: Text of the module; what it imports of the library is imported last, before `JOINED`.
        sister: Text of the module that it imports from.
        names: Of the assignments, functions and classes to take of that, with all that they need.

    Raises:
        KeyError: If one of them is not defined at its top.
    """
    head, _, rest = source.partition(JOINED)
    head = head[: head.index("from prime_jax.")]
    nodes = ast.parse(sister).body
    named = {_name(node): node for node in nodes}
    chosen = sorted((named[name] for name in names), key=lambda node: node.lineno)
    used = {part.id for node in chosen for part in ast.walk(node) if isinstance(part, ast.Name)}
    there = {alias.name for node in ast.parse(head).body for alias in getattr(node, "names", ())}
    imports = [
        ast.unparse(type(node)(**{**vars(node), "names": wanted}))
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        if (wanted := [alias for alias in node.names if alias.name in used - there])
    ]
    taken = [str(ast.get_source_segment(sister, node)) for node in chosen]
    return head.rstrip() + "\n" + "\n".join(imports) + "\n\n\n" + "\n\n\n".join(taken) + "\n" + rest


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    return node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
