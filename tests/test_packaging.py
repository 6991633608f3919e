"""What is shipped, with what: the wheel, the pins, the lock and the changelog agree with pyproject.toml."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prime_jax._version import __version__

REPO = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text())
LOCK: dict[str, Any] = tomllib.loads((REPO / "uv.lock").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def pins() -> dict[str, str]:
    """Package to version, from constraints.txt."""
    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = [Requirement(line) for line in lines]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pinned}


def requirements() -> list[Requirement]:
    """Every requirement on another package that pyproject.toml states."""
    groups = [PROJECT["project"]["dependencies"], *EXTRAS.values(), *PROJECT["dependency-groups"].values()]
    stated = [Requirement(line) for group in groups for line in group]
    return [requirement for requirement in stated if requirement.name != "prime-jax"]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_has_a_pin_that_satisfies_it(requirement: Requirement) -> None:
    version = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


def test_pins_are_the_versions_of_the_lock() -> None:
    locked = {
        package["name"]: package["version"] for package in LOCK["package"] if package["name"] != "prime-jax"
    }
    assert pins() == locked


def test_lock_names_one_registry_and_no_local_path() -> None:
    (registry,) = {source for package in LOCK["package"] for source in package["source"].values()} - {"."}
    assert registry.startswith("https://")
    files = [
        file["url"]
        for package in LOCK["package"]
        for file in (*package.get("wheels", []), package.get("sdist", {}))
        if "url" in file
    ]
    assert len(files) > 100
    assert len({re.match(r"https://[^/]+/", url)[0] for url in files}) == 1


def test_all_holds_every_extra_that_needs_no_gpu() -> None:
    (everything,) = EXTRAS["all"]
    assert Requirement(everything).extras == set(EXTRAS) - {"all", "cuda"}


def test_changelog_describes_this_version() -> None:
    assert f"\n## [{__version__}]" in (REPO / "CHANGELOG.md").read_text()


def test_wheel_holds_the_library_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPO, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    described = {name for name in names if name.startswith(f"prime_jax-{__version__}.dist-info/")}
    sources = {str(path.relative_to(REPO)) for path in (REPO / "prime_jax").rglob("*.py")}
    assert wheel.name == f"prime_jax-{__version__}-py3-none-any.whl"
    weights = {f"prime_jax/models/general.{ending}" for ending in ("safetensors", "txt")}
    assert names - described == {*sources, *weights, "prime_jax/py.typed"}
