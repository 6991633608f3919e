"""The end: what the screen lets through, what each stage costs, and which batches it may see."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wrap import CONFIG, CONTROL, SETTINGS, Run, data, equal, loss, params_of

from prime_jax.hybrid.jumps import end_cost, screen_cost
from prime_jax.hybrid.phases import Phase
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.wrap import HybridTrainer

END = HybridConfig(**{**SETTINGS, "predict": False})
CANDIDATES = 6  # raw, four averages, ahead of them
STEPS = 300


def trained(
    schedule: Any, steps: int = STEPS, config: HybridConfig = END, control: Any = CONTROL
) -> tuple[HybridTrainer, Any]:
    """A run with a schedule of the rate, before its end."""
    optimizer = optax.adam(schedule)

    @jax.jit
    def step(state: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(state["params"], batch)
        updates, opt_state = optimizer.update(gradient, state["opt_state"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, {"loss": value}

    trainer = HybridTrainer(
        step,
        params_of,
        lambda state, params: {**state, "params": params},
        loss,
        config,
        control=control,
        fresh=lambda count: [data(steps + ahead) for ahead in range(count)],
    )
    params = {"w": jnp.zeros((8, 4))}
    state: Any = {"params": params, "opt_state": optimizer.init(params)}
    trainer.init(state)
    for at in range(steps):
        state, _ = trainer.step(state, data(at))
    return trainer, state


def ended(*given: Any, **more: Any) -> Any:
    """Trainer, state before the end, state after it, outcome."""
    trainer, state = trained(*given, **more)
    after, outcome = trainer.finish(state)
    assert outcome is not None
    return trainer, state, after, outcome


def broken(batches: Any) -> Any:
    return [(x, y * np.nan) for x, y in batches]


DECAYED = optax.linear_schedule(0.03, 0.0, STEPS)


def test_the_screen_stops_a_run_whose_rate_has_decayed() -> None:
    trainer, before, after, outcome = ended(DECAYED)
    assert (outcome.choice, outcome.kept) == ("raw", False)
    assert after is before
    assert trainer.calls["control"] == CANDIDATES * END.screen_batches
    assert trainer.calls["coefficient gradient"] == 0
    assert outcome.cost == pytest.approx(screen_cost(END, trainer.forward_cost))
    assert trainer.totals.cost == outcome.cost
    assert trainer.phases.phase is Phase.FULL


def test_a_run_at_constant_rate_passes_and_is_corrected() -> None:
    trainer, before, after, outcome = ended(0.1)
    assert outcome.kept
    assert outcome.after < outcome.before
    assert outcome.bound < 0
    assert trainer.calls["coefficient gradient"] == END.coefficient_gradients
    assert not equal(after["params"], before["params"])
    for name, state in (("before", before), ("after", after)):
        told = np.mean([float(loss(state["params"], batch)) for batch in CONTROL[4:]])
        np.testing.assert_allclose(told, getattr(outcome, name), rtol=1e-4)


def test_a_rate_that_is_too_low_passes_although_averages_are_worse() -> None:
    _, _, _, outcome = ended(1e-3, steps=100)
    assert outcome.kept
    assert outcome.choice in ("ahead", "corrected")
    assert outcome.after < outcome.before


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[str, float], **more: Any) -> tuple[Any, list[str]]:
    """Outcome and names of the looks of an end whose candidates have these losses; 1 for raw and the others.

    Weights are told apart by how far they lie from raw along the longest average's displacement.
    """
    trainer, state = trained(0.1, steps=100, config=HybridConfig(**{**SETTINGS, "predict": False, **more}))
    raw = state["params"]["w"]
    steps = trainer.config.ema_steps
    nothing = jnp.zeros((1, trainer.config.basis))
    known = {"raw": raw}
    for tree, length in enumerate(steps):
        known[f"ema {length}"] = trainer._run.move(
            {"w": raw}, trainer.hybrid.basis, nothing.at[:, tree].set(1.0)
        )["w"]
    for times, name in ((1, "ahead"), (2, "ahead 2 times"), (4, "ahead 4 times"), (8, "ahead 8 times")):
        c = nothing.at[:, len(steps) - 1].set(-float(times))
        known[name] = trainer._run.move({"w": raw}, trainer.hybrid.basis, c)["w"]
    looks: list[str] = []

    def judge(params: Any, batches: Any) -> list[float]:
        name = next((n for n, w in known.items() if bool(jnp.all(w == params["w"]))), "corrected")
        looks.append(name)
        return [losses.get(name, 1.0) + 0.001 * at for at in range(len(batches))]

    monkeypatch.setattr(trainer, "_judge", judge)
    _, outcome = trainer.finish(state)
    return outcome, looks


AVERAGES = [f"ema {n}" for n in END.ema_steps]


@pytest.mark.parametrize(
    ("losses", "more", "looks", "choice"),
    [
        ({}, {}, ["raw", AVERAGES[-1], "ahead", *AVERAGES[:-1]], "raw"),
        ({"ahead": 0.9}, {}, ["raw", AVERAGES[-1], "ahead", "ahead 2 times"], "ahead"),
        (
            {"ahead": 0.9, "ahead 2 times": 0.8},
            {},
            ["raw", AVERAGES[-1], "ahead", "ahead 2 times", "ahead 4 times"],
            "ahead 2 times",
        ),
        (
            {"ahead": 0.9, "ahead 2 times": 0.8, "ahead 4 times": 0.7, "ahead 8 times": 0.1},
            {},
            ["raw", AVERAGES[-1], "ahead", "ahead 2 times", "ahead 4 times"],
            "ahead 4 times",
        ),
        (
            {"ahead": 0.9, "ahead 2 times": 0.8},
            {"max_coefficient": 1.0},
            ["raw", AVERAGES[-1], "ahead"],
            "ahead",
        ),
        ({AVERAGES[0]: 0.9}, {}, ["raw", AVERAGES[-1], "ahead", *AVERAGES[:-1]], AVERAGES[0]),
        ({AVERAGES[-1]: 0.9}, {}, ["raw", AVERAGES[-1], "ahead", *AVERAGES[:-1]], AVERAGES[-1]),
    ],
)
def test_the_screen_goes_on_in_the_direction_that_helps(
    monkeypatch: pytest.MonkeyPatch, losses: Any, more: Any, looks: list[str], choice: str
) -> None:
    """Further ahead while that looks better, to the largest coefficient; the shorter averages otherwise."""
    outcome, looked = scripted(monkeypatch, losses, **more)
    assert looked[: len(looks)] == looks
    assert outcome.choice == choice
    assert outcome.kept == (choice != "raw")
    proof = [] if choice == "raw" else ["raw", choice, "corrected"]
    assert looked[len(looks) :] == proof


def test_a_candidate_that_is_not_proved_costs_no_gradients() -> None:
    trainer, before, after, outcome = ended(0.1, control=CONTROL[:4] + broken(CONTROL[4:]))
    assert not outcome.kept
    assert after is before
    assert outcome.choice.startswith("ema")  # the screen liked it, the proof did not
    assert trainer.calls["coefficient gradient"] == 0
    assert trainer.calls["control"] == CANDIDATES * END.screen_batches + 2 * 4
    assert outcome.cost < end_cost(END, trainer.forward_cost) - END.coefficient_gradients


def test_the_screen_sees_its_own_batches_only_and_nothing_is_judged_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """INV-4: batches that confirm have no part in choosing."""
    trainer, state = trained(0.1)
    seen: list[tuple[bytes, int]] = []
    judge = trainer._judge
    places = {id(batch): at for at, batch in enumerate(CONTROL)}

    def noted(params: Any, batches: Any) -> list[float]:
        seen.extend((np.asarray(params["w"]).tobytes(), places[id(batch)]) for batch in batches)
        return judge(params, batches)

    monkeypatch.setattr(trainer, "_judge", noted)
    _, outcome = trainer.finish(state)
    assert outcome is not None
    assert outcome.kept
    first = CANDIDATES * END.screen_batches
    assert {at for _, at in seen[:first]} == {0, 1, 2, 3}
    assert len({weights for weights, _ in seen[:first]}) == CANDIDATES
    assert {at for _, at in seen[first : first + 8]} == {4, 5, 6, 7}  # the proof
    assert len({weights for weights, _ in seen[first : first + 8]}) == 2
    assert len(set(seen)) == len(seen)


def test_a_run_that_is_resumed_at_its_end_counts_the_same_cost() -> None:
    """Small control batches cost less than training ones, which a resumed trainer has not seen yet."""
    small = [(x[:2], y[:2]) for x, y in CONTROL]
    first, state = trained(0.1, steps=100, control=small)
    assert first.forward_cost < 1 / 3
    fresh = HybridTrainer(
        first._train_step,
        params_of,
        first._set,
        loss,
        END,
        control=small,
        fresh=lambda count: [data(100 + at) for at in range(count)],
    )
    fresh.init(state)
    fresh.restore(first.saved())
    _, resumed = fresh.finish(state)
    _, outcome = first.finish(state)
    assert resumed is not None
    assert outcome is not None
    assert resumed.cost == outcome.cost


def test_what_the_screen_left_can_be_trained_on() -> None:
    run = Run(END).go(103)
    run.trainer._control = broken(CONTROL)
    state, outcome = run.trainer.finish(run.state)
    assert outcome is not None
    assert not outcome.kept
    assert state is run.state
    run.go(20)
    assert equal(run.state, Run(HybridConfig(enabled=False)).go(123).state)
    assert run.trainer.totals.steps == 123


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([0.1, 0.01, 1e-3, DECAYED]), st.integers(5, 8), st.sampled_from([0.5, 0.9, 0.999]))
def test_the_end_never_costs_more_than_was_set_aside(rate: Any, tens: int, level: float) -> None:
    """INV-1: and never less than the screen."""
    more = {"predict": False, "screen_batches": 4, "accept_level": level, "screen_level": 0.5}
    config = HybridConfig(**{**SETTINGS, **more})
    trainer, _, _, outcome = ended(rate, steps=10 * tens, config=config)
    assert outcome.cost <= end_cost(config, trainer.forward_cost) + 1e-9
    assert outcome.cost >= screen_cost(config, trainer.forward_cost) - 1e-9


def test_costs_are_those_of_the_defaults() -> None:
    config = HybridConfig()
    # 6 candidates on 8 batches, each an eighth of a third of a step; then raw and the best on 24; then the
    # correction on all 32, and 5 gradients
    assert screen_cost(config, 1 / 24) == pytest.approx(2)
    assert end_cost(config, 1 / 24) == pytest.approx(2 + 2 + 32 / 24 + 5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"screen_batches": 3}, "screen_batches is below 4"),
        ({"screen_batches": 8, "control_batches": 11}, "leaves less than 4 to confirm"),
        ({"screen_level": 0.4}, "screen_level is not between 0.5 and 1"),
        ({"screen_level": 1.0}, "screen_level is not between 0.5 and 1"),
        ({"max_coefficient": 0.5}, "max_coefficient is below 1"),
        ({"max_coefficient": float("nan")}, "max_coefficient is below 1"),
    ],
)
def test_settings_of_the_screen_that_make_no_sense_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HybridConfig(**wrong)


def test_the_screen_of_a_jumping_run_is_set_aside() -> None:
    """INV-1: jumps may not spend what the end will need."""
    run = Run(CONFIG).go(200)
    spent, forward = run.trainer.totals.cost, run.trainer.forward_cost
    share = CONFIG.probe_share * run.trainer.totals.steps
    assert spent <= max(0.0, share - end_cost(CONFIG, forward))
