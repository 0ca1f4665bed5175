"""Training: exact resume, the four kinds, fresh measurements, the paper's loss."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, nn

from deft_med import bundle
from deft_med.config import Noise, build, load
from deft_med.data import Augmentation, Pool, _sharpened, draw_images
from deft_med.draws import Acquisitions, Rays
from deft_med.errors import UsageError
from deft_med.fit import Recipe, Stage, fit, step_generator
from deft_med.kinds import KINDS, Network, Training, _started, assemble, trained
from deft_med.prior import Prior
from deft_med.schedule import draw, draw_vp
from deft_med.subjects import _planes
from deft_med.train import main


def recipe(steps: int, **changes) -> Recipe:
    return Recipe(stages=(Stage(steps, 64, 2),), **{"validate_every": 4, "save_every": 2, "warmup": 2, **changes})


def problem() -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    network = nn.Linear(4, 4)

    def objective(generator: torch.Generator, stage: Stage) -> torch.Tensor:
        x = torch.randn(stage.batch, 4, generator=generator)
        return (network(x) - x.flip(-1)).square().mean(1)

    return network, objective


def lines(out: Path) -> list[tuple]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (out / "log.jsonl").read_text().splitlines())]


def test_a_stopped_training_goes_on_to_the_same_curve(tmp_path: Path) -> None:
    network, objective = problem()
    whole = fit(network, objective, recipe(12), tmp_path / "whole")
    network, objective = problem()

    def dying(generator: torch.Generator, stage: Stage) -> torch.Tensor:
        dying.calls += 1
        if dying.calls == 8:  # after the checkpoint of step 6 and one step more
            raise SystemExit
        return objective(generator, stage)

    dying.calls = 0
    with pytest.raises(SystemExit):
        fit(network, dying, recipe(12), tmp_path / "parts")
    network, objective = problem()
    parts = fit(network, objective, recipe(12), tmp_path / "parts", resume=True)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_best_by_validation_and_the_averaged_weights_in_place(tmp_path: Path) -> None:
    network, objective = problem()
    scores = iter([3.0, 1.0, 2.0])
    seen = []

    def validate() -> dict[str, float]:
        seen.append(network.weight.detach().clone())
        return {"score": next(scores)}

    best = fit(network, objective, recipe(12), tmp_path / "run", validate=validate)
    assert torch.equal(best["weight"], seen[1])
    assert not torch.equal(network.weight, seen[2])  # trained weights are back after validation


def test_fit_refuses_a_folder_in_use_and_a_foreign_state(tmp_path: Path) -> None:
    network, objective = problem()
    fit(network, objective, recipe(2), tmp_path / "run")
    with pytest.raises(FileExistsError, match="--resume"):
        fit(network, objective, recipe(2), tmp_path / "run")
    with pytest.raises(ValueError, match="another network"):
        fit(nn.Linear(4, 4, bias=False), objective, recipe(2), tmp_path / "run", resume=True)


def test_the_rate_is_a_warm_up_and_a_cosine() -> None:
    r = Recipe(stages=(Stage(100, 8, 1), Stage(100, 16, 1)), lr=1.0, warmup=10)
    assert r.rate(0) == pytest.approx(0.1) and r.rate(100) == pytest.approx(0.5) and r.rate(199) < 1e-3
    assert (r.stage(99).size, r.stage(100).size) == (8, 16)


@pytest.fixture(scope="module")
def pool() -> Pool:
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 256)] * 2, indexing="ij")
    disks = [(((x - 0.1 * k) / 0.7) ** 2 + (y / 0.5) ** 2 < 1) * 1040 - 1000 for k in range(4)]
    images = torch.stack(disks).to(torch.int16)
    return Pool({256: images}, {256: torch.full((4,), 1.5)}, {256: torch.tensor([0, 0, 1, 2], dtype=torch.int32)})


def test_pools_survive_their_file_and_crops_their_seed(pool: Pool, tmp_path: Path) -> None:
    pool.save(tmp_path / "pool.safetensors")
    again = Pool.load(tmp_path / "pool.safetensors")
    assert torch.equal(again.images[256], pool.images[256]) and torch.equal(again.subject[256], pool.subject[256])
    first, second = (draw_images(pool, 4, 64, Augmentation(), step_generator(0, 7, "cpu")) for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[0].shape == (4, 1, 64, 64) and first[0].min() >= -1
    assert ((first[1] > 0.6) & (first[1] < 2.6)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind: str, pool: Pool, tmp_path: Path) -> None:
    few = Acquisitions(views=(8, 12), geometries=1, full_views=16)
    config = Training(kind=kind, network=Network((8, 8), dim=16), recipe=recipe(3, validate_every=3), acquisitions=few,
                      prior="somewhere" if kind == "htransform" else None, noisy=0.2)
    prior = None
    if kind == "htransform":
        prior = assemble(Training(kind="prior", network=Network((8, 8), dim=16), recipe=recipe(1)), pool, pool)[0]
        assert isinstance(prior, Prior)
    module, objective, validate = assemble(config, pool, pool, prior=prior)
    weights = fit(module, objective, config.recipe, tmp_path / kind, validate=validate)
    assert all(torch.isfinite(w).all() for w in weights.values())
    record = json.loads((tmp_path / kind / "log.jsonl").read_text().splitlines()[-1])
    assert "score" in record and any(key.startswith("sigma_") for key in record)


def test_configurations_that_do_not_fit() -> None:
    shape, steps = Network((8, 8)), recipe(1)
    with pytest.raises(ValueError, match="kind is one of"):
        Training(kind="gan", network=shape, recipe=steps)
    with pytest.raises(ValueError, match="prior: FOLDER"):
        Training(kind="htransform", network=shape, recipe=steps)
    with pytest.raises(ValueError, match="edm or epsilon"):
        Training(kind="prior", network=shape, recipe=steps, loss="l1")
    with pytest.raises(ValueError, match="wants a prior"):
        assemble(Training(kind="htransform", network=shape, recipe=steps, prior="x"), *[Pool({}, {}, {})] * 2)


def test_shipped_configurations_load() -> None:
    from deft_med.config import FOLDER

    kinds = {load(path, Training).kind for path in sorted((FOLDER / "train").glob("ct_*.yaml"))}
    assert kinds >= {"prior", "htransform", "supervised"}
    with pytest.raises(UsageError, match="unknown key colour in recipe"):
        build({"kind": "prior", "network": {"widths": [8]}, "recipe": {"stages": [], "colour": 1}}, Training)
    with pytest.raises(UsageError, match="missing key steps"):
        build({"kind": "prior", "network": {"widths": [8]}, "recipe": {"stages": [{"size": 8, "batch": 1}]}}, Training)


@pytest.mark.parametrize("name", ["ct", "mri"])
@pytest.mark.parametrize("kind", ["prior", "htransform"])
def test_a_training_goes_on_from_what_ships(name: str, kind: str) -> None:
    """An h of one's own on the shipped prior, or either network trained on."""
    config, module = trained(name, kind)
    shipped = bundle.load_model(name)
    assert (config.kind, config.modality, config.octaves) == (kind, shipped.card.modality, shipped.card.octaves)
    weights = (shipped.deft.prior if kind == "prior" else shipped.deft.h).state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())
    again = _started(dataclasses.replace(config, start=name))
    assert again.training and isinstance(again, type(module))
    others = tuple(tuple(2 * v for v in level) for level in config.octaves)
    rescaled = _started(dataclasses.replace(config, start=name, octaves=others)).sds
    assert rescaled.tolist() == [pytest.approx(v) for v in others or [[config.sd]]]
    with pytest.raises(UsageError, match="octaves: this one says 1"):
        _started(dataclasses.replace(config, start=name, octaves=((0.1,) * len((config.octaves or ((0,),))[0]),)))
    with pytest.raises(UsageError, match="start names a training of network"):
        _started(dataclasses.replace(config, start=name, network=Network((8, 8))))
    with pytest.raises(UsageError, match="no training of that name .* or a bundle"):
        trained(name, "supervised")


def test_measurements_are_fresh_and_as_noisy_as_they_say(pool: Pool) -> None:
    u = pool.images[256][:2].float().div(1000)[:, None]
    u = torch.nn.functional.avg_pool2d(u, 4)
    measurements = Rays(64, Acquisitions(geometries=2, full_views=90), filter="hann")
    pixel = torch.tensor([4.0, 6.0])
    for noises in ([Noise(gaussian_percent=3.5)] * 2, [Noise(photons=2e4, electronic=10)] * 2):
        first = measurements.measure(u, pixel, noises, torch.Generator().manual_seed(0))
        second = measurements.measure(u, pixel, noises, torch.Generator().manual_seed(1))
        assert not torch.equal(first.y, second.y)
        assert first.chi2(u).mean() == pytest.approx(1, abs=0.15)
        inner = (slice(None), slice(None), slice(24, 40), slice(24, 40))
        assert first.direct()[inner].mean() == pytest.approx(float(u[inner].mean()), abs=0.03)


def test_noise_levels_are_drawn_where_they_should_be() -> None:
    g = torch.Generator().manual_seed(0)
    levels = draw(20000, generator=g)
    assert levels.min() >= 0.01 and levels.max() <= 80
    assert ((levels > 5).float().mean() - 0.5 * torch.tensor(16.0).log() / torch.tensor(8000.0).log()).abs() < 0.03
    assert (draw(20000, generator=g, noisy=0.3) > 8).float().mean() > 0.35
    vp = draw_vp(20000, generator=g)
    assert 0.009 < vp.min() < 0.02 and 100 < vp.max() < 170


@pytest.mark.slow
def test_a_killed_command_resumes(pool: Pool, tmp_path: Path) -> None:
    pool.save(tmp_path / "pool.safetensors")
    (tmp_path / "small.yaml").write_text(
        "kind: prior\nnetwork: {widths: [8, 8], dim: 16}\ndata: {train: pool.safetensors, tune: pool.safetensors}\n"
        "recipe: {stages: [{steps: 60, size: 64, batch: 2}], validate_every: 20, save_every: 5}\n")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "deft_med.train", "small.yaml", "--threads", "1"]
    subprocess.run([*command, "--out", "whole"], cwd=tmp_path, env=environment, check=True)
    process = subprocess.Popen([*command, "--out", "parts"], cwd=tmp_path, env=environment)
    while not (tmp_path / "parts" / "state.safetensors").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--out", "parts", "--resume"], cwd=tmp_path, env=environment, check=True)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert (tmp_path / "parts" / "samples.png").stat().st_size > 1000 and (tmp_path / "parts" / "loss.png").exists()


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["nonsense"]) == 2
    assert main(["ct_prior", "--out", str(tmp_path / "run")]) == 2
    assert "--data FOLDER" in capsys.readouterr().err
    assert main(["ct_h", "--out", str(tmp_path / "run")]) == 2
    assert "train ct_prior first" in capsys.readouterr().err
    (tmp_path / "run" / "state.safetensors").write_text("x")
    assert main(["ct_prior", "--out", str(tmp_path / "run")]) == 7


def test_detail_sharpens_and_leaves_the_mean() -> None:
    u = torch.rand(2, 1, 32, 32, generator=Generator().manual_seed(0))
    same, sharp = _sharpened(u, torch.zeros(2, 1, 1, 1)), _sharpened(u, torch.ones(2, 1, 1, 1))
    torch.testing.assert_close(same, u)
    torch.testing.assert_close(sharp.mean((2, 3)), u.mean((2, 3)))
    rim = (torch.fft.fft2(sharp) / torch.fft.fft2(u))[..., 0, 16]  # the Nyquist frequency of one axis: 1 + a
    torch.testing.assert_close(rim.real, torch.full((2, 1), 2.0))


def test_planes_of_an_mr_volume_keep_their_pixels() -> None:
    """Framed about the head and padded, not interpolated: the prior learns the scanner's own sharpness."""
    generator = Generator().manual_seed(0)
    volume = torch.zeros(12, 60, 80)
    volume[:, 10:50, 20:70] = 0.2 + torch.rand(12, 40, 50, generator=generator)
    ((stack, pixel),) = _planes({"volume": volume, "spacing": torch.tensor([3.0, 0.9, 0.9])})
    assert stack.shape == (12, 256, 256) and pixel == pytest.approx(0.9)
    rows, columns = ((stack[0] > 0).any(axis).nonzero()[:, 0] for axis in (1, 0))
    found = stack[:, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].float()
    bright = volume[volume > 0].quantile(0.995)
    torch.testing.assert_close(found, volume[:, 10:50, 20:70] * 1000 / bright, rtol=0, atol=0.51)
    assert abs(int(rows.float().mean()) - 128) <= 1 and abs(int(columns.float().mean()) - 128) <= 1


def test_planes_with_more_pixels_than_the_matrix_are_resampled_to_fit() -> None:
    volume = torch.ones(2, 40, 400)
    ((stack, pixel),) = _planes({"volume": volume, "spacing": torch.tensor([9.0, 1.0, 1.0])})
    assert pixel == pytest.approx(400 / 256) and stack.shape == (2, 256, 256)
