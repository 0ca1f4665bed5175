"""The house's floor plan, enforced: who may import whom, which library comes in by which door, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("operators", "deft_med")

# ---------------------------------------------------------------------------------------------------------------- inner rooms
# Names without a package are of deft_med; "operators" stands for anything public in it, "io" and "dialects" for the package and
# its modules. A module may always import `errors` and its own package's private modules are listed like any other.
FOUNDATION = {"operators", "errors", "volume"}
INFERENCE = FOUNDATION | {"schedule", "intensity", "network", "prior", "likelihood", "nonlinear", "htransform", "guidance", "finetune",
                          "sample"}
EDGES = INFERENCE | {"io", "simulate", "bundle", "card", "attribution", "dialects", "data", "config", "metrics"}
COMMANDS = {"reconstruct", "train", "benchmark", "export", "calibrate"}

ALLOWED: dict[str, set[str]] = {
    # values
    "errors": set(),
    "volume": {"operators", "errors"},
    "config": {"errors", "operators"},
    "metrics": {"errors"},
    # the noise levels are spoken in `schedule` only; a sampler takes any denoiser and knows none
    "schedule": set(),
    "network": set(),
    "octaves": set(),
    "muon": set(),
    "sample": {"schedule"},
    "intensity": {"operators", "errors"},
    # inference: no files here
    "prior": {"schedule", "octaves", "network", "intensity", "errors"},
    "likelihood": FOUNDATION | {"intensity", "schedule"},
    "nonlinear": FOUNDATION | {"intensity", "schedule", "likelihood"},
    "htransform": FOUNDATION | {"schedule", "network", "octaves", "prior", "likelihood"},
    "guidance": FOUNDATION | {"schedule", "prior", "likelihood", "sample"},
    "amortised": FOUNDATION | {"schedule", "network", "octaves", "prior", "likelihood", "htransform"},
    "finetune": FOUNDATION | {"schedule", "network", "prior", "likelihood", "htransform", "sample"},
    # edges: files here, no networks
    "io": FOUNDATION | {"io", "intensity"},
    "simulate": FOUNDATION | {"config", "intensity"},
    "data": FOUNDATION | {"io", "simulate", "config", "intensity"},
    # models on disk
    "card": {"errors", "config", "volume", "intensity", "operators"},
    "attribution": {"card", "errors"},
    "bundle": {"publish", "errors", "network", "prior", "htransform", "schedule", "intensity", "dialects", "volume", "card", "attribution"},
    "dialects": {"errors", "network", "prior", "schedule", "intensity", "dialects"},
    # the loop and the pages
    "fit": INFERENCE | {"metrics", "config", "muon"},
    "subjects": FOUNDATION | {"io", "data"},
    "study": FOUNDATION | {"io"},
    "draws": INFERENCE | {"simulate", "config"},
    "kinds": INFERENCE | {"amortised", "draws", "simulate", "data", "config", "fit", "bundle"},
    "problem": INFERENCE | {"simulate"},
    "lesions": EDGES | {"problem", "study"},
    "trust": {"card", "metrics", "volume"},
    "stopwatch": set(),
    "pipeline": EDGES | {"trust", "stopwatch", "problem"},
    "crosscheck": EDGES | {"problem", "pipeline"},
    "publish": {"errors"},
    "figure": {"metrics"},
    "page": {"figure", "metrics", "trust"},
    "report": {"figure", "page"},
    "phantom": {"operators"},
    # the benchmark: names, runs, statistics, pictures
    "meter": set(),
    "peers": INFERENCE,
    "methods": {"guidance", "finetune", "peers", "pipeline", "errors"},
    "bench": EDGES | {"methods", "meter", "peers", "kinds", "pipeline", "problem", "nonlinear"},
    "tuning": {"methods", "errors"},
    "survey": EDGES | {"bench", "methods", "problem", "lesions", "study"},
    "scores": {"methods"},
    "chart": {"methods"},
    "testing": INFERENCE | {"metrics"},
    # the commands: anything but each other
    **{name: EDGES | {"pipeline", "problem", "crosscheck", "fit", "kinds", "draws", "publish", "subjects", "study", "trust", "attribution",
                      "report", "lesions", "phantom", "testing", "methods", "bench", "tuning", "survey", "scores", "chart"}
       for name in COMMANDS},
}

OPERATORS: dict[str, set[str]] = {
    "linear": set(),
    "geometry": set(),
    "noise": set(),
    "counts": {"noise"},
    "slices": {"linear", "geometry"},
    "whiten": {"coils"},
    "patterns": {"geometry"},
    "_rays": {"geometry", "_sparse", "odl_bridge"},
    "_astra": {"geometry", "linear", "odl_bridge"},
    "odl_bridge": {"linear", "geometry", "ct", "_rays"},
    "_sparse": {"linear", "geometry"},
    "ct": {"linear", "geometry", "_rays", "_sparse", "_astra"},
    "_nufft": {"geometry"},
    "mri": {"linear", "geometry", "_nufft"},
    "coils": set(),
    "analytic": {"_sparse", "linear", "geometry", "ct"},
    "sense": {"linear", "geometry", "mri"},
    "solve": {"linear"},
    "variational": {"linear", "solve"},
    "testing": {"linear", "geometry", "solve"},
    "bench": {"linear", "geometry", "ct", "mri", "patterns", "_rays", "_astra", "odl_bridge", "analytic", "sense", "solve", "noise",
              "testing"},
}

# ---------------------------------------------------------------------------------------------------------------------- doors
# A library that only these modules may import (package-qualified; "deft_med.io" is the package and its modules).
DOORS: dict[str, set[str]] = {
    "odl": {"operators.odl_bridge"},
    "astra": {"operators._astra"},
    "finufft": {"operators._nufft"},
    "cufinufft": {"operators._nufft"},
    "monai": {"deft_med.subjects", "deft_med.dialects"},
    "einops": set(),
    "pydicom": {"deft_med.io"},
    "pylibjpeg": {"deft_med.io"},
    "highdicom": set(),
    "nibabel": {"deft_med.io"},
    "h5py": {"deft_med.io"},
    "safetensors": {"deft_med.bundle", "deft_med.data", "deft_med.fit", "deft_med.kinds", "deft_med.dialects"},
    "yaml": {"deft_med.config", "deft_med.export"},
    "matplotlib": {"deft_med.report", "deft_med.figure", "deft_med.chart"},
    "skimage": set(),
    "pickle": set(),
    "mrpro": {"operators.bench"},
    "deepinv": {"deft_med.peers"},
    "argparse": {"deft_med.reconstruct", "deft_med.train", "deft_med.benchmark", "deft_med.export", "deft_med.bundle", "deft_med.calibrate",
                 "operators.bench"},
    "tqdm": {"deft_med.reconstruct", "deft_med.train", "deft_med.benchmark", "deft_med.fit", "deft_med.pipeline"},
}
# What these may import at all, beside the standard library and their own packages.
ONLY: dict[str, set[str]] = {
    "deft_med.errors": set(),
    "deft_med.sample": {"torch", "numpy"},
    "deft_med.schedule": {"torch", "numpy"},
    "deft_med.network": {"torch", "numpy"},
    "deft_med.fit": {"torch", "numpy", "safetensors", "tqdm"},
    "deft_med.metrics": {"numpy", "scipy"},
}
# Who may print: the commands.
PRINTERS = {"deft_med.reconstruct", "deft_med.train", "deft_med.benchmark", "deft_med.export", "deft_med.bundle", "deft_med.calibrate",
            "operators.bench"}
LONGEST = 400


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> set[str]:
    """Absolute dotted names that a module imports anywhere, function bodies included, `if TYPE_CHECKING:` excluded."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                skipped.update(ast.walk(statement))
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from package import module` names a module; `from module import name` names its module
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.add(full if full in MODULES or base in PACKAGES else base)
    return names


def inside(module: str, homes: set[str]) -> bool:
    return any(module == home or module.startswith(home + ".") for home in homes)


def room(name: str) -> str:
    """deft_med.io.dicom -> io; deft_med.volume -> volume; operators.ct -> operators."""
    parts = name.split(".")
    return "operators" if parts[0] == "operators" else (parts[1] if len(parts) > 1 else "")


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("deft_med.")))
def test_a_room_of_deft_med_imports_only_what_lies_below(module: str) -> None:
    here = room(module)
    assert here in ALLOWED, f"{module} has no room yet: add it to ALLOWED in tests/test_rooms.py"
    ours = {name for name in imports(module) if name.split(".")[0] in PACKAGES and not name.endswith("__version__")}
    wrong = sorted(n for n in ours if room(n) and room(n) not in ALLOWED[here] | {"errors"} and n != module)
    assert not wrong, f"{module} may import {sorted(ALLOWED[here])}, not {wrong}"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("operators.")))
def test_operators_stand_alone(module: str) -> None:
    here = module.split(".")[1]
    assert here in OPERATORS, f"{module} has no room yet: add it to OPERATORS in tests/test_rooms.py"
    names = imports(module)
    assert not [n for n in names if n.split(".")[0] == "deft_med"], f"{module} imports deft_med"
    ours = {n.split(".")[1] for n in names if n.startswith("operators.")}
    wrong = sorted(ours - OPERATORS[here] - {here})
    assert not wrong, f"{module} may import {sorted(OPERATORS[here])}, not {wrong}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_library_comes_in_by_its_door(module: str) -> None:
    libraries = {name.split(".")[0] for name in imports(module)}
    wrong = sorted(lib for lib in libraries if lib in DOORS and not inside(module, DOORS[lib]))
    assert not wrong, f"{module} imports {wrong}; only {[sorted(DOORS[lib]) for lib in wrong]} may"
    if module in ONLY:
        extra = sorted(libraries - ONLY[module] - set(sys.stdlib_module_names) - set(PACKAGES))
        assert not extra, f"{module} may import {sorted(ONLY[module])}, not {extra}"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("deft_med.") and m.split(".")[1] in COMMANDS))
def test_a_command_imports_late(module: str) -> None:
    heavy = []
    for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            heavy += [a.name for a in node.names if a.name.split(".")[0] not in sys.stdlib_module_names]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] not in sys.stdlib_module_names):
            light = {a.name for a in node.names} <= {"__version__", "errors"} or (node.module or "").endswith("errors")
            heavy += [] if light else [node.module or "."]
    assert not heavy, f"{module} imports {heavy} at the top: --help would load them; import inside main()"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_is_a_noun_or_a_verb(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    length = len(text.splitlines())
    assert length <= LONGEST, f"{module} has {length} lines: over {LONGEST} lines is two files"
    tree = ast.parse(text)
    if module not in PRINTERS:
        prints = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not prints, f"{module} prints in line {prints}"
    bare = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.type is None]
    assert not bare, f"{module} has a bare except in line {bare}"
    evals = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in ("eval", "exec")]
    assert not evals, f"{module} evaluates text in line {evals}"


def test_importing_the_packages_loads_nothing_heavy() -> None:
    code = (
        "import sys, deft_med; assert deft_med.__version__; "
        "heavy = {'torch', 'monai', 'odl', 'astra', 'pydicom', 'matplotlib', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import deft_med

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = deft_med.nonsense
    assert "read" in dir(deft_med)


def test_versions_agree() -> None:
    import tomllib

    import deft_med

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == deft_med.__version__
    packages = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in MODULES.values() if path.name == "__init__.py"}
    assert packages <= set(project["tool"]["setuptools"]["packages"]), "a package is missing from pyproject.toml"
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].strip().lower().replace("_", "-") for line in lock if "==" in line}
    wanted = {d.replace(">", "=").split("=")[0].strip().lower().replace("_", "-") for d in project["project"]["dependencies"]}
    assert wanted <= pinned, f"not pinned in requirements.lock: {sorted(wanted - pinned)}"
    assert not [line for line in lock if line and not line.startswith("#") and "==" not in line], "an unpinned line in requirements.lock"
