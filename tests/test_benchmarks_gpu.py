"""`benchmarks.gpu`: its parts end in time and leave what they wrote, and all of it runs, small, on a CPU."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_contenders
import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.common import facts
from benchmarks.cuda_graph import Replayed
from benchmarks.kernels import Event, busy_ns, product_dtypes
from benchmarks.parts import PARTS, Part, numbers, run_part
from benchmarks.side_by_side import ContenderError, Entry, start

ROOT = Path(__file__).parents[1]


class Again:
    """Stands in for a CUDA graph: a replay computes anew from the same tensors into the same answer."""

    def __init__(self, run: Callable[[], Tensor]):
        self._run = run
        self.answer = run()

    def replay(self) -> None:
        self.answer.copy_(self._run())


def record(run: Callable[[], Tensor]) -> tuple[Again, Tensor]:
    graph = Again(run)
    return graph, graph.answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_model_answers_every_batch_anew(dtype: torch.dtype) -> None:
    """Its buffers are made in inference mode and may be changed there only; answers belong to the caller."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 3).to(dtype)

    def model(context: Tensor, query: Tensor) -> Tensor:
        answer: Tensor = layer(context.sum(dim=1) + query)
        return answer

    shapes = ((2, 4, 6), (2, 6))
    replayed = Replayed(model, shapes, dtype, torch.device("cpu"), record)
    rng = np.random.default_rng(0)
    batches = [[rng.normal(size=shape).astype(np.float32) for shape in shapes] for _ in range(2)]
    answers = [replayed(*batch) for batch in batches]
    for batch, answer in zip(batches, answers, strict=True):
        with torch.inference_mode():
            expected = model(*(torch.from_numpy(array).to(dtype) for array in batch)).float().numpy()
        np.testing.assert_array_equal(answer, expected)
        assert answer.dtype == np.float32
    assert replayed.seconds_on_device(3) > 0


def test_contenders_start_side_by_side_and_those_that_do_not_are_named() -> None:
    """One that fails or ends keeps no other from answering, nor from its turn to compile alone."""
    entries = {
        "failing": Entry(small_contenders.failing, (), alone=True),
        "twice": Entry(small_contenders.multiplying, (2,), alone=True),
        "dying": Entry(small_contenders.dying, (), alone=True),
        "thrice": Entry(small_contenders.multiplying, (3,), alone=True),
        "at once": Entry(small_contenders.multiplying, (4,)),
    }
    ready, failed = start(entries)
    assert {name: contender.told["factor"] for name, contender in ready.items()} == {
        "twice": 2,
        "thrice": 3,
        "at once": 4,
    }
    assert failed == {
        "failing": "ValueError: more about it",
        "dying": "the process ended with exit code 3",
    }
    assert [contender.ask(7) for contender in ready.values()] == [14, 21, 28]
    with pytest.raises(ContenderError, match="ended with exit code 4"):
        ready["twice"].ask("end")
    for contender in ready.values():
        contender.end()


def test_a_contender_that_is_not_ready_in_time_is_ended() -> None:
    ready, failed = start({"hanging": Entry(small_contenders.hanging, ())}, seconds=1)
    assert (ready, failed) == ({}, {"hanging": "not ready within 1 s"})
    assert not multiprocessing.active_children()


WRITES = """
import json, pathlib, subprocess, sys, time
file = pathlib.Path(sys.argv[2])
file.write_text(json.dumps({"machine": {"cores": 2}, "speed": {"fast": 1.5, "slow": 2}, "ok": True}))
"""
MODULES = {
    "part_done": WRITES,
    "part_slow": WRITES
    + """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(str(file) + ".pid").write_text(str(child.pid))
time.sleep(600)
""",
    "part_failing": WRITES + "\nraise SystemExit('the device is on fire')",
    "part_silent": "",
}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    """Parts of a few lines each, as modules that can be run."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', ROOT)}")
    names = (*MODULES, "part_missing")
    return {name: Part(name, name, "--out {file}", 1.0) for name in names}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_that_runs_over_is_killed_with_its_children_and_what_it_wrote_counts(
    parts: dict[str, Part], tmp_path: Path
) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    found = run_part(parts["part_slow"], tmp_path, "cpu", 5.0, env, tiny=False)
    assert (found["status"], found["figures"], found["file"]) == ("out of time", 2, "part_slow_cpu.json")
    assert found["headline"] == {"speed/fast": 1.5, "speed/slow": 2}
    assert found["seconds"] < 30
    child = int((tmp_path / "part_slow_cpu.json.pid").read_text())
    patience = time.monotonic() + 20  # a killed process is gone a moment later
    while alive(child) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not alive(child)


def test_what_comes_of_a_part(parts: dict[str, Part], tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    found = {
        name: run_part(parts[name], tmp_path, "cpu", 60.0, env, tiny=True)
        for name in ("part_done", "part_failing", "part_silent", "part_missing")
    }
    assert {name: part["status"] for name, part in found.items()} == {
        "part_done": "done",
        "part_failing": "failed",
        "part_silent": "failed",
        "part_missing": "not there",
    }
    assert found["part_failing"]["why"] == "exit code 1: the device is on fire"
    assert found["part_silent"]["why"] == "ended well but wrote no figures to part_silent_cpu.json"
    assert found["part_missing"]["why"] == "there is no module part_missing"


def test_figures_of_an_earlier_run_are_not_taken_for_this_one_s(
    parts: dict[str, Part], tmp_path: Path
) -> None:
    old = tmp_path / "part_silent_cpu.json"
    old.write_text('{"speed": 1}')
    os.utime(old, (1, 1))
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    assert run_part(parts["part_silent"], tmp_path, "cpu", 60.0, env, tiny=False)["figures"] == 0


def test_time_that_a_part_leaves_goes_to_those_after_it() -> None:
    """Shares 1, 1 and 2 of 100 s; the last never needs more than 60."""
    three = [Part("a", "a", "", 1), Part("b", "b", "", 1), Part("c", "c", "", 2, at_most=60)]
    assert gpu.limit_of_first(three, 100) == 25
    assert gpu.limit_of_first(three[1:], 90) == 30  # the first took 10
    assert gpu.limit_of_first(three[2:], 70) == 60
    assert gpu.limit_of_first(three[2:], 70, tiny=True) == 70


def test_a_second_call_goes_on_with_what_is_not_done(
    parts: dict[str, Part],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = {"machine": {"device": "one"}, "versions": {}, "backend": "cpu"}
    monkeypatch.setattr(gpu, "PARTS", [parts["part_done"], parts["part_failing"]])
    monkeypatch.setattr(gpu, "machine", lambda env: told)
    out = tmp_path / "out"
    assert gpu.main(["--tiny", "--out", str(out)]) == 1
    first = json.loads((out / "summary.json").read_text())["parts"]
    assert [part["status"] for part in first.values()] == ["done", "failed"]
    assert "part_failing" in capsys.readouterr().out
    (tmp_path / "modules" / "part_failing.py").write_text(WRITES)
    (tmp_path / "modules" / "part_done.py").write_text("raise SystemExit('not again')")
    assert gpu.main(["--tiny", "--out", str(out)]) == 0
    second = json.loads((out / "summary.json").read_text())["parts"]
    assert [part["status"] for part in second.values()] == ["done", "done"]
    assert second["part_done"] == first["part_done"]
    assert gpu.main(["--tiny", "--again", "--only", "part_done", "--out", str(out)]) == 1
    third = json.loads((out / "summary.json").read_text())["parts"]
    assert [part["status"] for part in third.values()] == ["failed", "done"]
    told["machine"] = {"device": "another"}
    assert gpu.main(["--tiny", "--out", str(out)]) == 2
    assert "holds figures of one with --tiny, this is another" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"machine": {"device": "a CPU"}, "versions": {}, "backend": "cpu"}
    monkeypatch.setattr(gpu, "machine", lambda env: told)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "JAX finds no GPU here, only a CPU" in capsys.readouterr().err


def test_a_missing_package_has_no_version_and_stops_nothing() -> None:
    told = facts("numpy", "no-such-package-anywhere")
    assert told["versions"]["numpy"] == np.__version__
    assert told["versions"]["no-such-package-anywhere"] is None


def test_numbers_are_found_wherever_they_stand() -> None:
    results: dict[str, Any] = {"versions": {"jax": 1}, "a": [{"b": 2}, 3.5], "c": None, "d": True, "e": "4"}
    assert numbers(results) == {"a/0/b": 2, "a/1": 3.5}


def test_products_are_counted_by_dtype_and_overlaps_once() -> None:
    line = "%3 = stablehlo.dot_general %1, %2, contracting_dims = [1] x [0] : "
    text = f"{line}(tensor<4x8xbf16>, tensor<8x2xbf16>) -> tensor<4x2xf32>\n"
    text += 2 * f"{line}(tensor<4x8xf32>, tensor<8x2xbf16>) -> tensor<4x2xf32>\n"
    assert product_dtypes(text) == {"f32 x bf16 -> f32": 2, "bf16 x bf16 -> f32": 1}
    assert busy_ns([Event("a", 0, 10), Event("b", 5, 10), Event("c", 6, 1), Event("d", 20, 5)]) == 20


def test_all_of_it_runs_small_on_a_cpu(tmp_path: Path) -> None:
    """Every part that is there gives figures; what none of the parts may need is network or data."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--minutes", "20", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    summary = json.loads((out / "summary.json").read_text())
    wrong = {
        name: part for name, part in summary["parts"].items() if part["status"] not in ("done", "not there")
    }
    logs = {name: (out / f"{name}.log").read_text()[-2000:] for name in wrong}
    assert (done.returncode, wrong) == (0, {}), f"{done.stderr}\n{logs}"
    assert list(summary["parts"]) == [part.name for part in PARTS]
    for name, part in summary["parts"].items():
        if part["status"] == "done":
            assert part["figures"] > 0, name
            assert part["headline"], name
            assert name in done.stdout
            assert json.loads((out / part["file"]).read_text())
    contenders = json.loads((out / "latency_cpu.json").read_text())["batches"]["1"]["contenders"]
    assert {row["p50_ms"] > 0 for row in contenders.values()} == {True}
    assert min(row["least_cosine_to_float32"] for row in contenders.values()) > 0.999
    trained = json.loads((out / "training_cpu.json").read_text())["default_model"]
    assert min(result["samples_per_second"] for result in trained.values()) > 0
