"""The embedding store: every text is encoded once, kept in shards on disk, and read memory-mapped.

A store is the folder `<root>/<encoder identity>/` holding

- `shard-00000.safetensors`, ...: tensors `embeddings` `[n, dim]` float32 (or float16, half the size, in a
  store that was made so) and `keys` `[n, 16]` uint8, where a key is the first 128 bits of the SHA-256 of the
  UTF-8 text;
- `index.json`: identity, dim, dtype and, per shard, its rows, bytes and SHA-256. Only shards listed here
  exist: one that a killed process left unlisted is overwritten by the next.

Rows are numbered through the shards in order and never move, so a row found today is valid after later adds.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic
from jaxtyping import Int
from safetensors.numpy import save_file

from prime_jax import files
from prime_jax.data.shards import Shard, check_shards
from prime_jax.errors import DataError, first_fault
from prime_jax.frozen import Frozen
from prime_jax.locks import locked

INDEX = "index.json"
DType = Literal["float32", "float16"]
_HEADER_NAME: dict[DType, str] = {"float32": "F32", "float16": "F16"}
KEY_BYTES = 16


class _Shard(Frozen):
    file: str = pydantic.Field(pattern=r"^shard-\d{5,}\.safetensors$")
    rows: int = pydantic.Field(gt=0)
    bytes: int = pydantic.Field(gt=0)
    sha256: str = pydantic.Field(pattern=r"^[0-9a-f]{64}$")


class _Index(Frozen):
    format_version: Literal[1] = 1
    identity: str
    dim: int = pydantic.Field(gt=0)
    dtype: DType = "float32"
    shards: tuple[_Shard, ...] = ()

    def written(self) -> dict[str, Any]:
        """As it stands in the file. An index of float32 looks as it did when there was nothing else."""
        return self.model_dump(exclude={"dtype"} if self.dtype == "float32" else None)


def text_key(text: str) -> bytes:
    """The first 128 bits of the SHA-256 of a text.

    Raises:
        DataError: If it holds half of a surrogate pair, which UTF-8 cannot express.
    """
    try:
        return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]
    except UnicodeEncodeError:
        raise DataError(f"not valid Unicode text: {_quote(text)}") from None


class EmbeddingStore:
    """Embeddings of one encoder, found by text. Make one with `EmbeddingStore.open`.

    A store pickles as its place on disk, so data-loading workers map the same files.
    """

    def __init__(self, root: Path, index: _Index):
        """Use `EmbeddingStore.open`, which also finds or creates the index."""
        self.folder = _home(root, index.identity)
        self._root = root
        self._index = index
        self._row: dict[bytes, int] = {}
        self._maps: list[npt.NDArray[Any]] = []
        self._starts: list[int] = []
        self._follow(index)

    @classmethod
    def open(cls, folder: Path, identity: str, dim: int, dtype: DType | None = None) -> "EmbeddingStore":
        """Open the store of encoder `identity` under `folder`, creating it when absent.

        Args:
            folder: Root of all stores, such as `data/embeddings`.
            identity: What the encoder calls itself; it changes whenever its embeddings would.
            dim: Width of the embeddings.
            dtype: How they are kept; None takes what the store has, float32 for a new one.

        Raises:
            DataError: If the index is damaged or of another identity, dim or dtype, or a listed shard is
            missing,
                truncated or not a shard of this store. The message names the file.
        """
        path = _home(folder, identity) / INDEX
        if not path.exists():  # otherwise the folder may be one that can only be read
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.parent):
                if not path.exists():
                    new = _Index(identity=identity, dim=dim, dtype=dtype or "float32")
                    files.write_json(path, new.written())
        index = _read_index(path)
        if index.identity != identity:
            raise DataError(f"{path}: holds embeddings of encoder {index.identity!r}, not of {identity!r}")
        if index.dim != dim:
            raise DataError(f"{path}: holds embeddings of {index.dim} dimensions, the encoder has {dim}")
        if dtype not in (None, index.dtype):
            raise DataError(f"{path}: keeps {index.dtype}, {dtype} was asked for; use another folder")
        return cls(folder, index)

    @property
    def identity(self) -> str:
        """Identity of the encoder the embeddings come from."""
        return self._index.identity

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._index.dim

    @property
    def dtype(self) -> DType:
        """How embeddings are kept on disk."""
        return self._index.dtype

    @property
    def hash(self) -> str:
        """SHA-256 over identity, dim and the hashes of all shards: names the exact content."""
        content = json.dumps(self._index.written(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, text: str) -> bool:
        return text_key(text) in self._row

    def __reduce__(self) -> tuple[Any, ...]:
        return EmbeddingStore.open, (self._root, self.identity, self.dim)

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The texts that are not in the store, each once, in their order."""
        return [text for text in dict.fromkeys(texts) if text not in self]

    def rows(self, texts: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Rows of `texts`, `[n]` int64.

        Raises:
            DataError: If a text is not in the store; the message quotes its start.
        """
        found = np.empty(len(texts), np.int64)
        for position, text in enumerate(texts):
            row = self._row.get(text_key(text))
            if row is None:
                raise DataError(
                    f"{self.folder}: no embedding of {_quote(text)}; "
                    "run `python -m prime_jax.data.encode` on the data first"
                )
            found[position] = row
        return found

    def __getitem__(self, rows: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Gather embeddings.

        Args:
            rows: Row numbers, any shape `[...]`.

        Returns:
            float32 `[..., dim]`, read from disk through memory maps.

        Raises:
            DataError: If a number is not an integer, negative, or not smaller than `len(store)`.
        """
        return self.gather(rows, np.dtype(np.float32))

    def dtype_of(self, rows: Int[np.ndarray, " M"]) -> DType:
        """The smallest dtype that holds some rows as they are kept."""
        return self.dtype

    def gather(self, rows: npt.ArrayLike, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """As indexing, in another dtype: `dtype_of` the rows saves a conversion."""
        wanted = np.asarray(rows)
        if wanted.dtype.kind not in "iu":
            raise DataError(f"{self.folder}: row numbers must be integers, not {wanted.dtype}")
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise DataError(
                f"{self.folder}: rows {wanted.min()} to {wanted.max()} wanted, there are 0 to {len(self) - 1}"
            )
        flat = wanted.reshape(-1).astype(np.int64)
        gathered = np.empty((flat.size, self.dim), dtype)
        shard_of = np.searchsorted(self._starts, flat, side="right") - 1
        for shard in np.unique(shard_of):
            here = shard_of == shard
            gathered[here] = self._maps[shard][flat[here] - self._starts[shard]]
        return gathered.reshape(*wanted.shape, self.dim)

    def part(self, rows: Int[np.ndarray, " M"]) -> "StoredRows":
        """Some rows as an array that is read when it is asked for."""
        return StoredRows(self, rows)

    def add(self, texts: Sequence[str], embeddings: npt.NDArray[Any]) -> None:
        """Write embeddings as one new shard; safe against other processes that add at the same time.

        A text that is already there (or comes twice) keeps its first embedding.

        Args:
            texts: The texts, `n` of them.
            embeddings: Their embeddings, `[n, dim]` float32.

        Raises:
            DataError: If the array has another shape or dtype or holds NaN or Inf; nothing is written then.
        """
        if embeddings.shape != (len(texts), self.dim) or embeddings.dtype != np.float32:
            raise DataError(
                f"{self.folder}: embeddings of {len(texts)} texts must be float32 "
                f"{(len(texts), self.dim)}, not {embeddings.dtype} {embeddings.shape}"
            )
        with np.errstate(over="ignore"):  # what becomes Inf is refused
            broken = np.flatnonzero(~np.isfinite(embeddings.astype(self.dtype)).all(axis=1))
        if broken.size:
            raise DataError(
                f"{self.folder}: the embedding of {_quote(texts[broken[0]])} holds NaN or Inf"
                f"{' or a number too large for float16' if self.dtype == 'float16' else ''} "
                f"({broken.size} of {len(texts)} do)"
            )
        position_of: dict[bytes, int] = {}
        for position, text in enumerate(texts):
            position_of.setdefault(text_key(text), position)
        with locked(self.folder):
            self._follow(_read_index(self.folder / INDEX))
            fresh = {key: at for key, at in position_of.items() if key not in self._row}
            if fresh:
                shard = self._write_shard(list(fresh), embeddings[list(fresh.values())])
                index = self._index.model_copy(update={"shards": (*self._index.shards, shard)})
                files.write_json(self.folder / INDEX, index.written())
                self._follow(index)

    def verify(self, *, again: bool = True) -> None:
        """Read every shard, compare its SHA-256 with the index, and look for NaN and Inf.

        Args:
            again: Read also what was found whole before and did not change since (`prime_jax.data.shards`).

        Raises:
            DataError: If a shard is not as it was written; the message names file and row.
        """
        listed = zip(self._index.shards, self._maps, self._starts, strict=True)
        shards = [Shard(self.folder / one.file, one.sha256, rows, start) for one, rows, start in listed]
        check_shards(self.folder, shards, again=again)

    def _write_shard(self, keys: list[bytes], embeddings: npt.NDArray[np.float32]) -> _Shard:
        name = f"shard-{len(self._index.shards):05d}.safetensors"
        tensors: dict[str, npt.NDArray[Any]] = {
            "embeddings": np.ascontiguousarray(embeddings, self.dtype),
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
        }
        with files.atomic_path(self.folder / name) as temporary:
            save_file(tensors, temporary)
            size, digest = temporary.stat().st_size, files.sha256(temporary)
        return _Shard(file=name, rows=len(keys), bytes=size, sha256=digest)

    def _follow(self, index: _Index) -> None:
        """Map the shards of `index` that are not mapped yet."""
        known = len(self._maps)
        if index.shards[:known] != self._index.shards[:known]:
            raise DataError(f"{self.folder / INDEX}: shards were replaced while the store was open")
        for shard in index.shards[known:]:
            path = self.folder / shard.file
            embeddings, keys = _map_shard(path, shard, index.dim, index.dtype)
            start = len(self._row)
            self._row.update((key, start + row) for row, key in enumerate(keys))
            if len(self._row) != start + shard.rows:
                raise DataError(f"{path}: holds a key twice, or one that an earlier shard holds")
            self._maps.append(embeddings)
            self._starts.append(start)
        self._index = index


def holds_store(root: Path, *identities: Any) -> bool:
    """Whether the store of one of these encoders is in a folder already, so that `open` makes none there."""
    return any(isinstance(one, str) and (_home(root, one) / INDEX).is_file() for one in identities)


class StoredRows:
    """Rows of a store as an array `[M, D]` that is read from disk part by part, float32 unless `kept`.

    It takes what code that goes through a large array needs: `len`, `shape`, `dtype`, `ndim`, slices and
    arrays of row numbers.
    """

    ndim = 2

    def __init__(self, store: EmbeddingStore, rows: Int[np.ndarray, " M"], dtype: DType = "float32"):
        self._store, self._rows, self.dtype = store, rows, np.dtype(dtype)
        self.shape = (len(rows), store.dim)
        self.nbytes = len(rows) * store.dim * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, wanted: Any) -> npt.NDArray[Any]:
        return self._store.gather(self._rows[wanted], self.dtype)

    @property
    def in_stored_dtype(self) -> "StoredRows":
        """The same rows in the dtype that they are kept in."""
        return StoredRows(self._store, self._rows, self._store.dtype_of(self._rows))


def _home(root: Path, identity: str) -> Path:
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", identity).strip(".-")
    if not slug:
        raise DataError(f"the encoder identity {identity!r} has no letter or digit to name a folder by")
    return root / slug


def _read_index(path: Path) -> _Index:
    try:
        return _Index.model_validate(files.read_json(path, DataError))
    except pydantic.ValidationError as wrong:
        raise DataError(f"{path}: not an index of an embedding store ({first_fault(wrong)})") from None


def _map_shard(path: Path, shard: _Shard, dim: int, kept: DType) -> tuple[npt.NDArray[Any], list[bytes]]:
    """Map the embeddings of a shard and read its keys, after checking size and header."""
    if not path.is_file():
        raise DataError(f"{path}: listed in {INDEX} but missing")
    size = path.stat().st_size
    if size != shard.bytes:
        raise DataError(f"{path}: {size} bytes, {INDEX} says {shard.bytes}: truncated or changed")
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length) if length < size else b"")
            places = [
                _place(header[name], dtype, [shard.rows, width], size - 8 - length)
                for name, dtype, width in (("embeddings", _HEADER_NAME[kept], dim), ("keys", "U8", KEY_BYTES))
            ]
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}: its header does not describe {shard.rows} embeddings of {dim} dimensions"
            ) from None
        stream.seek(8 + length + places[1])
        packed = stream.read(shard.rows * KEY_BYTES)
    little = np.dtype(kept).newbyteorder("<")
    embeddings = np.memmap(path, little, "r", offset=8 + length + places[0], shape=(shard.rows, dim))
    return embeddings, [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]


def _place(entry: dict[str, Any], dtype: str, shape: list[int], available: int) -> int:
    """Where a tensor begins after the header; ValueError unless it is what we expect."""
    begin, end = entry["data_offsets"]
    width = {"F32": 4, "F16": 2, "U8": 1}[dtype]
    fits = begin >= 0 and end <= available and end - begin == shape[0] * shape[1] * width
    if entry["dtype"] != dtype or entry["shape"] != shape or not fits:
        raise ValueError(entry)
    return int(begin)


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
