"""Writes ONNX's Einsum as Transpose and MatMul.

ONNX Runtime's kernel of Einsum divides by the sizes of its inputs: an empty batch ends the consumer's process
(SIGFPE), and no option of a session prevents it. MatMul and Transpose take any size.
"""

from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import numpy as np

from prime_jax.errors import ExportError
from prime_jax.export.optional import need


def replace_einsums(model: Any) -> None:
    """Replace every Einsum of an `onnx_ir.Model` in place, without changing what it computes.

    Raises:
        ExportError: If one is more than a batched matrix product; the message has its equation.
    """
    for node in list(model.graph):
        if node.op_type == "Einsum" and node.domain in ("", "ai.onnx"):
            _replace(node)


def _replace(node: Any) -> None:
    ir = need("onnx_ir", "onnx")
    equation = node.attributes["equation"].as_string().replace(" ", "")
    inputs = list(node.inputs)
    terms = equation.partition("->")[0].split(",")
    if len(terms) != 2:
        raise _refused(equation)
    if terms[1].startswith("..."):
        inputs[1], bare = _not_repeated(inputs[1], terms[1][3:])
        equation = f"{terms[0]},{bare}->{equation.partition('->')[2]}"
    left, right, out = _written_out(equation, [value.shape for value in inputs])
    summed = [letter for letter in left if letter in right and letter not in out]
    letters = [*left, *right, *out]
    plain = len(summed) == 1 and all(len(set(term)) == len(term) for term in (left, right, out))
    if not plain or any(letters.count(letter) == 1 for letter in letters) or not "".join(letters).isalpha():
        raise _refused(equation)
    only_left = [letter for letter in out if letter not in right]
    only_right = [letter for letter in out if letter not in left]
    rows, columns = "".join(only_left[-1:]), "".join(only_right[-1:])
    lead = "".join(letter for letter in out if letter not in (rows, columns))
    sizes = {
        letter: size
        for term, value in zip((left, right), inputs, strict=True)
        if value.shape is not None
        for letter, size in zip(term, value.shape, strict=True)
    }
    made = _Nodes(node, sizes)
    first = made.arranged(inputs[0], left, lead, rows or "?", summed[0])
    second = made.arranged(inputs[1], right, lead, summed[0], columns or "?")
    whole = lead + (rows or "?") + (columns or "?")
    product = made.add("MatMul", [first, second], whole)
    if missing := [place for place, letter in enumerate(whole) if letter == "?"]:
        whole = whole.replace("?", "")
        product = made.add("Squeeze", [product, made.axes(missing)], whole)
    if whole != out:
        product = made.transposed(product, whole, out)
    last = made.nodes[-1]
    last.outputs[0].name = node.outputs[0].name
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], made.nodes, node.outputs, last.outputs)


def _refused(equation: str) -> ExportError:
    return ExportError(f"the model cannot be exported: no matrix product does what Einsum {equation!r} does")


def _not_repeated(value: Any, letters: str) -> tuple[Any, str]:
    """The constant behind a value that repeats it along further dimensions, and its own letters."""
    source = value
    while source.const_value is None and (producer := source.producer()) is not None:
        if producer.op_type not in ("Expand", "Reshape", "Unsqueeze"):
            break
        source = producer.inputs[0]
    repeated = source.const_value is not None and len(source.shape) == len(letters) < len(value.shape)
    if repeated and list(source.shape) == list(value.shape)[-len(letters) :]:
        return source, letters
    return value, f"...{letters}"


def _written_out(equation: str, shapes: Sequence[Any]) -> list[str]:
    """The terms of an equation of two inputs, letters in place of dots."""
    terms, _, out = equation.partition("->")
    sides = terms.split(",")
    dots = [0, 0]
    for place, (side, shape) in enumerate(zip(sides, shapes, strict=True)):
        if "..." in side:
            dots[place] = len(shape) - len(side.replace("...", ""))
    free = "".join(letter for letter in ascii_letters if letter not in equation)[: max(dots)]
    return [
        term.replace("...", free[len(free) - count :])
        for term, count in zip((*sides, out), (*dots, max(dots)), strict=True)
    ]


class _Nodes:
    """The nodes that take the place of one Einsum, in order."""

    def __init__(self, einsum: Any, sizes: dict[str, Any]):
        self._ir, self._einsum, self._sizes = need("onnx_ir", "onnx"), einsum, sizes
        self.nodes: list[Any] = []

    def add(self, kind: str, inputs: Sequence[Any], letters: str, **attributes: Any) -> Any:
        """Add a node, and return its output, whose dimensions are `letters` (`?` is 1)."""
        name = f"{self._einsum.outputs[0].name}_{kind.lower()}_{len(self.nodes)}"
        node = self._ir.node(kind, inputs, attributes=attributes)
        value = node.outputs[0]
        value.name, value.type = name, self._einsum.outputs[0].type
        if all(letter == "?" or letter in self._sizes for letter in letters):
            value.shape = self._ir.Shape([1 if letter == "?" else self._sizes[letter] for letter in letters])
        self.nodes.append(node)
        return value

    def transposed(self, value: Any, letters: str, wanted: str) -> Any:
        """The value with its dimensions in another order."""
        return self.add("Transpose", [value], wanted, perm=[letters.index(letter) for letter in wanted])

    def arranged(self, value: Any, letters: str, lead: str, row: str, column: str) -> Any:
        """The value as one side of a MatMul: `[lead, row, column]`, 1 where it lacks a dimension."""
        wanted = lead + row + column
        there = "".join(letter for letter in wanted if letter in letters)
        if there != letters:
            value = self.transposed(value, letters, there)
        missing = [place for place, letter in enumerate(wanted) if letter not in letters]
        first = next(place for place, letter in enumerate(wanted) if letter in letters)
        missing = [place - min(first, len(lead)) for place in missing if place >= min(first, len(lead))]
        if missing:  # what is missing in front, MatMul adds itself
            value = self.add("Unsqueeze", [value, self.axes(missing)], wanted[min(first, len(lead)) :])
        return value

    def axes(self, places: Sequence[int]) -> Any:
        """A constant that names axes."""
        name = f"axes_{'_'.join(map(str, places))}"
        graph = self._einsum.graph
        if name not in graph.initializers:
            constant = self._ir.Value(name=name, const_value=self._ir.tensor(np.array(places, np.int64)))
            constant.shape = self._ir.Shape([len(places)])
            constant.type = self._ir.TensorType(self._ir.DataType.INT64)
            graph.register_initializer(constant)
        return graph.initializers[name]
