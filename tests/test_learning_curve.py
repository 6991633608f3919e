"""Learning curves: the parts of train lie in each other, and every size has its figures and its place."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_rivals import CONFIG
from tiny_bert import WORDS, tensors, write_folder

from benchmarks import learning_curve
from prime_jax.data.grouping import some_conversations
from prime_jax.data.records import Dataset, Example, Passage, write_dataset


def conversations(count: int) -> tuple[Example, ...]:
    """Two questions of each conversation; they share its first turn."""
    return tuple(
        Example(f"q{row}", (f"{WORDS[row // 2 % len(WORDS)]} {row // 2}",), f"ask {row}", (f"p{row % 20}",))
        for row in range(count)
    )


@pytest.mark.parametrize("size", [2, 17, 40])
def test_a_part_has_whole_conversations_and_lies_in_every_larger_one(size: int) -> None:
    examples = conversations(40)
    part = some_conversations(examples, size)
    np.testing.assert_array_equal(part[::2], part[1::2])
    assert abs(int(part.sum()) - size) <= 1
    for larger in (20, 30, 40):
        if larger >= size:
            assert not (part & ~some_conversations(examples, larger)).any()


def test_every_size_has_its_figures_and_the_curves_are_drawn(tmp_path: Path) -> None:
    random, data = np.random.default_rng(0), tmp_path / "data"
    corpus = tuple(Passage(f"p{row}", " ".join(random.choice(WORDS, 5))) for row in range(20))
    dev = tuple(Example(f"d{row}", (), " ".join(random.choice(WORDS, 3)), (f"p{row}",)) for row in range(8))
    write_dataset(data, Dataset(corpus, {"train": conversations(32), "dev": dev}))
    (tmp_path / "small.yaml").write_text(CONFIG)
    encoder, out = write_folder(tmp_path / "encoder", tensors()), tmp_path / "curve.json"
    command = [
        *("--data", str(data), "--out", str(out), "--keep", str(tmp_path / "kept"), "--sizes", "16", "99"),
        *("--config", str(tmp_path / "small.yaml"), "--seeds", "0", f"--data.encoder={encoder}"),
        *("--only", "query", "ridge", "small"),
    ]
    learning_curve.main(command)
    found = json.loads(out.read_text())
    assert [curve["records"] for curve in found["curves"]] == [16, 32]
    few, all_of_them = (curve["table"] for curve in found["curves"])
    assert set(few) == {"query", "ridge", "small"}
    mrr = {name: (few[name]["mean"]["MRR@10"], all_of_them[name]["mean"]["MRR@10"]) for name in few}
    assert mrr["query"][0] == mrr["query"][1]  # nothing of it is trained
    assert mrr["ridge"][0] != mrr["ridge"][1]
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
