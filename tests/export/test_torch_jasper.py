"""The file that goes to PyTorch users of steered models: its checks, its training, and what it shares."""

import inspect

import numpy as np
import pytest
import torch
from steered_models import D, K, answers, make
from test_jasper_parity import in_torch

from prime_jax.export import torch_jasper, torch_runtime
from prime_jax.export.from_torch import from_torch
from prime_jax.export.to_torch import state_dict
from prime_jax.export.torch_jasper import JasperConfig, PredictorError, SubspaceConfig


@pytest.mark.parametrize("name", ["verify", "read_safetensors", "_read_json"])
def test_bundles_are_opened_by_the_same_lines_as_those_of_prime(name: str) -> None:
    """Each file has to stand alone, so they are copies; a change of one must be made in the other."""
    ours, theirs = getattr(torch_jasper, name), getattr(torch_runtime, name)
    assert inspect.getsource(ours) == inspect.getsource(theirs)
    assert torch_jasper.FORMATS == torch_runtime.FORMATS


def test_every_name_of_a_model_with_subspaces() -> None:
    """The way of each stack, one block deep; centroids are kept with the weights but not trained."""
    module = in_torch(make("subspace", num_layers=1, residual="query"))
    stacks = ("question_encoder", "steering_encoder", "coarse_encoder", "head", "router.body")
    expected = {
        f"{stack}.{part}.0.{what}"
        for stack in stacks
        for part in ("linears", "norms")
        for what in ("weight", "bias")
    }
    expected |= {f"{name}.{what}" for name in ("output_proj", "router.choice") for what in ("weight", "bias")}
    expected |= {"centroids", "residual_gate", "coarse_gate"}
    assert module.state_dict().keys() == expected
    assert {name for name, _ in module.named_parameters()} == expected - {"centroids"}


@pytest.mark.parametrize(
    ("context", "query", "mask", "message"),
    [
        (torch.zeros(4, 1, 10), torch.zeros(4, D), None, r"\[B, 1, 24\], .*got \(4, 1, 10\) and \(4, 24\)"),
        (torch.zeros(4, 1, D), torch.zeros(2, D), None, r"query \[B, 24\], got \(4, 1, 24\) and \(2, 24\)"),
        (torch.zeros(4, 2, D), torch.zeros(4, D), None, "must be one steering vector"),
        (torch.zeros(4, D), torch.zeros(4, D), None, "must be one steering vector"),
        (torch.zeros(4, 1, D), torch.zeros(4, D).long(), None, "query torch.int64, expected floating"),
        (torch.zeros(4, 1, D), torch.zeros(4, D), torch.ones(4, 2).bool(), r"expected torch.bool \(4, 1\)"),
        (torch.zeros(4, 1, D), torch.zeros(4, D), torch.ones(4, 1), "torch.float32.* expected torch.bool"),
    ],
)
def test_bad_inputs_are_named(
    context: torch.Tensor, query: torch.Tensor, mask: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(PredictorError, match=message):
        in_torch(make("jasper"))(context, query, mask)


def test_bad_questions_and_steerings_are_named() -> None:
    module = in_torch(make("jasper"))
    with pytest.raises(PredictorError, match=r"must have shape \[B, D\], got \(24,\) and \(24,\)"):
        module.predict(torch.zeros(D))
    with pytest.raises(PredictorError, match=r"must have shape \[B, D\], got \(3, 24\) and \(3, 1, 24\)"):
        module.explain(torch.zeros(3, D), torch.zeros(3, 1, D))
    with pytest.raises(PredictorError, match=r"got \(2, 1, 24\) and \(3, 24\)"):
        module.predict(torch.zeros(3, D), torch.zeros(2, D))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (JasperConfig, {"residual": "copy"}, "residual 'copy' is not none or query"),
        (JasperConfig, {"residual": "query", "output_dim": 7}, "input_dim 384 must equal output_dim 7"),
        (JasperConfig, {"hidden_dim": 0}, "hidden_dim 0 is not a whole number above 0"),
        (SubspaceConfig, {"num_subspaces": 0}, "num_subspaces 0 is not a whole number above 0"),
        (SubspaceConfig, {"routing": "gumbel"}, "routing 'gumbel' is not softmax or argmax"),
        (SubspaceConfig, {"fine_input": "mean"}, "fine_input 'mean' is not concat or add"),
        (SubspaceConfig, {"input_dim": 7}, "input_dim 7 must equal output_dim 384"),
    ],
)
def test_bad_configs_are_named(kind: type[JasperConfig], fields: dict[str, object], message: str) -> None:
    with pytest.raises(PredictorError, match=message):
        kind(**fields)


@pytest.mark.parametrize("kind", ["jasper", "subspace"])
def test_it_can_be_trained_and_comes_back(kind: str) -> None:
    """Every weight moves but the centroids, and JAX then computes what torch does."""
    model = make(kind, residual="query", dropout=0.5)
    torch.manual_seed(0)
    module = in_torch(model).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    context, query = torch.randn(6, 1, D), torch.randn(6, D)
    real = torch.ones(6, 1, dtype=torch.bool)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(context, query, real)[:, 0].sum().backward()
    optimizer.step()
    unmoved = {name for name, tensor in module.state_dict().items() if torch.equal(tensor, before[name])}
    assert unmoved == ({"centroids"} if kind == "subspace" else set())
    back = from_torch(module.state_dict(), model.config)
    assert back.num_params() == module.get_num_params()
    with torch.inference_mode():
        expected = module.eval()(context, query, real)
    got = answers(back, context.numpy(), query.numpy(), real.numpy())
    np.testing.assert_allclose(got["embedding"], expected, atol=1e-5)
    for name, array in state_dict(back).items():
        np.testing.assert_array_equal(array, module.state_dict()[name])


def test_dropout_is_on_in_training_only_and_subspaces_are_chosen_without_noise() -> None:
    module = in_torch(make("subspace", dropout=0.0)).train()
    given = (torch.randn(2, 1, D), torch.randn(2, D))
    with torch.inference_mode():
        assert torch.equal(module(*given), module(*given))
        moving = in_torch(make("subspace", dropout=0.5)).train()
        assert float((moving(*given) - moving(*given)).abs().max()) > 1e-2
        assert torch.equal(moving.eval()(*given), moving(*given))
    assert module.explain(given[1]).routing.shape == (2, K)
