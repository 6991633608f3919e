"""Checkpoints: Orbax writes and reads the arrays, a manifest with SHA-256 sums vouches for every file.

A run keeps two: the newest, to resume from, and the one with the best validation figure, to predict with.
A step folder without a manifest was cut off while being written; it is ignored and overwritten.

With several processes all of them write arrays, each its own shards; the first one does everything else.
"""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Int32

from prime_jax.config import Config, load_stored_config, to_yaml
from prime_jax.errors import CheckpointError, ConfigError
from prime_jax.files import write_text
from prime_jax.manifest import MANIFEST, read_manifest, verify_manifest, write_manifest
from prime_jax.models import Model
from prime_jax.models.confidence import Confidence, write_confidence
from prime_jax.models.subspace import CENTROIDS
from prime_jax.nn.target_head import initial_head
from prime_jax.train.collective import barrier, is_main
from prime_jax.train.items import check_written, read_item, read_item_here
from prime_jax.train.plain_paths import plain_path, relink
from prime_jax.train.state import MODEL, TrainState, pure_params

Table = Int32[np.ndarray, "n K"]

KIND = "checkpoint"
CONFIG = "config.yaml"
HYBRID = "hybrid"
SELECT_BY = "MRR@10"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk.

    Attributes:
        folder: Its step folder.
        facts: What its manifest says: `step`, `epoch`, `metrics`, `encoder`, `data_hash`, versions.
    """

    folder: Path
    facts: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Batches seen when it was written."""
        return int(self.facts["step"])

    @property
    def score(self) -> float:
        """The validation figure that the best checkpoint is chosen by (`train.select_by`).

        Where dev has no unseen answers, or nothing else, that is the MRR@10 of all.
        """
        metrics = self.facts["metrics"]
        plain = metrics.get(SELECT_BY, float("-inf"))
        return float(metrics.get(self.facts.get("select_by", SELECT_BY), plain))


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, oldest first; a run that trains may remove some meanwhile.

    Raises:
        CheckpointError: If the manifest of one is damaged.
    """
    folders = [path for path in checkpoints_folder(run).glob("*") if path.name.isdecimal()]
    found = [_complete(path) for path in folders]
    return sorted((one for one in found if one is not None), key=lambda c: c.step)


def _complete(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where there is no manifest, or it went while it was being read."""
    try:
        return Checkpoint(folder, read_manifest(folder))
    except (CheckpointError, OSError):
        if (folder / MANIFEST).is_file():
            raise
        return None


def latest(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    return max(list_checkpoints(run), key=lambda c: c.step, default=None)


def best(run: Path) -> Checkpoint:
    """The checkpoint with the highest validation figure (`Checkpoint.score`), the later one at a tie.

    Raises:
        CheckpointError: If the run has none.
    """
    found = list_checkpoints(run)
    if not found:
        raise CheckpointError(
            f"{run}: no complete checkpoint; is this a run folder, and did training get far enough?"
        )
    return max(found, key=lambda c: (c.score, c.step))


class Checkpoints:
    """Writes the checkpoints of a run while training goes on.

    Use it as a context: leaving it waits for the last one. `save` returns once the state is copied; a failure
    of the writing surfaces in the next `save` or at the end, and leaves every earlier checkpoint as it was.
    """

    def __init__(self, run: Path):
        self._run = run
        self._writing: Future[None] | None = None
        self._finisher = ThreadPoolExecutor(1, "checkpoint")
        self._manager: Any = None
        self._opened_path = ExitStack()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
            elif self._writing is not None:  # another error is on its way; let the writing end, say nothing
                self._writing.exception()
        finally:
            self._finisher.shutdown()
            if self._manager is not None:
                with suppress(Exception):  # a failed write, which was told already
                    self._manager.close()
            self._opened_path.close()

    def save(
        self,
        state: TrainState,
        config: Config,
        facts: Mapping[str, Any],
        negatives: Table | None = None,
        confidence: Confidence | None = None,
        copied: Sequence[Path] = (),
        hybrid: Any | None = None,
        predicting: TrainState | None = None,
    ) -> None:
        """Start writing a checkpoint; when it is complete, all but the newest and the best are dropped.

        Args:
            state: What to save; its `step` names the checkpoint. All processes call this together.
            config: Configuration of the run, stored with it.
            facts: For the manifest; must hold `metrics`.
            negatives: The mined negatives in use, `[n, K]`.
            confidence: How far its predictions can be trusted.
            copied: Files and folders that go with it, such as a tokenizer or the encoders that were trained
                along, by their own names; they must stay until this is complete.
            hybrid: What `HybridTrainer.saved` gave, of a run that is watched.
            predicting: The state as it predicts; None for `state` itself.

        Raises:
            CheckpointError: If this one or the one before cannot be written.
        """
        self.wait()
        step = int(state.step)
        folder = checkpoints_folder(self._run) / str(step)
        dtype = config.train.params_dtype
        items = {"state": _copied(_as_tree(state)), "params": _for_inference(predicting or state, dtype)}
        if negatives is not None:
            items["negatives"] = {"table": negatives}
        if hybrid is not None:
            items[HYBRID] = _copied(_by_name(hybrid))
        saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        try:
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)  # cut off, or Orbax would not write it again
            barrier(f"checkpoint {step}")
            self._opened().save(step, args=ocp.args.Composite(**saved), force=True)
        except Exception as failed:  # Orbax and TensorStore raise many kinds
            raise _unwritten(folder, failed) from failed
        self._writing = self._finisher.submit(
            self._finish, folder, list(items), config, dict(facts), step, confidence, copied
        )

    def wait(self) -> None:
        """Return when the checkpoint in the making is complete.

        Raises:
            CheckpointError: If it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _opened(self) -> Any:
        if self._manager is None:
            # Folders are made before `save` returns: where that fails, Orbax would wait minutes for them.
            options = ocp.CheckpointManagerOptions(
                enable_async_checkpointing=True,
                create=True,
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            )
            folder = checkpoints_folder(self._run)
            folder.mkdir(parents=True, exist_ok=True)
            path = self._opened_path.enter_context(plain_path(folder))
            self._manager = ocp.CheckpointManager(path, options=options)
        else:
            relink(Path(self._manager.directory), checkpoints_folder(self._run))
            self._manager.reload()
        return self._manager

    def _finish(
        self,
        folder: Path,
        items: list[str],
        config: Config,
        facts: dict[str, Any],
        step: int,
        confidence: Confidence | None,
        copied: Sequence[Path],
    ) -> None:
        """Wait for the arrays, vouch for them, drop what is no longer needed."""
        try:
            self._manager.wait_until_finished()
            if not is_main():
                return
            check_written(folder, items)
            write_text(folder / CONFIG, to_yaml(config))
            if confidence is not None:
                write_confidence(folder, confidence)
            for source in copied:
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / source.name)
            write_manifest(folder, KIND, step=step, **facts)
            keep = {kept.step for kept in (latest(self._run), best(self._run)) if kept}
            for old in list_checkpoints(self._run):
                if old.step not in keep:
                    (old.folder / MANIFEST).unlink()  # from here on it is no checkpoint, however far we get
                    shutil.rmtree(old.folder)
        except Exception as failed:
            raise _unwritten(folder, failed) from failed


def save(run: Path, state: TrainState, config: Config, facts: Mapping[str, Any]) -> Checkpoint:
    """Write one checkpoint and wait for it; see `Checkpoints.save`."""
    with Checkpoints(run) as writer:
        writer.save(state, config, facts)
    folder = checkpoints_folder(run) / str(int(state.step))
    return Checkpoint(folder, read_manifest(folder))


def remove_leftovers(run: Path) -> None:
    """Delete what a killed run left half-written among its checkpoints."""
    for path in checkpoints_folder(run).glob("*"):
        if path.is_dir() and not (path / MANIFEST).is_file():
            shutil.rmtree(path, ignore_errors=True)


def restore(checkpoint: Checkpoint, like: TrainState) -> tuple[TrainState, Table | None]:
    """Read a checkpoint back, verified, laid out on devices as `like` is; they may be other ones than before.

    Returns:
        The state, and the mined negatives that were in use.

    Raises:
        CheckpointError: If any file is missing or damaged, or the state has another structure.
    """
    verify_manifest(checkpoint.folder, KIND)
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(like))
    tree = read_item(checkpoint.folder / "state", shapes)
    negatives = None
    if (checkpoint.folder / "negatives").is_dir():
        negatives = np.asarray(read_item(checkpoint.folder / "negatives", None)["table"])
    return TrainState(**{"average": None, "smoothed": None, **tree}), negatives


def restore_hybrid(checkpoint: Checkpoint, like: Any) -> Any | None:
    """What a watched run saved with a checkpoint that `restore` verified, laid out as `like` is.

    Returns:
        As `like`; None where the checkpoint has nothing of it.

    Raises:
        CheckpointError: If it has another structure: another version watched in another way.
    """
    folder = checkpoint.folder / HYBRID
    if not folder.is_dir():
        return None
    found = read_item(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, _by_name(like)))
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in _by_name(like)])


def check_restorable(folder: Path) -> list[str]:
    """Read everything that a checkpoint holds, as resuming and predicting would.

    Returns:
        Names of its items, such as `params` and `state`.

    Raises:
        CheckpointError: If an item cannot be restored; the message names it.
    """
    load_model(folder)
    items = [name for name in ("params", "state", "negatives", HYBRID) if (folder / name).is_dir()]
    for name in items[1:]:
        read_item_here(folder / name)
    return items


class LoadedModel(NamedTuple):
    """A model read from a checkpoint.

    Attributes:
        model: The model, float32.
        config: Configuration of its run.
        checkpoint: Where it was read.
        target_head: Kernel that the memory is mapped by before it is searched, `[E, E]`, or None (most runs).
    """

    model: Model
    config: Config
    checkpoint: Checkpoint
    target_head: jax.Array | None


def load_model(folder: Path) -> LoadedModel:
    """The model of a run's best checkpoint, or of one checkpoint folder, in float32.

    Raises:
        CheckpointError: If there is no checkpoint, or a file of it is missing or damaged.
    """
    is_one = (folder / MANIFEST).is_file()
    checkpoint = Checkpoint(folder, read_manifest(folder)) if is_one else best(folder)
    verify_manifest(checkpoint.folder, KIND)
    try:
        config = load_stored_config(checkpoint.folder / CONFIG)
    except ConfigError as unreadable:
        raise CheckpointError(str(unreadable)) from None
    model = nnx.eval_shape(lambda: config.model.build(rngs=nnx.Rngs(0)))
    like = {MODEL: _cast(pure_params(model), config.train.params_dtype)}
    if config.train.target != "frozen":
        like["target_head"] = jax.eval_shape(lambda: initial_head(config.model.output_dim))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    params = read_item(checkpoint.folder / "params", like)
    model = nnx.merge(nnx.split(model)[0], _cast(params[MODEL], "float32"))
    return LoadedModel(model, config, checkpoint, params.get("target_head"))


def _unwritten(folder: Path, failed: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the checkpoint could not be written: {str(failed) or type(failed).__name__}; "
        "earlier ones are as they were"
    )


def _for_inference(state: TrainState, dtype: DTypeLike) -> dict[str, Any]:
    """What prediction needs of a state: the model in `dtype`, and the target head where there is one."""
    needed = {MODEL: _cast(state.predicting, dtype)}
    if state.target_head is not None:
        needed["target_head"] = state.target_head
    return needed


def _as_tree(state: TrainState) -> dict[str, Any]:
    tree = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: value for name, value in tree.items() if value is not None}


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by their paths, in order: files know no classes of ours."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


# The step that comes next reuses the memory of the state it is given, so what is written meanwhile is a copy.
_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def _cast(tree: Any, dtype: DTypeLike) -> Any:
    def cast(path: Any, leaf: Any) -> Any:
        if path and getattr(path[-1], "key", None) == CENTROIDS:  # they are exact in every checkpoint
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        return leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, tree)
