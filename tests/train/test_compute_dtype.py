"""A bfloat16 training step computes in bfloat16: its products, its gradients, and what it keeps between."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_bert
from flax import nnx
from jasper_parts import CENTROIDS, CLUSTERS, SMALL
from jasper_parts import batch as steered_batch
from lowered import matrix_products, with_a_float32_factor
from steps import DIM, MODEL, batch, passages, unit_rows, with_everything

from prime_jax.config import MeshConfig, TrainingConfig
from prime_jax.losses import AnyObjective
from prime_jax.losses.corpus import in_chunks
from prime_jax.losses.jasper import JasperLossConfig, JasperObjective
from prime_jax.losses.objective import Objective
from prime_jax.models import ModelConfig
from prime_jax.models.jasper import JasperConfig
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.subspace import SubspaceConfig
from prime_jax.nn import linear
from prime_jax.nn.linear import einsum_accumulate_f32
from prime_jax.nn.remat import Remat
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.train.encoders import encoder_plan, initial_encoders
from prime_jax.train.sharding import SMALLEST_SHARED, make_mesh, split_batch, state_shardings
from prime_jax.train.state import build_graph, init_state
from prime_jax.train.step import StepPlan, make_train_step
from prime_jax.types import BatchTexts, Texts

# Products that stay float32 by choice. Losses compare unit vectors whose similarities are divided by a small
# temperature; the others are small beside the layers, and cheap.
LOSSES = {"info_nce", "corpus_info_nce", "projection", "target_head"}
STEERED = {"info_nce", "online_encoder", "covariance", "centroid_logits", "coarse"}
PRIME = MODEL.model_copy(update={"dropout": 0.1})
LLAMA = PRIME.model_copy(update={"block": "llama", "num_kv_heads": 1})
SGD = optax.sgd(0.1)


def lowered(
    config: ModelConfig,
    rows: Any,
    *,
    dtype: Any = jnp.bfloat16,
    objective: AnyObjective | None = None,
    plan: StepPlan | None = None,
    corpus: Any = None,
    placed: Callable[[Any], Any] = lambda shapes: shapes,
    **state: Any,
) -> Any:
    """The program of a step, not compiled; `placed` may say where its arguments are."""
    objective = objective or Objective()
    shape = jax.eval_shape(lambda: init_state(config, SGD, 0, objective, **state))
    step = make_train_step(build_graph(config, dtype), SGD, objective, plan or StepPlan(10))
    arguments = placed((shape, jax.tree.map(jnp.asarray, rows), corpus))
    return step.trace(*arguments).lower(lowering_platforms=("cuda",))


def jasper_objective() -> JasperObjective:
    return JasperObjective(Objective(), JasperLossConfig(), CENTROIDS, gumbel=(1.0, 0.1))


STEPS: dict[str, tuple[set[str], dict[str, Any]]] = {
    "prime": (LOSSES, {"config": PRIME, "rows": with_everything(0)}),
    "copied turns and a linear map": (
        LOSSES | {"mixed_turns"},
        {"config": PRIME.model_copy(update={"residual": "linear"}), "rows": batch(0)},
    ),
    "micro-batches": (LOSSES, {"config": PRIME, "rows": batch(0), "plan": StepPlan(10, micro_batch=8)}),
    "remat": (LOSSES, {"config": PRIME, "rows": batch(0), "plan": StepPlan(10, remat="blocks")}),
    "rotated batches": (
        LOSSES | {"rotation"},
        {"config": PRIME, "rows": batch(0), "plan": StepPlan(10, rotation=0.5)},
    ),
    "corpus": (LOSSES, {"config": PRIME, "rows": batch(0), "corpus": in_chunks(passages(), 8)}),
    "projection and target head": (
        LOSSES,
        {"config": PRIME, "rows": batch(0), "objective": Objective(projection_dim=4, target="ema")},
    ),
    "llama": (LOSSES, {"config": LLAMA, "rows": batch(0)}),
    "adapters": (LOSSES | {"adapters"}, {"config": LLAMA, "rows": batch(0), "lora_rank": 2}),
    "jasper": (
        STEERED,
        {"config": JasperConfig(**SMALL), "rows": steered_batch(), "objective": jasper_objective()},
    ),
    "subspace": (
        STEERED,
        {
            "config": SubspaceConfig(**SMALL, num_subspaces=CLUSTERS),
            "rows": steered_batch(hard=2),
            "objective": jasper_objective(),
        },
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_no_product_of_a_bfloat16_step_has_a_float32_factor_but_those_chosen(name: str) -> None:
    chosen, settings = STEPS[name]
    products = matrix_products(lowered(**settings))
    assert not with_a_float32_factor(products, chosen)
    forward = [one for one in products if one.factors == ("bf16", "bf16") and "transpose" not in one.scope]
    backward = [one for one in products if one.factors == ("bf16", "bf16") and "transpose" in one.scope]
    assert len(forward) > 5
    assert len(backward) > 1.5 * len(forward) or name in ("micro-batches", "remat")  # these go forward twice


def test_a_float32_step_has_no_bfloat16_product() -> None:
    products = matrix_products(lowered(PRIME, batch(0), dtype=jnp.float32))
    assert {one.factors for one in products} == {("f32", "f32")}


def test_the_step_of_a_trained_encoder(tmp_path: Path) -> None:
    encoder = BertTextEncoder(tiny_bert.write_folder(tmp_path / "tiny", tiny_bert.tensors()))
    settings = TrainingConfig(x_encoder="trained", y_encoder="slow")
    plan, encoders = encoder_plan(encoder, settings), initial_encoders(encoder, settings)
    config = PredictorConfig(
        input_dim=encoder.dim, output_dim=encoder.dim, hidden_dim=128, num_heads=2, max_context_length=1
    )
    rng = np.random.default_rng(0)

    def texts(*shape: int) -> Texts:
        return Texts(rng.integers(1, 9, (*shape, 16)), np.full(shape, 12))

    rows = batch(0, 4)._replace(
        context=np.zeros((4, 1, encoder.dim), np.float32),
        context_mask=np.ones((4, 1), bool),
        query=np.zeros((4, encoder.dim), np.float32),
        target=unit_rows(rng, 4, encoder.dim),
        texts=BatchTexts(texts(4, 2), texts(4)),
    )
    program = lowered(config, rows, plan=StepPlan(10, encoders=plan), encoders=encoders)
    products = matrix_products(program)
    assert not with_a_float32_factor(products, LOSSES)
    assert len(products) > 100


class TestEinsum:
    """The product whose backward pass is written out by hand."""

    left = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    right = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    slope = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)

    @staticmethod
    def rounded(array: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(array).astype(jnp.bfloat16).astype(jnp.float32))

    def pulled_back(self, *, dtype: Any, result_dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
        def product(left: jax.Array, right: jax.Array) -> jax.Array:
            return einsum_accumulate_f32("mi,io->mo", left, right, dtype, result_dtype)

        answer, pull_back = jax.vjp(product, jnp.asarray(self.left), jnp.asarray(self.right))
        return (answer, *pull_back(jnp.asarray(self.slope, answer.dtype)))

    def test_bfloat16_rounds_factors_and_slope_and_nothing_else(self) -> None:
        answer, to_left, to_right = self.pulled_back(dtype=jnp.bfloat16)
        left, right, slope = map(self.rounded, (self.left, self.right, self.slope))
        assert (answer.dtype, to_left.dtype, to_right.dtype) == (jnp.float32,) * 3
        np.testing.assert_allclose(answer, left @ right, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(to_left, slope @ right.T, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(to_right, left.T @ slope, rtol=1e-6, atol=1e-6)

    def test_a_bfloat16_result_rounds_the_result_and_the_slope_of_the_activation(self) -> None:
        answer, to_left, to_right = self.pulled_back(dtype=jnp.bfloat16, result_dtype=jnp.bfloat16)
        left, right, slope = map(self.rounded, (self.left, self.right, self.slope))
        assert answer.dtype == jnp.bfloat16
        np.testing.assert_array_equal(answer.astype(jnp.float32), self.rounded(left @ right))
        np.testing.assert_array_equal(to_left, self.rounded(slope @ right.T))
        np.testing.assert_allclose(to_right, left.T @ slope, rtol=1e-6, atol=1e-6)  # a weight's: float32

    def test_float32_rounds_nothing(self) -> None:
        answer, to_left, to_right = self.pulled_back(dtype=jnp.float32)
        np.testing.assert_allclose(answer, self.left @ self.right, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(to_left, self.slope @ self.right.T, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(to_right, self.left.T @ self.slope, rtol=1e-6, atol=1e-6)


def gradients(config: PredictorConfig) -> dict[str, np.ndarray]:
    """Gradient of InfoNCE over 256 rows for every parameter, with dropout, in bfloat16."""
    rng = np.random.default_rng(0)
    context, query, target = (
        jnp.asarray(unit_rows(rng, *shape)) for shape in ((256, 2, DIM), (256, DIM), (256, DIM))
    )
    graph, params = nnx.split(config.build(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

    def loss(params: Any) -> jax.Array:
        predicted = nnx.merge(graph, params)(context, query, dropout_key=jax.random.key(1))
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(predicted @ target.T / 0.07)))

    found = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(jax.jit(jax.grad(loss))(params)))
    return {jax.tree_util.keystr(at): np.asarray(leaf) for at, leaf in found}


@pytest.mark.parametrize("config", [PRIME, LLAMA], ids=["gelu", "llama"])
def test_gradients_agree_with_those_of_a_float32_backward_pass(
    config: PredictorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference rounds the factors of forward products and nothing else, as JAX derives it."""
    found = gradients(config)

    def derived_by_jax(equation: str, left: Any, right: Any, dtype: Any, result_dtype: Any) -> jax.Array:
        return jnp.einsum(
            equation,
            left.astype(dtype),
            right.astype(dtype),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    monkeypatch.setattr(linear, "_rounded_einsum", derived_by_jax)
    for name, expected in gradients(config).items():
        norms = np.linalg.norm(found[name]), np.linalg.norm(expected)
        assert np.vdot(found[name], expected) >= 0.999 * norms[0] * norms[1], name
        assert norms[0] == pytest.approx(norms[1], rel=0.01), name


def bytes_kept(config: PredictorConfig, rows: int, dtype: Any, remat: Remat = "none") -> int:
    """Bytes that the backward pass needs of the forward pass, weights apart."""
    graph, params = nnx.split(nnx.eval_shape(lambda: config.build(dtype=dtype, rngs=nnx.Rngs(0))))
    shapes = config.fake_inputs(rows)

    def pull_back(params: Any, context: Any, query: Any, mask: Any) -> Any:
        def predict(params: Any) -> jax.Array:
            model = nnx.merge(graph, params)
            return model(context, query, mask, dropout_key=jax.random.key(0), remat=remat)

        return jax.vjp(predict, params)[1]

    kept = jax.eval_shape(pull_back, params, shapes["context"], shapes["query"], shapes["context_mask"])
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept) if leaf.shape not in weights)


def test_a_bfloat16_step_keeps_a_third_of_what_float32_keeps() -> None:
    """The default model: 3.8 MB per row of a batch in bfloat16, 11.1 MB in float32 (docs/performance.md)."""

    def per_row(dtype: Any, remat: Remat = "none") -> float:
        few, many = (bytes_kept(PredictorConfig(), rows, dtype, remat) for rows in (8, 16))
        return (many - few) / 8 / 1e6

    half = per_row(jnp.bfloat16)
    assert 3.0 < half < 3.8
    assert per_row(jnp.float32) == pytest.approx(11.1, abs=0.1)
    assert per_row(jnp.bfloat16, "dots") < 1.8
    assert per_row(jnp.bfloat16, "blocks") < 0.5


@pytest.mark.parametrize("config", [PRIME, LLAMA], ids=["gelu", "llama"])
def test_shared_matrices_are_gathered_in_bfloat16(config: PredictorConfig) -> None:
    """With fsdp every matrix travels in two bytes per number, and not a bit of the step changes."""
    devices = make_mesh(MeshConfig(data=1, fsdp=2), 16)
    objective = Objective()
    answers = {}
    for gathered in (jnp.float32, jnp.bfloat16):
        state = init_state(config, SGD, 0, objective)
        state = jax.device_put(state, state_shardings(devices, state))
        plan = StepPlan(10, compute_dtype=gathered)
        step = make_train_step(build_graph(config, jnp.bfloat16), SGD, objective, plan, devices)
        compiled = step.lower(state, split_batch(batch(0), devices)).compile()
        kinds = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
        large = {
            kind for kind, shape in kinds if np.prod([int(n) for n in shape.split(",")]) >= SMALLEST_SHARED
        }
        assert large == {"u16" if gathered == jnp.bfloat16 else "f32"}, kinds
        answers[gathered] = compiled(state, split_batch(batch(0), devices))
    for one, other in zip(*map(jax.tree.leaves, answers.values()), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
