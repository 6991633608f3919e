"""The best checkpoint by all of dev or by its unseen answers alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from prime_jax.config import Config
from prime_jax.data.records import load_dataset, write_dataset
from prime_jax.errors import CheckpointError
from prime_jax.retrieval.novelty import unseen
from prime_jax.train import checkpoints, loop
from prime_jax.train.checkpoints import Checkpoint


def test_unseen_has_no_right_answer_of_training() -> None:
    rows = [np.array(one, np.int64) for one in ([1, 2], [3], [4, 5])]
    assert unseen(rows, [np.array([3, 9]), np.array([5])]).tolist() == [True, False, False]
    assert unseen(rows[:1], []).tolist() == [True]


@pytest.mark.parametrize(
    ("facts", "score"),
    [
        ({"metrics": {"MRR@10": 0.3, "unseen MRR@10": 0.1}}, 0.3),
        ({"metrics": {"MRR@10": 0.3, "unseen MRR@10": 0.1}, "select_by": "unseen MRR@10"}, 0.1),
        ({"metrics": {"MRR@10": 0.3}, "select_by": "unseen MRR@10"}, 0.3),
        ({"metrics": {}}, float("-inf")),
    ],
)
def test_score(facts: dict[str, object], score: float) -> None:
    assert Checkpoint(Path(), facts).score == score


def test_a_run_is_told_which_answers_are_unseen(config: Config, data_folder: Path, tmp_path: Path) -> None:
    """Half of dev gets the right answers of a training example."""
    dataset = load_dataset(data_folder)
    trained = [example for example in dataset.splits["train"] if not example.exclude[0].endswith("x")]
    dev = []
    for row, example in enumerate(dataset.splits["dev"]):
        known = {"positives": trained[row].positives} if row % 2 else {}
        dev.append(type(example)(**{**_fields(example), **known}))
    write_dataset(tmp_path / "data", type(dataset)(dataset.corpus, {**dataset.splits, "dev": tuple(dev)}))
    changed = config.model_copy(
        update={
            "data": config.data.model_copy(update={"path": str(tmp_path / "data")}),
            "train": config.train.model_copy(update={"select_by": "unseen MRR@10", "num_epochs": 3}),
        }
    )
    loop.train(changed, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    judged = [row for row in rows if "unseen MRR@10" in row]
    assert len(judged) >= 3
    best = checkpoints.best(tmp_path / "run")
    assert best.score == max(row["unseen MRR@10"] for row in judged)
    assert best.facts["select_by"] == "unseen MRR@10"
    with pytest.raises(CheckpointError):
        checkpoints.best(tmp_path / "nothing")


def _fields(example: object) -> dict[str, object]:
    return {name: getattr(example, name) for name in example.__slots__}
