"""Real text on every machine: the installed documentation, read paragraph by paragraph, as conversations.

    python -m prime_jax.data.pydocs --out DIR

A document is the docstring of one module, class, function or method, or one topic of Python's `help()`.
Reading it is a conversation: the query is a paragraph, the context are up to ten paragraphs before it, the
right answer is the next one. Documents of one or two paragraphs have no examples, they fill the corpus.

Source files are parsed, never imported, so the result depends on the installed versions only.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prime_jax import files
from prime_jax.data.paragraphs import paragraphs
from prime_jax.data.records import Dataset, Example, Passage, write_dataset
from prime_jax.errors import DataError, PredictorError
from prime_jax.progress import progress

STANDARD_LIBRARY = "python"
PACKAGES = (STANDARD_LIBRARY, "numpy", "jax", "flax", "optax")

MAX_CONTEXT = 10  # paragraphs before the query; there is at least one
SHORTEST_CONVERSATION = 3  # paragraphs: one before, one to ask with, one to find
LONGEST_DOCUMENT = 40  # paragraphs kept of one document, so that none dominates
MAX_PASSAGES = 16_000  # encoded in two or three minutes on two cores

_NOT_DOCUMENTATION = frozenset(
    {"test", "tests", "testing", "idle_test", "internal_test_util"}  # tests
    | {"site-packages", "dist-packages", "third_party", "_vendor", "vendored"}  # of other projects
    | {"encodings", "idlelib", "turtledemo", "lib2to3", "distutils"}  # tables, demos, what Python drops
)


@dataclass(frozen=True)
class _Document:
    name: str
    module: str  # all documents of a module go to the same split
    paragraphs: tuple[str, ...]


def build(
    folder: Path, *, seed: int = 0, packages: Sequence[str] = PACKAGES, limit: int = MAX_PASSAGES
) -> Dataset:
    """Write the installed documentation to `folder` in the JSONL contract, with a SOURCE.md.

    A paragraph belongs to one document (the first that has it), a document to one split (about 70% train, 10%
    dev and 20% test of the modules, by a hash of seed and module name), so no paragraph is in two splits.

    Args:
        folder: Where to write.
        seed: Changes which modules go to which split.
        packages: What to read; "python" is the standard library with the topics of `help()`.
        limit: Most passages. Documents that are too short for a conversation are left out first, then
            others, in the order of a hash of their name.

    Raises:
        DataError: If a package is not installed, there is too little documentation for the three splits, or
            the folder cannot be written.
    """
    documents = _within(limit, _read(packages))
    dataset = Dataset(
        corpus=tuple(
            Passage(_id(document, at), text)
            for document in documents
            for at, text in enumerate(document.paragraphs)
        ),
        splits={
            name: tuple(
                example
                for document in documents
                if _split_of(document.module, seed) == name
                for example in _examples(document)
            )
            for name in ("train", "dev", "test")
        },
    )
    for name, examples in dataset.splits.items():
        if not examples:
            raise DataError(f"{', '.join(packages)}: too little documentation, the split '{name}' is empty")
    try:
        write_dataset(folder, dataset)
        files.write_text(folder / "SOURCE.md", _source(dataset, documents, packages, seed))
    except OSError as problem:
        raise DataError(f"{folder}: cannot be written ({problem.strerror})") from None
    return dataset


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module; see its first lines."""
    parser = argparse.ArgumentParser(
        prog="python -m prime_jax.data.pydocs",
        description="Write the documentation installed on this machine as conversations (JSONL).",
    )
    parser.add_argument("--out", type=files.user_path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="which documents go to which split")
    options = parser.parse_args(argv)
    try:
        build(options.out, seed=options.seed, packages=PACKAGES)
    except PredictorError as mistake:
        print(f"pydocs: {mistake}", file=sys.stderr)
        return 2
    print((options.out / "SOURCE.md").read_text(encoding="utf-8"))
    return 0


def _read(packages: Sequence[str]) -> list[_Document]:
    """All documents, each paragraph in the first one that has it."""
    sources = [source for package in packages for source in _sources(package)]
    documents: list[_Document] = []
    seen: set[str] = set()
    with progress("read documentation", len(sources), "files") as advance:
        for module, path in sources:
            for name, docstrings in _docstrings(module, path).items():
                fresh: dict[str, str] = {}
                for text in (text for docstring in docstrings for text in paragraphs(docstring)):
                    key = "".join(filter(str.isalnum, text.lower()))
                    if key not in seen:
                        fresh.setdefault(key, text)
                kept = dict(list(fresh.items())[:LONGEST_DOCUMENT])
                seen.update(kept)
                if kept:
                    unit = name if module == "pydoc_data.topics" else module
                    documents.append(_Document(name, unit, tuple(kept.values())))
            advance(1)
    return documents


def _sources(package: str) -> list[tuple[str, Path]]:
    """Module name and path of every source file of a package, each name once, in their order."""
    if package == STANDARD_LIBRARY:
        root, first = Path(sysconfig.get_path("stdlib")), []
    else:
        spec = importlib.util.find_spec(package)  # finds the package without importing it
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"the package '{package}' is not installed")
        root, first = Path(spec.submodule_search_locations[0]), [package]
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _NOT_DOCUMENTATION.isdisjoint(parts) and "test" not in parts[-1].split("_"):
            found.append((".".join([*first, *parts]).removesuffix(".__init__"), path))
    return list(dict(sorted(found)).items())


def _docstrings(module: str, path: Path) -> dict[str, list[str]]:
    """The docstrings of a source file in their order, by document; nothing if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like in files of others
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return {}
    found: dict[str, list[str]] = {}
    if module == "pydoc_data.topics":
        tables = [node.value for node in tree.body if isinstance(node, ast.Assign)]
        for topic, text in (pair for table in tables for pair in ast.literal_eval(table).items()):
            found[f"help.{topic}"] = [text]
    else:
        for owner, text in _walk(tree, module):
            found.setdefault(owner, []).append(text)
    return found


def _walk(node: ast.AST, owner: str) -> Iterator[tuple[str, str]]:
    """("module:Class.method", docstring) of a node and of everything defined in it, in source order."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        owner = f"{owner}{'.' if ':' in owner else ':'}{node.name}"
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield owner, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _walk(child, owner)


def _within(limit: int, documents: list[_Document]) -> list[_Document]:
    """As many documents as `limit` passages allow, chosen by hash, in their order."""

    def order(document: _Document) -> tuple[bool, float]:
        return len(document.paragraphs) < SHORTEST_CONVERSATION, _fraction(f"keep {document.name}")

    kept: set[str] = set()
    for document in sorted(documents, key=order):
        limit -= len(document.paragraphs)
        if limit < 0:
            break
        kept.add(document.name)
    return [document for document in documents if document.name in kept]


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _split_of(module: str, seed: int) -> str:
    place = _fraction(f"split {seed} {module}")
    return "train" if place < 0.7 else "dev" if place < 0.8 else "test"


def _id(document: _Document, at: int) -> str:
    return f"{document.name}/{at}"


def _examples(document: _Document) -> Iterator[Example]:
    texts = document.paragraphs
    for at in range(1, len(texts) - 1):
        first = max(0, at - MAX_CONTEXT)
        yield Example(
            id=_id(document, at),
            context=texts[first:at],
            query=texts[at],
            positives=(_id(document, at + 1),),
            exclude=tuple(_id(document, turn) for turn in range(first, at + 1)),
            extra={"document": document.name},
        )


def _source(dataset: Dataset, documents: list[_Document], packages: Sequence[str], seed: int) -> str:
    versions = [
        platform.python_version() if name == STANDARD_LIBRARY else importlib.metadata.version(name)
        for name in packages
    ]
    counts = [f"- {name}: {len(examples):,} examples" for name, examples in dataset.splits.items()]
    return "\n".join(
        [
            "# Installed documentation as conversations",
            "",
            f"Written by `python -m prime_jax.data.pydocs --seed {seed}`.",
            "The text belongs to the projects it comes from and is under their licences.",
            "",
            *(f"- {name} {version}" for name, version in zip(packages, versions, strict=True)),
            "",
            f"- corpus: {len(dataset.corpus):,} passages of {len(documents):,} documents",
            *counts,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
