"""What a kind of model takes and gives by name, and what its bundle holds because of that.

One class for each way of being called: with embeddings (`embedding_interface`) or with token ids
(`text_interface`); `interfaces.interface_of` gives that of a model. Every one gives `embedding`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from prime_jax.errors import ExportError
from prime_jax.evaluate.arrays import Split
from prime_jax.models import AnyConfig, Model

OUTPUTS = ("embedding", "routing", "coarse", "fine")  # of which every model has the first
JOINED = "# Everything above this line is in torch_runtime.py already.\n"
Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]


class Tensor(NamedTuple):
    """One input or output.

    Attributes:
        name: By which runtimes know it.
        dtype: `float32`, `int32` or `bool`.
        sizes: Its shape without the batch, which comes first and is free; a letter is another free size.
        meaning: In a sentence, for who uses the file.
    """

    name: str
    dtype: str
    sizes: tuple[int | str, ...]
    meaning: str


class Words(NamedTuple):
    """What MODEL_CARD.md says of one kind of model and of no other, as Markdown.

    Attributes:
        given: What the prediction is made from.
        settings: How the model is built, behind its number of parameters.
        explanation: Of further outputs, or "".
        encoder: Where its inputs and the memory come from.
        usage: Code for every runtime.
        golden: Which requests the golden ones are.
        limits: What it does not do, as list items.
    """

    given: str
    settings: str
    explanation: str
    encoder: str
    usage: str
    golden: str
    limits: str


class Company(NamedTuple):
    """One request beside others.

    Attributes:
        inputs: A batch.
        rows: For each golden request the row of the batch that holds it.
    """

    inputs: Arrays
    rows: np.ndarray[Any, np.dtype[np.int64]]


class Interface(ABC):
    """How models of one kind are called.

    Attributes:
        config: Of the model.
        inputs: In the order of its ONNX file.
        outputs: Likewise.
        files: Names of files that its bundle holds beside the usual ones, copied from where the model lies.
        stranger: The row that golden requests are answered beside, in words, and as figures in parity.json.
    """

    config: AnyConfig
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    files: tuple[str, ...] = ()
    stranger: tuple[str, dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Names of the inputs."""
        return [given.name for given in self.inputs]

    @abstractmethod
    def predict(self, model: Model, given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What JAX answers, by name; traced to write the ONNX file."""

    @abstractmethod
    def predict_in_torch(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the module of `torch_source` answers."""

    @abstractmethod
    def torch_source(self) -> str:
        """What the bundle holds as torch_runtime.py."""

    @abstractmethod
    def golden_inputs(self) -> Arrays:
        """Seeded requests; what stands in padding is as plausible as what does not."""

    @abstractmethod
    def requests(self, split: Split, source: Path, query_prefix: str) -> Arrays:
        """The queries of a split as the ONNX file takes them, `[Q, ...]`.

        Args:
            split: Embeddings and texts.
            source: Folder that the model was read from.
            query_prefix: Stands before queries; embeddings were made with it.
        """

    @abstractmethod
    def alone(self, golden: Arrays) -> Iterator[Arrays]:
        """Each golden request by itself."""

    def without_padding(self, golden: Arrays) -> Iterator[Arrays]:
        """Each golden request by itself without padding, where its length is free."""
        yield from ()

    @abstractmethod
    def beside_a_stranger(self, golden: Arrays) -> Company:
        """The golden requests and one that does not belong to them (`stranger`)."""

    @abstractmethod
    def metadata(self) -> dict[str, object]:
        """Facts about the model in its ONNX file."""

    @abstractmethod
    def words(self, facts: Mapping[str, Any]) -> Words:
        """What the card says of this kind; `facts` as for `write_bundle`."""

    def check(self, model: Model) -> None:  # noqa: B027
        """Refuse a model that cannot be exported.

        Raises:
            ExportError: If it is one.
        """

    def check_files(self, folder: Path | None) -> None:
        """Refuse a folder that lacks one of `files`, or has another model's.

        Args:
            folder: Where the model lies, if it does.

        Raises:
            ExportError: Naming the file.
        """
        for name in self.files:
            if folder is None:
                raise ExportError(f"a {self.config.kind} model is exported with its {name}: name its folder")
            if not (folder / name).is_file():
                raise ExportError(f"{folder / name}: the file is missing")


def source_of(name: str) -> str:
    """The text of a file beside this one."""
    return (Path(__file__).parent / name).read_text("utf-8")
