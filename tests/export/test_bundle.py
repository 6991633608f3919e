"""The bundle: complete, reproducible, verified by every reader, and never written when something is wrong."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from predictors import D, N, make, requests
from safetensors.numpy import load_file, save_file

import prime_jax
from prime_jax.errors import CheckpointError, ExportError
from prime_jax.export import bundle as module
from prime_jax.export import golden, inspection, torch_runtime
from prime_jax.export.bundle import facts_of, write_bundle
from prime_jax.export.to_torch import state_dict
from prime_jax.files import read_json, write_json
from prime_jax.manifest import manifest_digest, write_manifest

FILES = [
    "MODEL_CARD.md",
    "config.json",
    "golden.safetensors",
    "model.onnx",
    "model.safetensors",
    "parity.json",
    "torch_runtime.py",
]
FACTS = {
    "encoder": "minilm-0123",
    "query_prefix": "query: ",
    "passage_prefix": "",
    "step": 120,
    "epoch": 3,
    "metrics": {"MRR@10": 0.25},
    "data_hash": "ab" * 32,
}
REPORT = {
    "split": "test",
    "queries": 1200,
    "corpus": 15_800,
    "methods": {"query": {"MRR@10": 0.101}, "predicted": {"MRR@10": 0.281}},
    "run": {"step": 120},
}


def model() -> prime_jax.EmbeddingPredictor:
    return make(residual="copy", context_attention="causal", use_torch_compile=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "bundle"
    write_bundle(model(), folder, facts=FACTS | {"report": REPORT})
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "bundle"))


def test_files(written: Path) -> None:
    assert sorted(file.name for file in written.iterdir()) == sorted([*FILES, "manifest.json"])
    assert {oct(file.stat().st_mode & 0o777) for file in written.iterdir()} == {"0o644"}
    assert list(written.parent.iterdir()) == [written]
    source = Path(torch_runtime.__file__).read_bytes()
    assert (written / "torch_runtime.py").read_bytes() == source


def test_the_same_model_gives_the_same_bytes(written: Path, copied: Path) -> None:
    """Written once more over a bundle that is there."""
    write_bundle(model(), copied, facts=FACTS | {"report": REPORT})
    for name in [*FILES, "manifest.json"]:
        assert (copied / name).read_bytes() == (written / name).read_bytes(), name


def test_golden_requests(written: Path) -> None:
    """Every number of turns once, unit vectors, padding in front in every second row, JAX's answers."""
    arrays = load_file(written / "golden.safetensors")
    np.testing.assert_array_equal(arrays["context_mask"].sum(axis=1), np.arange(N + 1))
    np.testing.assert_array_equal(arrays["context_mask"][1:3], [[0, 0, 0, 1], [1, 1, 0, 0]])
    for name in ("context", "query", "embedding"):
        np.testing.assert_allclose(np.linalg.norm(arrays[name], axis=-1), 1, atol=1e-6)
    p = prime_jax.load(written)
    answers = p.predict(arrays["context"], arrays["query"], arrays["context_mask"])
    np.testing.assert_allclose(answers, arrays["embedding"], atol=1e-6)


def test_parity_is_measured_in_both_runtimes(written: Path) -> None:
    parity = read_json(written / "parity.json")
    assert parity["rows"] == N + 1
    for name in ("onnxruntime", "torch"):
        assert parity[name]["checked"] is True
        assert 0 < parity[name]["max_abs_difference"] < 1e-5
        assert 1 - 1e-9 < parity[name]["min_cosine"] < 1 + 1e-9
    found = parity["batch_independence"]
    assert found["max_abs_difference"]["fp32"] < 1e-6
    shown = f"{found['max_abs_difference']['fp32']:.1e} in fp32"
    assert shown in (written / "MODEL_CARD.md").read_text()


def test_comes_back_in_jax_and_in_torch(written: Path) -> None:
    context, query, mask = requests(20)
    expected = prime_jax.Predictor.from_model(model()).predict(context, query, mask)
    np.testing.assert_array_equal(prime_jax.load(written).predict(context, query, mask), expected)
    loaded = torch_runtime.load_bundle(written)
    assert not loaded.training
    assert loaded.get_num_params() == model().num_params()
    got = loaded(*map(torch.from_numpy, (context, query, mask)))
    np.testing.assert_allclose(got.detach(), expected, atol=1e-5)


def test_weights_of_a_loaded_bundle_can_be_trained(written: Path) -> None:
    loaded = torch_runtime.load_bundle(written).train()
    before = {name: weight.clone() for name, weight in loaded.named_parameters()}
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    loaded(torch.randn(3, N, D), torch.randn(3, D))[:, 0].sum().backward()
    optimizer.step()
    assert all(not torch.equal(weight, before[name]) for name, weight in loaded.named_parameters())


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_any_flipped_byte_is_found_by_every_reader(copied: Path, name: str) -> None:
    """At the first, the last, and random places, by random amounts."""
    whole = (copied / name).read_bytes()
    rng = np.random.default_rng(len(whole))
    for place in [0, len(whole) - 1, *rng.integers(0, len(whole), 6)]:
        data = bytearray(whole)
        data[place] ^= int(rng.integers(1, 256))
        (copied / name).write_bytes(data)
        with pytest.raises(torch_runtime.CheckpointError, match=name):
            torch_runtime.load_bundle(copied)
        with pytest.raises(CheckpointError, match=name):
            prime_jax.load(copied)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(torch_runtime.CheckpointError, match=name):
        torch_runtime.load_bundle(copied)


def reseal(bundle: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the checksum it would have."""
    sealed = manifest | {"sha256": manifest_digest(manifest)}
    write_json(bundle / "manifest.json", sealed)


def test_a_changed_fact_in_the_manifest_is_caught(copied: Path) -> None:
    manifest = read_json(copied / "manifest.json") | {"step": 8}
    write_json(copied / "manifest.json", manifest)
    with pytest.raises(torch_runtime.CheckpointError, match="differs from its own SHA-256"):
        torch_runtime.load_bundle(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "checkpoint"}, "not the manifest of a bundle"),
        ({"format_version": 3}, r"format version 3, this code reads \(1, 2\)"),
        ({"files": {}}, "does not list config.json"),
        ({"files": {"config.json": {}, "model.safetensors": {}}}, "not listed in manifest.json"),
    ],
)
def test_a_strange_manifest_is_refused(copied: Path, change: dict[str, object], message: str) -> None:
    reseal(copied, read_json(copied / "manifest.json") | change)
    with pytest.raises(torch_runtime.CheckpointError, match=message):
        torch_runtime.load_bundle(copied)


def test_an_added_file_or_a_link_is_found_by_every_reader(copied: Path) -> None:
    added = copied / "torch_runtime" / "__init__.py"  # would be imported instead of torch_runtime.py
    added.parent.mkdir()
    added.write_text("raise SystemExit")
    for load, error in (
        (torch_runtime.load_bundle, torch_runtime.CheckpointError),
        (prime_jax.load, CheckpointError),
    ):
        with pytest.raises(error, match=r"__init__\.py: not listed"):
            load(copied)
    shutil.rmtree(added.parent)
    (copied / "config.json").rename(copied.parent / "config.json")
    (copied / "config.json").symlink_to(copied.parent / "config.json")
    for load, error in (
        (torch_runtime.load_bundle, torch_runtime.CheckpointError),
        (prime_jax.load, CheckpointError),
    ):
        with pytest.raises(error, match=r"config\.json: a link"):
            load(copied)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{}", "does not describe a model"),
        ("config.json", "[]", "does not describe a model"),
        ("config.json", '{"model": {"hidden_dim": "wide"}}', "does not describe a model"),
        ("model.safetensors", "junk", "not a safetensors file"),
    ],
)
def test_sealed_nonsense_is_named(copied: Path, name: str, content: str, message: str) -> None:
    (copied / name).write_text(content)
    write_manifest(copied, "bundle", onnx={"fp32": "model.onnx"})
    with pytest.raises(CheckpointError, match=message):
        prime_jax.load(copied)
    with pytest.raises(torch_runtime.CheckpointError, match=name):
        torch_runtime.load_bundle(copied)
    if name == "config.json":
        assert inspection.main([str(copied)]) == 2


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret"])
def test_a_path_that_leaves_the_folder_is_refused(copied: Path, name: str) -> None:
    (copied.parent / "secret").write_text("")
    manifest = read_json(copied / "manifest.json")
    manifest["files"][name] = manifest["files"]["config.json"]
    reseal(copied, manifest)
    with pytest.raises(torch_runtime.CheckpointError, match="leaves the folder"):
        torch_runtime.load_bundle(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": None}, r"tensor 'norm\.bias' is missing"),
        ({"norm.gain": np.ones(2, np.float32)}, r"tensor 'norm\.gain' is unexpected"),
        (
            {"norm.bias": np.ones(2, np.float32)},
            r"'norm\.bias' is torch\.float32 \(2,\), expected .*\(128,\)",
        ),
        ({"norm.bias": np.ones(128, bool)}, r"'norm\.bias' is torch\.bool \(128,\), expected torch\.float32"),
        ({"norm.bias": np.full(128, np.inf, np.float32)}, r"'norm\.bias' holds NaN or Inf"),
    ],
)
def test_weights_that_do_not_fit_are_named_in_torch(
    copied: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    tensors = state_dict(model()) | change
    tensors = {name: array for name, array in tensors.items() if array is not None}
    save_file(tensors, copied / "model.safetensors")
    write_manifest(copied, "bundle")
    with pytest.raises(torch_runtime.CheckpointError, match=rf"model\.safetensors: .*{message}"):
        torch_runtime.load_bundle(copied)


def test_weights_with_nan_are_not_exported(tmp_path: Path) -> None:
    broken = model()
    broken.layers[1].mlp_in.kernel[...] = broken.layers[1].mlp_in.kernel[...].at[3, 4].set(np.nan)
    with pytest.raises(ExportError, match=r"'layers\.1\.mlp\.0\.weight' holds NaN or Inf"):
        write_bundle(broken, tmp_path / "bundle", facts={})
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's answers moved by 1e-4: the ONNX file differs by that much, and an older bundle stays."""
    true = golden.jax_answers

    def moved(*given: Any) -> golden.Arrays:
        return {name: array + np.float32(1e-4) for name, array in true(*given).items()}

    monkeypatch.setattr(module, "jax_answers", moved)
    with pytest.raises(ExportError, match=r"onnxruntime differs from JAX by 0\.0001 .*allowed is 1e-05"):
        write_bundle(model(), tmp_path / "bundle", facts={})
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_a_bundle_is_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "thesis" / "chapter1.tex"
    precious.parent.mkdir()
    precious.write_text("...")
    with pytest.raises(ExportError, match="holds something that is not a bundle"):
        write_bundle(model(), precious.parent, facts={})
    with pytest.raises(ExportError, match="is a file"):
        write_bundle(model(), precious, facts={})
    assert precious.read_text() == "..."


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_a_runtime_that_is_not_installed_is_reported(
    written: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    parity = golden.compare(load_file(written / "golden.safetensors"), written)
    assert parity[name] == {"checked": False, "why": f"{name} is not installed"}
    (other,) = {"onnxruntime", "torch"} - {name}
    assert parity[other]["checked"] is True


def test_the_card_says_where_the_model_comes_from(written: Path) -> None:
    card = (written / "MODEL_CARD.md").read_text()
    assert "encoder `minilm-0123`" in card
    assert "Queries and turns are encoded with `query: ` in front." in card
    assert "| predicted | 0.2810 |" in card
    assert "1,200 queries, 15,800 passages" in card
    assert f"float32 [B, {N}, {D}]" in card
    info = prime_jax.load(written).info()
    assert {name: info[name] for name in FACTS} == FACTS


def test_facts_carry_the_report_of_this_checkpoint_only(copied: Path) -> None:
    """From a bundle, as from a run folder, with a report beside it."""
    predictor = prime_jax.load(copied)
    assert facts_of(predictor, copied) == FACTS
    report = copied / "report" / "report.json"
    report.parent.mkdir()
    report.write_text(json.dumps(REPORT))
    assert facts_of(predictor, copied) == FACTS | {"report": REPORT}
    report.write_text(json.dumps(REPORT | {"run": {"step": 80}}))
    with pytest.raises(ExportError, match="describes step 80, but the checkpoint is of step 120"):
        facts_of(predictor, copied)
