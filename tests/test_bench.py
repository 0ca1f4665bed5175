"""The benchmark on a small untrained model: what it counts, what it tunes, whom it compares, where it goes on, and what it refuses."""

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_bundle import CARD
from test_pipeline import head

from deft_med import bench, benchmark, chart, scores, tuning
from deft_med.bench import Bench
from deft_med.bundle import Model, networks
from deft_med.card import parse as card_of
from deft_med.config import KSpaceProtocol, Noise, Protocol, load
from deft_med.errors import UsageError
from deft_med.htransform import Deft
from deft_med.io.dicom_write import SERIES
from deft_med.kinds import Training, bare
from deft_med.methods import CLASSICAL, GUIDED, parse
from deft_med.pipeline import DRAWN, METHODS
from deft_med.problem import pose
from deft_med.simulate import simulate
from deft_med.survey import brightest
from deft_med.tuning import Plan, candidates, chosen
from deft_med.volume import Volume

SMALL = Protocol(name="small", views=12, noise=Noise(gaussian_percent=3.5), grid=48)
MRI = KSpaceProtocol(name="mr", pattern="random", acceleration=2, coils=2, grid=32, noise_percent=1.0)


def tiny(modality: str = "CT") -> Model:
    change = {} if modality == "CT" else {"modality": "MR", "channels": 2, "h": {**CARD["h"], "residual": {"inverse": "sense"}}}
    card = card_of({**CARD, **change, "licence": "CC-BY-4.0", "deft_med": "0",
                    "sha256": {f"{n}.safetensors": "0" * 64 for n in ("prior", "h")}})
    torch.manual_seed(0)
    prior, h = networks(card)
    for p in [*prior.parameters(), *h.parameters()]:
        torch.nn.init.normal_(p, std=0.03)
    return Model(card, Deft(prior, h).requires_grad_(False).eval())


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deft_med.meter.gc.collect", lambda: 0)  # 0.2 s a method among all that tests have loaded
    monkeypatch.setattr(bench.bundle, "load_model", lambda name: tiny("MR" if name == "mri" else "CT"))


@pytest.fixture()
def scans(tmp_path: Path) -> Path:
    """Seven val subjects of two slices and two tune subjects, with their manifest and a protocol."""
    folder = tmp_path / "scans"
    listed = []
    for number in range(9):
        (folder / f"s{number}").mkdir(parents=True)
        data = head(2, 24).data.transpose(2, 1, 0) + 3 * number
        nib.save(nib.Nifti1Image(data, np.diag([-8.0, -8.0, 5.0, 1.0])), folder / f"s{number}" / "scan.nii.gz")
        listed.append({"file": f"s{number}/scan.nii.gz", "subject": f"s{number}", "split": "tune" if number > 6 else "val"})
    (tmp_path / "manifest.json").write_text(json.dumps(listed))
    (tmp_path / "small.yaml").write_text("views: 9\nnoise: {gaussian_percent: 3.5}\ngrid: 24\n")
    return folder


def call(scans: Path, *more: str, out: str = "out") -> list[str]:
    base = scans.parent
    return [str(scans), "--manifest", str(base / "manifest.json"), "--protocol", str(base / "small.yaml"), "--out", str(base / out), *more]


def records_of(scans: Path, name: str = "results.jsonl", out: str = "out") -> list[dict]:
    return [json.loads(line) for line in (scans.parent / out / name).read_text().splitlines()]


@pytest.mark.parametrize(("method", "nfe"), [
    ("deft:mean", 1), ("deft:sample:steps=4", 4), ("deft:3:steps=4", 1 + 3 * 3), ("dds:steps=5", 5), ("dds:2:steps=5", 10),
    ("dps:steps=4", 4), ("deft-online:iterations=2", 17 * 9), ("fbp", 0)])
def test_evaluations_are_counted(method: str, nfe: int) -> None:
    """Calls of the prior for one image; what several samples share counts once."""
    (record,) = Bench().measure(simulate(head(1), SMALL), [method])
    assert record["nfe"] == nfe and record["seconds"] > 0 and record["chi2"] > 0
    assert parse(method).steps == (nfe if parse(method).count in (None, 1) and nfe else parse(method).steps)


def test_averages_share_samples_and_are_what_the_pipeline_draws() -> None:
    scan = simulate(head(1), SMALL)
    found = {r["method"]: r for r in Bench().measure(scan, [f"deft:{m}:steps=4" for m in ("mean", "sample", "4", "2")])}
    assert found["deft:mean:steps=4"]["nfe"] == 1 and "samples" not in found["deft:mean:steps=4"]
    assert [found[m]["nfe"] for m in ("deft:sample:steps=4", "deft:2:steps=4", "deft:4:steps=4")] == [4, 7, 13]
    alone = next(iter(Bench().measure(scan, ["deft:2:steps=4"])))
    assert alone["psnr"] == pytest.approx(found["deft:2:steps=4"]["psnr"], abs=1e-4)
    assert {"coverage", "ranks", "chi2_samples", "std"} <= alone.keys() and len(alone["ranks"]) == 3
    assert "coverage" not in found["deft:sample:steps=4"]


def test_networks_trained_on_pairs_stand_beside_the_prior(tmp_path: Path) -> None:
    """One network answers once; a conditional one samples as DEFT does, and its own evaluations are counted."""
    for kind in ("supervised", "conditional"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.yaml").write_text(f"kind: {kind}\nfilter: hann\nnetwork: {{widths: [8, 8], dim: 16}}\n"
                                                     "recipe: {stages: [{steps: 1, size: 64, batch: 1}]}\n")
        save_file(bare(load(tmp_path / kind / "config.yaml", Training)).state_dict(), tmp_path / kind / "best.safetensors")
    names = {f"supervised:{tmp_path}/supervised": 1, f"conditional:{tmp_path}/conditional:mean": 1,
             f"conditional:{tmp_path}/conditional:2:steps=3": 5}
    found = {r["method"]: r for r in Bench().measure(simulate(head(1), SMALL), names)}
    assert {m: r["nfe"] for m, r in found.items()} == names and all(r["psnr"] > 0 for r in found.values())
    assert chart.labels([{"method": m, "samples": 2} for m in names])[f"supervised:{tmp_path}/supervised"] == "U-Net"


def test_mr_methods_run_and_take_the_range_of_the_volume() -> None:
    bright = Volume(np.clip(head(1, 32).data + 1024, 0, None), np.diag([4.0, 4.0, 5.0, 1.0]), "a.u.")
    scan, names = simulate(bright, MRI), ["zero-filled", "deft:mean", "deft:2:steps=3", "dds:steps=2", "deft-online:iterations=1"]
    own, whole = ({r["method"]: r for r in Bench("mri").measure(scan, names, brightest=top)} for top in (None, 10 * bright.data.max()))
    assert own.keys() == whole.keys() == set(names)
    assert all(whole[m]["psnr"] == pytest.approx(own[m]["psnr"] + 20, abs=1e-3) for m in names)
    stack = Volume(np.stack([bright.data[0], 4 * bright.data[0]]), bright.affine, "a.u.")
    assert brightest(stack, 16) == pytest.approx(4 * float(bright.resample_to((16, 16)).data.max()))


def test_every_classical_method_has_a_name_here() -> None:
    assert {m for of in METHODS.values() for m in of} - {*DRAWN} <= CLASSICAL.keys()
    assert {m.upper().replace("-", "_") for of in METHODS.values() for m in of} <= SERIES.keys(), "each has a series of its own"
    assert {"interpolation", "projections", *pose(simulate(head(1), SMALL)).classical} <= CLASSICAL.keys()


@pytest.mark.parametrize(("text", "words"), [
    ("magic", "unknown method 'magic'"), ("supervised", "wants the folder"), ("dps:zebra=1", "no setting 'zebra=1'"),
    ("deft:0", "'0' is no number of samples"), ("dds:mean", "'mean' is no number of samples"), ("zero-filled:3", "knows no '3'"),
    ("deft:steps=1", "wants 2 steps or more"), ("deft-online:mean", "no mean in one evaluation"),
    ("deft-online:8", "trains for one sample"), ("deft-online:iterations=0", "1 iteration or more"), ("fbp:cutoff=x", "each a number")])
def test_what_no_method_says(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(text)


def test_what_a_problem_does_not_suit_is_skipped_and_said() -> None:
    told: list[str] = []
    found = list(Bench().measure(simulate(head(1), SMALL), ["zero-filled", "fbp"], told.append))
    assert [r["method"] for r in found] == ["fbp"]
    assert told == ["zero-filled: skipped, the problem has only fbp, tv of the classical methods"]
    counts = simulate(head(1), Protocol(name="counts", views=9, noise=Noise(photons=1e4, counts=True), grid=48))
    assert "not Transmission" in Bench().refusal("deft-online", pose(counts)) and not Bench().refusal("deft", pose(counts))


def test_slow_methods_are_those_of_many_evaluations_or_of_a_gradient_through_the_prior() -> None:
    assert [parse(m).steps for m in ("deft:8", "deft:2:zeta=1", "deft:8:steps=20", "conditional:DIR")] == [10, 20, 20, 10]
    assert all(parse(m).slow for m in ("dps", "pigdm", "dps:steps=10", "deft-online", "deft-online:iterations=1", "deft:steps=201"))
    assert not any(parse(m).slow for m in ("deft", "dds", "diffpir", "fbp", "deft:8:steps=200"))


# ------------------------------------------------------------------------------------------------------------ tuning
def test_the_budget_is_the_same_for_all() -> None:
    plan = load("benchmark", Plan)
    assert plan.budget == 8 and all(len(grid) == 8 for grid in plan.grids.values()) and set(plan.grids) <= {*CLASSICAL, *GUIDED}
    for name, grid in plan.grids.items():
        tried = candidates(name, plan)
        assert len(tried) == len(grid) and all(parse(text).count in (None, 1) for text in tried)  # one sample
        assert all(parse(text).steps <= 200 for text in tried)
    for fixed in ("deft", "deft:mean", "deft-online", "dps:zeta=1", "supervised:x"):
        assert not candidates(fixed, plan)
    assert set(plan.mr) == {"tv", "wavelet", "cg-sense"} and all(len(grid) == 8 for grid in plan.mr.values())
    assert list(candidates("tv", plan, "MR"))[0] == "tv:weight=0.07" and not candidates("wavelet:0.3", plan, "MR")
    with pytest.raises(UsageError, match="the same budget for all: dds must have 1 to 2"):
        Plan(grids={"dds": ({"sd": 1.0},) * 3}, budget=2)


def test_the_best_finite_mean_is_chosen_and_steps_are_made_up_for() -> None:
    plan = Plan(grids={"dps": ({"zeta": 1.0}, {"zeta": 2.0}, {"zeta": 3.0}), "dds": ({"sd": 0.1}, {"sd": 0.2})})
    tried = candidates("dps", plan)
    assert list(tried) == ["dps:sample:steps=200:zeta=1", "dps:sample:steps=200:zeta=2", "dps:sample:steps=200:zeta=3"]
    best = chosen("dps", tried, dict(zip(tried, (20.0, 22.0, math.nan), strict=True)), plan)
    assert best["settings"] == {"zeta": 0.4} and best["becomes"] == "dps:zeta=0.4" and best["edge"] == []  # 1000 steps instead of 200
    assert best["tried"][2] == {"zeta": 3.0, "psnr": None}
    several = candidates("dds:4", plan)
    assert chosen("dds:4", several, dict(zip(several, (1.0, 2.0), strict=True)), plan)["becomes"] == "dds:4:sd=0.2"
    rows = [{"subject": "a", "psnr": 10.0}, {"subject": "a", "psnr": 20.0}, {"subject": "b", "psnr": 30.0}]
    assert tuning.subject_mean(rows, ["a", "b"]) == 22.5 and math.isnan(tuning.subject_mean(rows, ["a", "b", "c"]))


def test_noise_drawn_anew_gives_images_that_lie_closer_together() -> None:
    scan = simulate(head(1), SMALL)
    found = {r["method"]: r for r in Bench().measure(scan, ["deft:3:steps=6", "deft:3:steps=6:zeta=1"])}
    assert found["deft:3:steps=6:zeta=1"]["nfe"] == found["deft:3:steps=6"]["nfe"] == 16
    assert found["deft:3:steps=6:zeta=1"]["std"] < found["deft:3:steps=6"]["std"]


def test_a_time_that_is_a_share_is_marked() -> None:
    scan, names = simulate(head(1), SMALL), ["deft:sample:steps=3", "deft:2:steps=3", "dds:sample:steps=2", "dds:2:steps=2"]
    records = [r | {"subject": "a", "slice": 0} for r in Bench().measure(scan, names)]
    assert {r["method"]: r.get("drawn_with") for r in records} == dict(zip(names, (2, None, None, None), strict=True))
    numbers = scores.table(scores.summary(records, names, names[1]), "CT", names[1]).partition("Difference")[0]
    lines = {line.split(" | ")[0]: line for line in numbers.splitlines()}
    assert [lines[f"| {name}"].count("*") for name in names] == [2, 0, 0, 0], "wall and CPU seconds"


def test_methods_that_would_be_called_alike_say_their_steps() -> None:
    texts = ["diffpir:sample", "diffpir:sample:steps=25", "dds:sample:sd=1", "dds:sample:sd=2", "tv", "deft:sample:zeta=1"]
    names = chart.labels([{"method": m, "samples": 1} for m in texts])
    assert list(names.values()) == ["DiffPIR, sample, 100 steps", "DiffPIR, sample, 25 steps", *texts[2:4], "TV",
                                    "DEFT, sample, noise anew"]


# ------------------------------------------------------------------------------------------------------------ statistics
def test_differences_are_paired_and_their_interval_is_over_subjects() -> None:
    rows = [{"subject": f"s{k}", "slice": n, "method": m, "psnr": 20.0 + 5 * k + n + gain * (m == "a"), "psnr_body": None, "ssim": 0.5,
             "ssim_body": 0.5} for k, gain in enumerate((1.0, 2.0, 3.0)) for n in range(k + 1) for m in ("a", "b")]
    found = scores.paired(rows, "a", "b", "psnr")
    half = 4.302653 * 1.0 / math.sqrt(3)  # Student's t, two degrees of freedom: subjects, not their six slices
    assert found == pytest.approx({"difference": 2.0, "low": 2 - half, "high": 2 + half, "subjects": 3}, abs=1e-5)
    lonely = scores.paired(rows[:2], "a", "b", "psnr")
    assert lonely is not None and lonely["low"] is None and lonely["subjects"] == 1
    assert scores.paired(rows, "a", "b", "psnr_body") is None and scores.paired(rows, "a", "c", "psnr") is None
    part = [r for r in rows if r["method"] == "b" or r["subject"] != "s2"]
    assert scores.paired(part, "a", "b", "psnr")["difference"] == pytest.approx(1.5)  # the slices that both have
    assert scores.reference_of(["fbp", "deft:mean", "deft:8"]) == "deft:8" and scores.reference_of(["fbp", "tv"]) == "fbp"


# ------------------------------------------------------------------------------------------------------------ the command
def test_tuning_sees_tune_subjects_and_the_report_the_others(scans: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture) -> None:
    plan = scans.parent / "plan.yaml"
    plan.write_text("budget: 2\nslow_steps: 2\ngrids:\n  dps: [{zeta: 1.0}, {zeta: 2.0}]\n  fbp: [{cutoff: 0.5}, {cutoff: 1.0}]\n")
    command = call(scans, "--tune", "--plan", str(plan), "--methods", "fbp,dps:steps=3,deft:mean,deft:2:steps=3", "--slices", "2")
    assert benchmark.main(command) == 0
    text = capsys.readouterr().out
    tuned = json.loads((scans.parent / "out" / "tuned.json").read_text())
    assert {r["subject"] for r in records_of(scans, "tuning.jsonl")} == {"s7", "s8"} and tuned["split"] == "tune"
    assert {m: len(found["tried"]) for m, found in tuned["methods"].items()} == {"fbp": 2, "dps:steps=3": 2}
    found = records_of(scans)
    assert {r["subject"] for r in found} == {f"s{k}" for k in range(7)}
    dps = tuned["methods"]["dps:steps=3"]["becomes"]
    slow = [r for r in found if r["method"] == dps]
    assert len(slow) == len({r["subject"] for r in slow}) == 6 and all(r["samples"] == 1 for r in slow)
    assert f"| {dps} | 6 / 6 |" in text and "| deft:2:steps=3 | 7 / 14 |" in text and "| deft:2:steps=3 | 6 / 6 |" in text
    table = json.loads((scans.parent / "out" / "table.json").read_text())
    assert {r["method"]: r["subjects"] for r in table["few"]} == dict.fromkeys(
        [tuned["methods"]["fbp"]["becomes"], dps, "deft:mean", "deft:2:steps=3"], 6)
    assert "range 2000 HU" in text and "body mask" in text and table["reference"] == "deft:2:steps=3"
    assert (scans.parent / "out" / "ranks.png").exists()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Bench, "run", never)
    assert benchmark.main(command) == 0 and capsys.readouterr().out == text  # everything was kept


def test_a_run_goes_on_per_method_and_slice(scans: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    command = call(scans, "--methods", "fbp,deft:mean", "--slices", "1", "--subjects", "2")
    assert benchmark.main(command) == 0
    assert "2/2 subjects, about 0 min left" in capsys.readouterr().err
    file = scans.parent / "out" / "results.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for line in lines if not ('"s1"' in line and '"fbp"' in line)) + "\n")
    asked: list[str] = []
    run = Bench.run
    monkeypatch.setattr(Bench, "run", lambda self, method, *rest: (asked.append(method), run(self, method, *rest))[1])
    assert benchmark.main(command) == 0 and asked == ["fbp"] and len(file.read_text().splitlines()) == len(lines)
    assert benchmark.main([*command, "--seed", "1"]) == 0 and len(asked) == 5  # another seed is another study
    assert benchmark.main([*command, "--methods", "fbp:hann"]) == 0 and len(asked) == 7


def test_few_subjects_give_several_slices_each(scans: Path, capsys: pytest.CaptureFixture) -> None:
    plan = scans.parent / "plan.yaml"
    plan.write_text("slow_subjects: 3\nslow_steps: 2\ngrids:\n  dps: [{zeta: 1.0}, {zeta: 2.0}]\n")
    command = call(scans, "--plan", str(plan), "--methods", "fbp,dps:steps=2", "--slices", "2", "--subjects", "2", "--tune",
                   "--tune-on", "tune:s7/")
    assert benchmark.main(command) == 0
    assert {r["subject"] for r in records_of(scans, "tuning.jsonl")} == {"s7"} and len(records_of(scans, "tuning.jsonl")) == 2 * 2
    slow = [(r["subject"], r["slice"]) for r in records_of(scans) if r["method"].startswith("dps")]
    assert sorted(slow) == [("s0", 0), ("s0", 1), ("s1", 1)]
    assert "on the same 3 slices of 2 subjects" in capsys.readouterr().out


def test_a_sweep_over_steps(scans: Path, capsys: pytest.CaptureFixture) -> None:
    assert benchmark.main(call(scans, "--methods", "deft:mean", "--slices", "1", "--samples", "2", "--sweep", "3,5,9")) == 0
    rows = json.loads((scans.parent / "out" / "table.json").read_text())["sweep"]
    assert [(r["steps"], r["nfe_one"], r["nfe"], r["subjects"]) for r in rows] == [(3, 3, 5, 6), (5, 5, 9, 6), (9, 9, 17, 6)]
    assert rows[-1]["std_ratio"] == 1.0 and all(r["coverage"] is not None and r["chi2"] > 0 for r in rows)
    assert "| steps | NFE, one sample | PSNR, one sample |" in capsys.readouterr().out and (scans.parent / "out" / "sweep.png").exists()


def test_lesions_are_put_in_for_all_methods_alike(scans: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    command = call(scans, "--methods", "fbp,fbp:hann,deft:mean,dps:steps=2", "--slices", "1", "--subjects", "2", "--lesions", "3")
    assert benchmark.main(command) == 0
    text = capsys.readouterr().out
    found = records_of(scans, "lesions.jsonl")
    assert {(r["method"], r["contrast"]) for r in found} == {(m, c) for m in ("fbp", "fbp:hann", "deft:mean") for c in (0, 20, 60, 200)}
    assert {r["subject"]: len(r["amplitudes"]) for r in found} == {"s0": 2, "s1": 1}  # three disks, shared among the subjects
    rows = json.loads((scans.parent / "out" / "table.json").read_text())["lesions"]
    assert [r["method"] for r in rows] == ["fbp"] * 3 + ["fbp:hann"] * 3 + ["deft:mean"] * 3 and all(r["disks"] == 3 for r in rows)
    assert "n = 3 disks of 8 mm in 2 slices of 2 subjects" in text and "| fbp |" in text
    asked: list[str] = []
    run = Bench.run
    monkeypatch.setattr(Bench, "run", lambda self, method, *rest: (asked.append(method), run(self, method, *rest))[1])
    assert benchmark.main(command) == 0 and capsys.readouterr().out == text and not asked
    assert benchmark.main([*command, "--lesions-slow"]) == 0 and asked == ["dps:steps=2"] * 8
    (scans.parent / "small.yaml").write_text("views: 9\nnoise: {photons: 10000.0, ceiling: 9000.0, counts: true}\ngrid: 24\n")
    capsys.readouterr()
    assert benchmark.main(command) == 2
    assert "lesions are put into line integrals" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "words"), [
    (["--samples", "0"], "samples and slices are at least 1"), (["--slices", "0"], "samples and slices are at least 1"),
    (["--sweep", "1,5"], "--sweep wants numbers of steps"), (["--sweep", "a"], "--sweep wants numbers of steps"),
    (["--reference", "tv"], "--reference is one of --methods"), (["--tune", "--split", "tune"], "--tune wants a manifest"),
    (["--tune", "--tune-on", "val"], "--tune wants a manifest"), (["--tune", "--tune-on", "tune:nothing"], "no images of the split tune"),
    (["--methods", "zero-filled"], "none of the methods runs on this protocol"), (["--methods", ","], "--methods names none"),
    (["--split", "test"], "no image"), (["--only", "nothing"], "no image"), (["--lesions", "-1"], "--lesions wants a number of disks")])
def test_what_the_command_refuses(scans: Path, more: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert benchmark.main(call(scans, "--methods", "fbp", "--slices", "1", "--subjects", "1", *more)) == 2
    assert words in capsys.readouterr().err


def test_estimates_of_a_perfect_posterior_agree() -> None:
    """Squared errors 2, 9/8 and 1: the gains are those that are expected, whatever the subjects' own level."""
    methods = {"deft:sample": 2.0, "deft:8": 1.125, "deft:mean": 1.0, "tv:3": 1.0, "deft:8:steps=20": 1.125}
    records = [{"method": m, "subject": str(s), "slice": 0, "psnr": 30 + s - 10 * np.log10(e)}
               for m, e in methods.items() for s in range(3)]
    first, other = scores.consistency(records, list(methods))
    assert first["method"] == "deft:8" and first["gain"]["difference"] == pytest.approx(first["expected"])
    assert first["expected"] == pytest.approx(2.499, abs=1e-3)
    assert first["mean"]["difference"] == pytest.approx(first["mean_expected"])
    assert other["method"] == "deft:8:steps=20" and other["gain"] is None and other["mean"]["difference"] == pytest.approx(0.5115, abs=1e-3)
    text = scores.consistency_table([first, other])
    assert "| deft:8 | +2.50 [+2.50, +2.50] | +2.50 | +0.51 [+0.51, +0.51] | +0.51 |" in text and "| deft:8:steps=20 | - |" in text
