"""A run of a few seconds for the training tests."""

from pathlib import Path

import fakes
import pytest
from commands import SETTINGS

from prime_jax.config import Config, read_config


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    fakes.write_conversations(folder)
    return folder


@pytest.fixture
def settings(data_folder: Path) -> list[str]:
    return [*SETTINGS, "--data.path", str(data_folder)]


@pytest.fixture
def config(settings: list[str]) -> Config:
    return read_config(None, settings)
