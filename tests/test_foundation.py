"""The public face: two commands on a fresh machine, a lock file that names no place, a README whose code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PINNED = re.compile(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+( ; platform_system == \"Linux\")?")


def test_the_readme_is_short_and_its_links_lead_somewhere(repository: Path) -> None:
    text = (repository / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 200
    assert "not a medical device" in text.lower() and "make demo" in text and "make test" in text
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("https://") and link != "docs/demo.png":  # the picture is made by `make demo`
            assert (repository / link).exists(), link
    for module in set(re.findall(r"python -m ((?:deft_med|operators)\.\w+)", text)) - {"operators.bench"}:
        assert (repository / (module.replace(".", "/") + ".py")).is_file(), module


def test_the_code_in_the_readme_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deft_med import bundle

    block = re.search(r"```python\n(.*?)```", (repository / "README.md").read_text("utf-8"), re.S)
    assert block
    code = block[1].replace("256, 256", "32, 32").replace("363", "46").replace("samples=4", "samples=2, steps=2")
    if "ct" not in bundle.available():
        code = code.replace('bundle.load_model("ct"), samples=2, steps=2', 'None, method="fbp"').replace(".std.data.mean()", ".std")
    monkeypatch.chdir(tmp_path)
    np.save("y.npy", np.random.default_rng(0).normal(1, 0.03, (60, 46)).astype(np.float32))
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(repository)})
    assert (tmp_path / "result.nii.gz").stat().st_size > 0


def test_the_lock_file_pins_everything_and_names_no_place(repository: Path) -> None:
    lines = [line for line in (repository / "requirements.lock").read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not PINNED.fullmatch(line)] == []
    assert "torch==2.13.0" in lines and any(line.startswith("setuptools==") for line in lines)
    assert "requirements.lock" in (repository / "environment.yml").read_text("utf-8")


def test_continuous_integration_is_make_test(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text("utf-8"), re.M))
    assert {"demo", "test", "test-all", "lint"} <= targets


def test_versions_are_written_alike(repository: Path) -> None:
    from deft_med import __version__

    assert f"version: {__version__}" in (repository / "CITATION.cff").read_text("utf-8")
    assert f"## {__version__}" in (repository / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("module", ["deft_med.reconstruct", "deft_med.train", "deft_med.bundle"])
def test_help_is_quick_and_loads_nothing_heavy(repository: Path, module: str) -> None:
    code = (
        f"import runpy, sys\nsys.argv = ['{module}', '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'monai', 'odl', 'astra', 'matplotlib'} & set(sys.modules), 'heavy'"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout and time.perf_counter() - started < 5  # alone 0.2 s; a loaded machine is slower
