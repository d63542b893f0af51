"""The package: one version, and a wheel and an sdist that work where no source is beside them."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import lediflow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def files_of_package():
    package = ROOT / "src" / "lediflow"
    found = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_the_version_stands_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lediflow.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", lediflow.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lediflow.__version__
    assert [paper["identifiers"][0]["value"] for paper in citation["references"]] == [
        "arXiv:2505.20723",
        "arXiv:2312.07360",
    ]


def test_all_that_installs_is_pinned():
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [
        *PROJECT["project"]["dependencies"],
        *(r for extra in ("dev", "docs", "export") for r in extras[extra]),
    ]
    for requirement in asked:
        name = re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")
        assert name in names or name == "lediflow", name


@pytest.mark.slow
def test_the_wheel_works_without_its_source(tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools in this environment, so that nothing is downloaded")
    source, out = tmp_path / "source", tmp_path / "dist"
    ignored = shutil.ignore_patterns(
        ".*", "runs", "build", "dist", "site", "*.egg-info", "__pycache__", "tests"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    make = "import setuptools.build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})".format(str(out))
    subprocess.run([sys.executable, "-c", make], cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    assert wheel.stat().st_size < 20e6  # 12 of it are the emoji model
    with zipfile.ZipFile(wheel) as archive:
        packed = {
            name.removeprefix("lediflow/") for name in archive.namelist() if name.startswith("lediflow/")
        }
    assert packed == files_of_package()
    with tarfile.open(sdist) as archive:
        inside = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "src/lediflow/py.typed"} <= inside

    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            tmp_path / "installed",
            wheel,
        ],
        check=True,
        capture_output=True,
    )
    # dependencies come from this environment, lediflow from the wheel alone
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "COLUMNS": "200"}

    def run(*arguments):
        command = [sys.executable, "-c", f"import sys; sys.argv = {['lediflow', *arguments]!r}; "
                   "import lediflow.cli.app as a; print(a.__file__); a.main()"]  # fmt: skip
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        where, _, said = done.stdout.partition("\n")
        assert Path(where).is_relative_to(tmp_path / "installed")
        return said

    assert run("--version") == f"lediflow {lediflow.__version__}\n"
    said = run("presets")
    assert all(path.stem in said for path in (ROOT / "src" / "lediflow" / "presets").glob("*.yaml"))
    assert (tmp_path / "installed" / "bin" / "lediflow").exists()
    run("sample", "emoji", "-n", "4", "--output", "emoji")
    assert len(list((tmp_path / "emoji").glob("0*.png"))) == 4
