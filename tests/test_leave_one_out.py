"""Leaving each set out in turn: the table, what is resumed, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny_bert

from benchmarks import leave_one_out, shares
from prime_jax.errors import DataError
from prime_jax.files import read_json


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sets, and settings small enough for tests."""
    root = tmp_path_factory.mktemp("sets")
    folder = tiny_bert.write_folder(root / "tiny", tiny_bert.tensors())
    sets = [f"{name}={tiny_bert.write_texts(root / name)}" for name in ("hills", "valleys")]
    return [
        *sets,
        *("--rows", "32", f"--data.encoder={folder}", f"--data.store={root / 'store'}"),
        *("--model.input-dim=32", "--model.output-dim=32", "--model.max-tokens=32", "--mesh.data=1"),
        *("--train.batch-size=8", "--train.lora-rank=2", "--train.blend-with-start=false"),
    ]


def test_each_set_is_judged_by_what_the_others_taught(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    leave_one_out.main(["--out", str(out), "--only", "hills", "--keep", str(tmp_path / "runs"), *words])
    found = read_json(out)
    cell = found["left_out"]["hills"]["0"]
    assert set(cell["rows"]) == {*leave_one_out.UNTRAINED, "general", "general_query", "general_mix"}
    better = cell["rows"]["general"]["MRR@10"] - cell["rows"]["text"]["MRR@10"]
    assert cell["general_against"]["text"]["difference"] == pytest.approx(better)
    assert cell["rows"]["query"]["against_query"]["difference"] == 0
    assert cell["questions"] == 13
    assert found["mean_MRR@10"]["general"] == cell["rows"]["general"]["MRR@10"]
    assert "hills        general_mix" in capsys.readouterr().out
    run, figures = tmp_path / "runs" / "hills" / "0", tmp_path / "shares.json"
    store = next(word for word in words if word.startswith("--data.store"))
    shares.main(["--run", str(run), "--out", str(figures), words[0], store])
    cells = read_json(figures)["on"]["hills"]
    assert set(cells) == {"0", "0.25", "0.5", "0.75", "1"}
    assert cells["0.5"]["0"] == pytest.approx(cell["rows"]["general"]["MRR@10"], abs=1e-6)
    assert cells["0"] != cells["1"]

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("a set that is done is trained again")

    monkeypatch.setattr(leave_one_out, "trained_without", again)
    leave_one_out.main(["--only", "hills", "--out", str(out), *words])
    assert read_json(out)["left_out"] == found["left_out"]
    with pytest.raises(DataError, match="made of something else"):
        leave_one_out.main(["--out", str(out), *words, "--train.seed=9"])


def test_it_says_what_it_needs(words: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "x.json")]
    for wrong, message in (
        (words[1:], "two sets or more"),
        (["hills", *words[1:]], "hills: name sets as NAME=DIR"),
        (words[:4], r"--data\.store"),
        ([*words, "--only", "mountains"], "there is no set mountains"),
    ):
        with pytest.raises(DataError, match=message):
            leave_one_out.main([*out, *wrong])
