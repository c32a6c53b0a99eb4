"""The built wheel beside an installed vLLM: it changes no package, registers itself, and its command starts light."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, timeout=300)
    return target


def read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        member = next(entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}"))
        return archive.read(member).decode()


def test_requirements_are_met_by_what_vllm_brings(wheel) -> None:
    lines = [
        line.split(": ", 1)[1] for line in read(wheel, "METADATA").splitlines() if line.startswith("Requires-Dist")
    ]
    required = [Requirement(line) for line in lines]
    core = [requirement for requirement in required if requirement.marker is None]
    assert len(core) >= 5
    for requirement in core:
        assert requirement.specifier.contains(version(requirement.name)), requirement
        assert requirement.name not in ("torch", "vllm", "transformers")


def test_wheel_holds_all_packages_and_no_tests(wheel) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info" not in name]
    tops = {name.split("/")[0] for name in names}
    folders = [ROOT / top if (ROOT / top).is_dir() else ROOT / "integrations" / top for top in tops]
    data = {
        str(path.relative_to(folder.parent))
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"prose.txt", "report.html", "style.css", "page.js"} <= {name.rpartition("/")[2] for name in data}
    assert data <= set(names)
    assert tops == {"reft_plugins", "adapters_store", "reft_transformers", "reft_vllm", "reft_ollama"}


def test_entry_points(wheel) -> None:
    points = configparser.ConfigParser(delimiters=("=",))
    points.read_string(read(wheel, "entry_points.txt"))
    assert dict(points["vllm.general_plugins"]) == {"reft": "reft_vllm.install:install"}
    assert dict(points["console_scripts"]) == {"reft": "reft_plugins.cli:main"}
    assert set(points["reft_plugins"]) == {"store", "transformers", "vllm", "ollama"}


def test_help_is_light_and_fast(installed, tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    check = "import sys; sys.argv = ['reft', '--help']\nfrom reft_plugins import cli\n"
    check += "try: cli.main()\nfinally: print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", check], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout.rstrip().endswith("[]") and "serve" in shown.stdout and "export" in shown.stdout
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [installed / "bin" / "reft", "--help"], env=environment, cwd=tmp_path, check=True, capture_output=True
        )
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 0.5, seconds
