"""Holds the house: which part may import which, what stays out of the library, how long a file may be."""

import ast
import subprocess
import sys
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

from prime_jax.export.interfaces import interface_of
from prime_jax.models.jasper import JasperConfig
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.text import TextConfig

ROOT = Path(__file__).parents[1] / "prime_jax"
FILES = sorted(ROOT.rglob("*.py"))
PARTS = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}

# Lowest first. A part imports from the rows below it and from its neighbours, neighbours never in a circle.
ROWS = [
    {
        "devices",
        "errors",
        "frozen",
        "types",
        "files",
        "locks",
        "manifest",
        "progress",
        "program_cache",
        "turns",
        "_version",
    },
    {"nn", "retrieval"},
    {"models", "losses", "data", "pretrained"},
    {"hybrid"},
    {"config"},
    {"train"},
    {"predict", "evaluate", "explain", "export"},
    {"serve"},
    {"cli", "__init__"},
]
ROW_OF = {part: row for row, parts in enumerate(ROWS) for part in parts}


class Import(NamedTuple):
    """One imported module, wherever it stands: at the top, inside a function, or through import_module."""

    module: str
    line: int


def imports_of(source: str, package: str) -> list[Import]:
    """Every module name that `source`, a file of `package`, imports, made absolute.

    `from a import b` counts as `a.b`: b may be a module, and where it is not the part is that of `a` anyway.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found += [Import(f"{base}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            found += [Import(str(name), node.lineno) for name in names]
    return found


def part_of(module: str) -> str | None:
    """The part of the library that a module name belongs to; None for other libraries."""
    first, *rest = module.split(".")
    if first != "prime_jax":
        return None
    return rest[0] if rest and rest[0] in PARTS else "__init__"


@cache
def library_imports() -> list[tuple[Path, str, Import]]:
    """(file, its part, import) for every import in the library."""
    found = []
    for path in FILES:
        package = ".".join(["prime_jax", *path.relative_to(ROOT).parent.parts])
        module = ".".join([package, path.stem])
        for imported in imports_of(path.read_text(), package):
            found.append((path, part_of(module) or "", imported))
    return found


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT.parent)}:{line}"


def top(module: str) -> str:
    return module.split(".")[0]


def circle(edges: set[tuple[str, str]]) -> list[str]:
    """A circle of parts that import one another, empty when there is none."""
    targets: dict[str, set[str]] = {}
    for source, target in edges:
        targets.setdefault(source, set()).add(target)

    def walk(path: list[str]) -> list[str]:
        for target in sorted(targets.get(path[-1], ())):
            if target in path:
                return [*path[path.index(target) :], target]
            if found := walk([*path, target]):
                return found
        return []

    return next((found for start in sorted(targets) if (found := walk([start]))), [])


def test_every_file_stands_in_a_known_part() -> None:
    assert PARTS - set(ROW_OF) == set(), "name the new part's row in ROWS"


def test_imports_go_down_only() -> None:
    wrong = [
        f"{where(path, line)}: {part} imports {module}, which stands above it"
        for path, part, (module, line) in library_imports()
        if (target := part_of(module)) and ROW_OF[target] > ROW_OF[part]
    ]
    assert wrong == []


def test_neighbours_never_import_in_a_circle() -> None:
    edges = {
        (part, target)
        for _, part, (module, _) in library_imports()
        if (target := part_of(module)) and target != part and ROW_OF[target] == ROW_OF[part]
    }
    assert circle(edges) == []


def test_hybrid_knows_jax_optax_and_types_and_only_train_knows_hybrid() -> None:
    allowed = {"jax", "jaxtyping", "optax", *sys.stdlib_module_names}
    wrong = [
        f"{where(path, line)}: {part} imports {module}"
        for path, part, (module, line) in library_imports()
        if (part == "hybrid" and part_of(module) not in {"hybrid", "types"} and top(module) not in allowed)
        or (part not in ("hybrid", "train") and part_of(module) == "hybrid")
    ]
    assert wrong == []


def test_torch_is_imported_in_export_only() -> None:
    wrong = [
        f"{where(path, line)}: {part} imports {module}"
        for path, part, (module, line) in library_imports()
        if top(module) == "torch" and part != "export"
    ]
    assert wrong == []


def test_what_lies_in_a_bundle_stands_alone() -> None:
    llama = PredictorConfig(block="llama")
    for config in (PredictorConfig(), llama, JasperConfig(), TextConfig()):
        source = interface_of(config).torch_source()
        modules = {top(module) for module, _ in imports_of(source, "bundle")}
        needed = {"torch", "tokenizers"} if config.reads_text else {"torch"}
        assert modules - sys.stdlib_module_names == needed
    assert "class LlamaBlock" in interface_of(llama).torch_source()


def test_nothing_reads_or_writes_pickle() -> None:
    wrong = [
        f"{where(path, line)}: imports {module}"
        for path, _, (module, line) in library_imports()
        if top(module) in {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    ]
    for path in FILES:
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        wrong += [f"{where(path, call.lineno)}: {ast.unparse(call)}" for call in calls if reads_pickle(call)]
    assert wrong == []


def reads_pickle(call: ast.Call) -> bool:
    """Whether a call unpickles: allow_pickle other than False, or torch.load without weights_only=True."""
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    unsafe_load = ast.unparse(call.func) == "torch.load" and given.get("weights_only") != "True"
    return unsafe_load or given.get("allow_pickle", "False") != "False"


def test_files_stay_short() -> None:
    """torch_runtime.py may be longer: it is handed over as one file that needs nothing of ours."""
    long = {where(path, n): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert all(count <= 500 and "export/torch_runtime.py" in place for place, count in long.items())


def test_importing_the_library_loads_no_heavy_package() -> None:
    code = (
        "import sys, prime_jax; print(*sorted({'jax', 'flax', 'torch', 'onnx', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "\n"


class TestTheRulesThemselves:
    """A rule that sees nothing would pass for ever: each is shown the sort of code it must catch."""

    def test_imports_are_seen_wherever_they_stand(self) -> None:
        source = """
import numpy as np, torch.nn
from prime_jax import errors
from .blocks import Block
from ..types import Batch
from .. import files
def f():
    from prime_jax.train.loop import fit
    importlib.import_module("onnx")
"""
        assert sorted(module for module, _ in imports_of(source, "prime_jax.nn")) == [
            "numpy",
            "onnx",
            "prime_jax.errors",
            "prime_jax.files",
            "prime_jax.nn.blocks.Block",
            "prime_jax.train.loop.fit",
            "prime_jax.types.Batch",
            "torch.nn",
        ]

    def test_names_of_the_root_package_belong_to_the_top(self) -> None:
        modules = [
            "prime_jax.load",
            "prime_jax",
            "prime_jax.nn.masks.full",
            "prime_jax.errors.DataError",
            "numpy.nn",
        ]
        assert [part_of(module) for module in modules] == ["__init__", "__init__", "nn", "errors", None]

    @pytest.mark.parametrize(
        ("edges", "found"),
        [
            ({("a", "b"), ("b", "c")}, []),
            ({("a", "b"), ("b", "a")}, ["a", "b", "a"]),
            ({("a", "b"), ("b", "c"), ("c", "b")}, ["b", "c", "b"]),
        ],
    )
    def test_circles_are_found(self, edges: set[tuple[str, str]], found: list[str]) -> None:
        assert circle(edges) == found

    @pytest.mark.parametrize(
        ("code", "bad"),
        [
            ("np.load(f)", False),
            ("np.load(f, allow_pickle=False)", False),
            ("np.load(f, allow_pickle=True)", True),
            ("torch.load(f)", True),
            ("torch.load(f, weights_only=False)", True),
            ("torch.load(f, weights_only=True)", False),
        ],
    )
    def test_unpickling_is_found(self, code: str, bad: bool) -> None:
        call = ast.parse(code, mode="eval").body
        assert isinstance(call, ast.Call)
        assert reads_pickle(call) is bad
