"""The report of a run, read back and compared with figures kept beside it; the example in the docs."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_wrap import CONFIG, Run, data, step

from benchmarks.hybrid_report import saved
from prime_jax.hybrid.metrics import Totals, write
from prime_jax.hybrid.phases import Phase

DOCS = Path(__file__).parents[2] / "docs" / "hybrid.md"


def test_a_report_holds_the_losses_and_costs_of_the_run(tmp_path: Path) -> None:
    run = Run(CONFIG).go(40)
    losses, state = [], run.state
    for at in range(40, 45):  # the same steps beside the trainer
        state, seen = step(state, data(at))
        losses.append(float(seen["loss"]))
    run.trainer.force_phase(Phase.PREDICT)
    run.go(5)
    (jump,) = run.trainer.outcomes
    line = run.trainer.report(tmp_path / "new" / "folder")
    written = json.loads((tmp_path / "new" / "folder" / "hybrid.json").read_text())
    totals, last = written["totals"], written["rows"][-1]
    assert (totals["steps"], totals["windows"], totals["jumps"], totals["kept"]) == (45, 9, 1, jump.kept)
    assert totals["virtual_steps"] == jump.kept * jump.horizon
    # 5 gradients; raw, predicted and corrected weights on 4 control batches, and where something was chosen
    # raw and the choice on the 4 others; each has 8 times the rows of a training batch, and a forward pass
    # is a third of a step
    cost = 5 + (3 * 4 + 2 * 4 * (jump.choice != "raw")) * 8 / 3
    assert totals["cost"] == pytest.approx(cost)
    assert totals["overhead"] == pytest.approx(totals["cost"] / 45)
    assert (last["phase"], last["choice"], last["after"]) == ("CORRECT", jump.choice, jump.after)
    with (tmp_path / "new" / "folder" / "hybrid.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["step"] for row in table] == [str(at) for at in (*range(5, 50, 5), 45)]
    np.testing.assert_allclose(float(table[8]["loss"]), np.mean(losses), rtol=1e-5)
    assert float(table[8]["loss"]) == written["rows"][8]["loss"]
    assert (table[8]["choice"], float(table[9]["before"])) == ("", jump.before)
    told = f"hybrid: {int(jump.kept)} of 1 jumps kept, they cost {cost:.1f} of 45 steps ({cost / 45:.2%})"
    assert line == f"{told}; 0 divergences, 0 rollbacks"


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [{"step": 5, "loss": math.nan}], Totals(steps=5))
    before = (tmp_path / "hybrid.json").read_text()
    assert json.loads(before)["rows"] == [{"step": 5, "loss": None}]  # no number is null, not broken JSON

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, [{"step": 10, "loss": 1.0}], Totals(steps=10))
    assert (tmp_path / "hybrid.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hybrid.csv", "hybrid.json"]


def test_steps_saved_are_the_cost_where_nothing_was_kept_and_read_off_the_curve_where_something_was() -> None:
    one = {"stopped": 2.1, "choice": "ema 25", "cost": 4.0, "control_gain": 0.0}
    kept = {"plain": 2.0, "end": 1.5, "kept": True, **one}
    result = {
        "lengths": [400, 800],
        "plain": {"wsd 1600 seed 0": 1.0, "wsd 200 seed 0": 3.0},
        "shared": {
            # a noisy loss that would count as many steps
            "wsd 400 seed 0": {"lengths": {"400": {"plain": 2.5, "end": 2.9, "kept": False, **one}}},
            "wsd 800 seed 0": {"lengths": {"800": kept}},
        },
    }
    found = saved(result)
    assert found["wsd 400"]["end saved"] == [-4 / 400]
    # 1.5 lies halfway from 2.0 at 800 steps to 1.0 at 1600, in the logarithm of the steps
    assert found["wsd 800"]["end saved"] == [pytest.approx(1 - 800 / (800 * 2**0.5))]


def test_the_example_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = DOCS.read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(compile(example, str(DOCS), "exec"), names)
    totals = json.loads((tmp_path / "report" / "hybrid.json").read_text())["totals"]
    assert totals["steps"] == 60
    assert totals["jumps"] == 1  # the correction at the end
