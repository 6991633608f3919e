"""JASPER's objective: equal to torch, weights applied once, and none of the public original's faults."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jasper_parts import CENTROIDS, CLUSTERS, DIM, batch, jasper, subspace, unit_rows

from prime_jax.losses.alignment import smooth_l1
from prime_jax.losses.jasper import (
    COMPONENTS,
    ONLINE_ENCODER,
    ROUTING_COMPONENTS,
    JasperLossConfig,
    JasperObjective,
)
from prime_jax.losses.objective import Objective
from prime_jax.nn.online_encoder import encode, initial_encoder
from prime_jax.types import Batch, Prediction

torch = pytest.importorskip("torch")

STEERINGS = ("zero", "centroid", "keyword")
WEIGHTS = {
    "contrastive": 0.3,
    "jepa": 0.9,
    "centroid": 0.2,
    "vicreg": 0.05,
    "routing": 1.1,
    "entropy": 0.4,
    "residual": 0.6,
    "disentanglement": 0.7,
}


def objective(**settings: Any) -> JasperObjective:
    return JasperObjective(
        Objective(temperature=0.1),
        JasperLossConfig(**(WEIGHTS | {"residual_margin": 0.1} | settings)),
        CENTROIDS,
        steerings=STEERINGS,
        gumbel=(1.0, 0.1),
    )


def encoder(seed: int) -> dict[str, Any]:
    """One that has learned something: not the identity that it starts as."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape).astype(np.float32)),
        initial_encoder(jax.random.key(seed), DIM),
    )


TRAINED = {ONLINE_ENCODER: encoder(1)}
AVERAGE = encoder(2)


def predicted(rows: Batch, kind: str = "subspace", key: Any = 3) -> Prediction:
    model = subspace() if kind == "subspace" else jasper()
    dropout = None if key is None else jax.random.key(key)
    return model.details(rows.context, rows.query, rows.context_mask, dropout_key=dropout, progress=0.2)


def figure(figures: dict[str, Any], name: str) -> float:
    return float(figures["loss" if name == "contrastive" else name])


def in_torch(prediction: Prediction, rows: Batch) -> dict[str, Any]:
    """Every loss by its published formula, from numbers alone."""

    def tensor(array: Any) -> Any:
        return torch.tensor(np.asarray(array))

    def encoded(params: dict[str, Any], x: Any) -> Any:
        hidden = torch.nn.functional.gelu(x @ tensor(params["inner"]) + tensor(params["bias"]))
        return normalize(x + hidden @ tensor(params["outer"])) * x.shape[1] ** 0.5

    def off_diagonal(x: Any) -> Any:
        matrix = torch.cov(x.T)
        return (matrix.pow(2).sum() - matrix.diag().pow(2).sum()) / x.shape[1]

    def hinge(x: Any) -> Any:
        return torch.relu(1 - torch.sqrt(x.var(dim=0) + 1e-4)).mean()

    normalize, cross_entropy = torch.nn.functional.normalize, torch.nn.functional.cross_entropy
    found, target, cluster = tensor(prediction.embedding), tensor(rows.target), tensor(rows.cluster).long()
    logits, right = tensor(prediction.logits), tensor(rows.positive_ids)
    scores = torch.cat([found @ target.T, torch.einsum("be,bke->bk", found, tensor(rows.negatives))], dim=1)
    ids = torch.cat([tensor(rows.target_id).expand(len(found), -1), tensor(rows.negative_ids)], dim=1)
    out = (ids[:, :, None] == right[:, None]).any(dim=2) | (ids < 0)
    out[range(len(found)), range(len(found))] = False
    scores = (scores / 0.1).masked_fill(out, -torch.inf)
    seen, known = encoded(TRAINED[ONLINE_ENCODER], found), encoded(AVERAGE, target)
    sure = torch.distributions.Categorical(logits=logits).entropy()
    wanted = np.log(CLUSTERS) + (0.1 - np.log(CLUSTERS)) * 5 / 20
    return {
        "contrastive": cross_entropy(scores, torch.arange(len(found))),
        "jepa": torch.nn.functional.smooth_l1_loss(seen, known),
        "vicreg": 25 * (hinge(seen) + hinge(known))
        + 25 * torch.nn.functional.mse_loss(seen, known)
        + off_diagonal(seen)
        + off_diagonal(known),
        "centroid": cross_entropy(found @ tensor(CENTROIDS).T / 0.1, cluster),
        "routing": cross_entropy(logits, cluster),
        "entropy": (sure - wanted).pow(2).mean(),
        "residual": torch.relu(tensor(prediction.fine).norm(dim=1) - 0.1).mean(),
        "disentanglement": off_diagonal(tensor(prediction.routing)),
    }


def test_every_loss_and_their_sum_equal_torch() -> None:
    """With hard negatives, one of them a right answer, an empty slot, and a passage that two rows want."""
    rows = batch(hard=3)
    rows = rows._replace(
        target=rows.target.at[4].set(rows.target[1]),
        target_id=rows.target_id.at[4].set(1),
        positive_ids=jnp.array([[0, 2], [1, -1], [2, 0], [3, 109], [1, -1], [5, -1]]),
    )
    prediction = predicted(rows)
    total, figures = objective()(prediction, rows, TRAINED, average=AVERAGE, epoch=5.0)
    theirs = in_torch(prediction, rows)
    assert theirs.keys() == WEIGHTS.keys()
    for name, value in theirs.items():
        assert float(value) > 1e-3, name
        np.testing.assert_allclose(figure(figures, name), float(value), rtol=1e-5, atol=1e-5, err_msg=name)
    whole = sum(WEIGHTS[name] * float(value) for name, value in theirs.items())
    np.testing.assert_allclose(total, whole, rtol=1e-5)


@pytest.mark.parametrize("kind", ["jasper", "subspace"])
def test_every_weight_counts_once(kind: str) -> None:
    """The total is the sum of the figures told, each times its weight; the original applies weights twice."""
    rows = batch(hard=2)
    names = COMPONENTS if kind == "jasper" else COMPONENTS + ROUTING_COMPONENTS
    prediction = predicted(rows, kind)
    total, figures = objective()(prediction, rows, TRAINED, average=AVERAGE, epoch=5.0)
    assert total == figures["total"]
    assert {name for name in WEIGHTS if name in figures or name == "contrastive"} == set(names)
    np.testing.assert_allclose(total, sum(WEIGHTS[name] * figure(figures, name) for name in names), rtol=1e-6)
    for name in names:
        more = objective(**{name: WEIGHTS[name] + 1})
        there, again = more(prediction, rows, TRAINED, average=AVERAGE, epoch=5.0)
        assert figure(again, name) == figure(figures, name)
        np.testing.assert_allclose(there - total, figure(figures, name), rtol=1e-4, atol=1e-5)


def test_hand_computed_value() -> None:
    """Two rows on the axes, both right; encoders are the identity times sqrt(2); clusters are the axes."""
    axes = jnp.eye(2)
    rows = batch(rows=2)._replace(target=axes, cluster=jnp.arange(2), context=axes[:, None], query=axes)
    weights = dict.fromkeys(ROUTING_COMPONENTS, 0.0) | dict.fromkeys(COMPONENTS, 1.0)
    ours = JasperObjective(Objective(temperature=1.0), JasperLossConfig(**weights), axes)
    total, figures = ours(
        Prediction(axes), rows, {ONLINE_ENCODER: initial_encoder(jax.random.key(0), 2)}, average=None
    )
    # Coordinates are 0 and sqrt(2): variance 1, so no hinge; covariance -1 twice, so 2 / 2 for each view.
    guess = np.log1p(np.exp(-1))
    expected = {"loss": guess, "jepa": 0.0, "vicreg": 2.0, "centroid": np.log1p(np.exp(-10))}
    for name, value in expected.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(total, sum(expected.values()), rtol=1e-5)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ((0.0, 0.0), {0.0: 0.9, 7.0: 0.9}),
        ((0.0, 4.0), {0.0: 0.0, 1.0: 0.225, 4.0: 0.9, 9.0: 0.9}),
        ((2.0, 4.0), {0.0: 0.0, 2.0: 0.0, 2.5: 0.225, 3.0: 0.45, 4.0: 0.9, 9.0: 0.9}),
        ((3.0, 3.0), {2.99: 0.0, 3.0: 0.9, 4.0: 0.9}),
    ],
)
def test_a_stage_brings_a_loss_in(stage: tuple[float, float], expected: dict[float, float]) -> None:
    staged = JasperLossConfig(jepa=0.9, stage_in={"jepa": stage})
    for epoch, weight in expected.items():
        np.testing.assert_allclose(staged.weight("jepa", epoch), weight, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(staged.weight("vicreg", epoch), 0.1, rtol=1e-6)


def test_a_loss_before_its_stage_is_told_but_teaches_nothing() -> None:
    rows = batch()
    off, on = objective(jepa=0.0), objective(stage_in={"jepa": (5.0, 6.0)})

    def slope(ours: JasperObjective, epoch: float) -> jax.Array:
        found = predicted(rows)
        return jax.grad(lambda x: ours(found._replace(embedding=x), rows, TRAINED, epoch=epoch)[0])(
            found.embedding
        )

    np.testing.assert_array_equal(slope(on, 5.0), slope(off, 5.0))
    np.testing.assert_array_equal(slope(on, 6.0), slope(objective(), 6.0))
    assert float(on(predicted(rows), rows, TRAINED, epoch=1.0)[1]["jepa"]) > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_in": {"vicrig": (0, 1)}}, "stage_in names 'vicrig'; the losses are contrastive, jepa"),
        ({"stage_in": {"vicreg": (3, 1)}}, r"stage_in\.vicreg \[3\.0, 1\.0\] must rise"),
        ({"stage_in": {"vicreg": (-1, 1)}}, "must rise from 0"),
        (dict.fromkeys(COMPONENTS, 0.0), "needs a weight above 0"),
        ({"jepa": -0.1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JasperLossConfig(**settings)


def test_a_batch_without_clusters_is_refused() -> None:
    rows = batch()
    with pytest.raises(ValueError, match="clusters"):
        objective()(predicted(rows), rows._replace(cluster=None), TRAINED)


def test_no_gradient_goes_into_the_average_and_one_does_into_the_encoder() -> None:
    rows = batch()
    found = predicted(rows)

    def loss(trained: Any, average: Any) -> jax.Array:
        return objective()(found, rows, trained, average=average)[0]

    online, average = jax.grad(loss, argnums=(0, 1))(TRAINED, AVERAGE)
    for name, leaf in online[ONLINE_ENCODER].items():
        assert float(jnp.abs(leaf).max()) > 1e-4, name
    for leaf in jax.tree.leaves(average):
        np.testing.assert_array_equal(leaf, 0.0)


@pytest.mark.parametrize("average", [None, AVERAGE], ids=["without average", "with average"])
def test_the_alignment_does_not_teach_the_encoder_through_the_target(average: Any) -> None:
    """Of `|online(prediction) - known|` only the left side moves: the slope is that of a fixed `known`."""
    rows = batch()
    found = predicted(rows, "jasper")
    alone = dict.fromkeys(WEIGHTS, 0.0) | {"jepa": 1.0}
    known = encode(TRAINED[ONLINE_ENCODER] if average is None else average, rows.target)
    ours = jax.grad(lambda t: objective(**alone)(found, rows, t, average=average)[0])(TRAINED)
    plain = jax.grad(lambda t: smooth_l1(encode(t[ONLINE_ENCODER], found.embedding), known).mean())(TRAINED)
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-7)


def test_with_ema_off_nothing_is_averaged() -> None:
    assert objective(ema=False).averaged is None
    assert objective().averaged == ONLINE_ENCODER


def test_search_space_losses_do_not_go_through_the_encoder() -> None:
    """The original compares negatives and centroids in another space than the target."""
    rows = batch(hard=2)
    found = predicted(rows)
    one, other = (
        objective()(found, rows, {ONLINE_ENCODER: encoder(seed)}, average=encoder(seed + 9))[1]
        for seed in (1, 5)
    )
    assert one["jepa"] != other["jepa"]
    for name in ("loss", "centroid", "similarity", "routing"):
        assert one[name] == other[name]
    right = found._replace(embedding=rows.target)
    assert objective()(right, rows, TRAINED)[1]["similarity"] == pytest.approx(1.0)


@pytest.mark.parametrize("hard", [0, 2])
def test_other_right_answers_are_no_negatives(hard: int) -> None:
    """Rows 0 and 1 ask the same question with two right answers; one is even named as a hard negative."""
    rows = batch(hard=hard)._replace(
        positive_ids=jnp.array([[0, 1], [1, 0], [2, -1], [3, -1], [4, -1], [5, -1]])
    )
    if hard:
        rows = rows._replace(negative_ids=rows.negative_ids.at[0, 0].set(1))
    found = predicted(rows)

    def slope(target: jax.Array) -> jax.Array:
        """How the first row's answer moves InfoNCE's pull on it."""
        alone = dict.fromkeys(WEIGHTS, 0.0) | {"contrastive": 1.0}
        return jax.grad(
            lambda x: objective(**alone)(
                found._replace(embedding=found.embedding.at[0].set(x)), rows._replace(target=target), TRAINED
            )[0]
        )(found.embedding[0])

    figures = objective()(found, rows, TRAINED)[1]
    of_rows = [4, 4, 5, 5, 5, 5] if not hard else [4, 5, 6, 6, 6, 6]
    assert float(figures["negatives"]) == pytest.approx(np.mean(of_rows))
    np.testing.assert_array_equal(
        slope(rows.target), slope(rows.target.at[1].set(unit_rows(99, DIM)))
    )  # the other answer has no say


def test_vicreg_is_silent_about_vectors_spread_evenly() -> None:
    """Gamma 1 cannot be reached by unit vectors; in the encoder's space Hadamard's rows are enough."""
    corners = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float32) / 2
    even = jnp.asarray(np.concatenate([corners, -corners]))
    ours = JasperObjective(Objective(), JasperLossConfig(), even[:4])
    rows = batch(rows=8)._replace(target=even)
    _, figures = ours(Prediction(even), rows, ours.initial(jax.random.key(0), 4))
    np.testing.assert_allclose(figures["vicreg"], 0.0, atol=1e-6)


@pytest.mark.parametrize("kind", ["jasper", "subspace"])
@pytest.mark.parametrize("hard", [0, 2])
def test_a_batch_of_one_is_finite(kind: str, hard: int) -> None:
    """Every figure and every gradient, though variance and covariance of one row do not exist."""
    rows = batch(rows=1, hard=hard)
    found = predicted(rows, kind)

    def loss(prediction: Prediction, trained: Any) -> Any:
        return objective()(prediction, rows, trained, average=AVERAGE)

    (total, figures), slopes = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(found, TRAINED)
    assert np.isfinite(total)
    assert all(np.isfinite(value).all() for value in figures.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_gauges_of_steering_and_routing_by_hand() -> None:
    """The original logs no steering, and its temperature never moves."""
    rows = batch(rows=4)._replace(steering=jnp.array([0, 2, 2, 1]), cluster=jnp.array([0, 1, 2, 3]))
    logits = 50 * jnp.eye(4)[jnp.array([0, 1, 1, 1])]
    weights = jnp.eye(4)[jnp.array([0, 1, 1, 1])]
    fine = jnp.zeros((4, DIM)).at[:, 0].set(jnp.array([1.0, 2.0, 3.0, 2.0]))
    found = Prediction(CENTROIDS[jnp.array([0, 1, 2, 2])], logits, weights, CENTROIDS, fine)
    _, figures = objective()(found, rows, TRAINED, progress=0.5, epoch=0.0)
    expected = {
        "steering_zero": 0.25,
        "steering_centroid": 0.25,
        "steering_keyword": 0.5,
        "routing_accuracy": 0.5,
        "centroid_accuracy": 0.75,
        "routing_entropy": 0.0,
        "entropy_target": np.log(4),
        "router_usage": np.exp(-0.25 * np.log(0.25) - 0.75 * np.log(0.75)) / 4,
        "atypicality": 2.0,
        "gumbel_temperature": 0.55,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_projection_belongs_to_the_contrastive_part() -> None:
    rows = batch()
    ours = replace(
        objective(), contrastive=Objective(temperature=0.1, projection_dim=4, projection_weight=0.5)
    )
    trained = ours.initial(jax.random.key(0), DIM)
    found = predicted(rows)
    total, figures = ours(found, rows, trained)
    rest = sum(WEIGHTS[name] * figure(figures, name) for name in WEIGHTS)
    np.testing.assert_allclose(total, rest + 0.3 * 0.5 * figures["projected_loss"], rtol=1e-5)
