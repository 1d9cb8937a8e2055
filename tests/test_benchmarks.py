"""The benchmarks print and write what they measure, on tiny networks."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY

from benchmarks.certification import COMMITTED
from locallip.files import InputError

ROOT = Path(__file__).resolve().parent.parent


def test_the_benchmark_prints_and_writes_all_costs(call, saved_net, tmp_path):
    path = tmp_path / "figures.json"
    flags = [*TINY, "--saved_model", saved_net, saved_net, "--epsilon", 1e-3, "--images", 32, "--test_sniter", 20]
    answer = call("benchmarks.certification", *flags, "--sample_batches", 2, "--json", path)
    assert answer.code == 0, answer.err
    figures = json.loads(path.read_text())
    assert len(figures["nets"]) == 2
    assert answer.out.count("| `net`, 0.001 |") == 2
    for net in figures["nets"]:
        seconds, certified = net["seconds_per_image"], net["certified"]
        assert net["images"] == net["sample"] == 32
        assert math.isclose(net["dual_over_product"], seconds["dual"] / seconds["product"])
        assert math.isclose(net["dual_over_published"], seconds["dual"] / seconds["published"])
        assert 0 < certified["product"] <= certified["dual"] <= 32
        sample = net["certified_of_sample"]
        assert {way: sample[way] for way in certified} == certified
        assert sample["published"] >= certified["product"]


def test_the_benchmark_of_proofs_takes_the_committed_networks_where_none_is_named(call, monkeypatch):
    def stop(*measured):
        raise InputError("enough")

    assert {Path(path).name for path in COMMITTED} == {path.name for path in (ROOT / "pretrained").rglob("*.pth")}
    answer = call("benchmarks.certification", "--images", 0)
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    for named in ([], ["one", "other"]):
        asked = []
        monkeypatch.setattr("evaluate.load", lambda args, asked=asked: (None, asked.append(args.saved_model)))
        monkeypatch.setattr("benchmarks.certification.measure", stop)
        words = ["--saved_model", *named] if named else []
        assert call("benchmarks.certification", *words).err == "error: enough\n"
        assert asked == (named or COMMITTED)


def test_the_dual_is_compared_with_its_rivals_as_far_as_they_are_installed(call, tmp_path):
    path = tmp_path / "figures.json"
    flags = ["--data", "digits", "--epochs", 2, "--images", 8, "--epsilons", 0.05, 0.2, "--json", path]
    answer = call("benchmarks.rivals", *flags)
    assert answer.code == 0, answer.err
    figures = json.loads(path.read_text())
    assert list(figures["radii"]) == ["0.05", "0.2"]
    for radius in figures["radii"].values():
        counts = {name: row["certified"] for name, row in radius.items()}
        assert 0 < counts["product"] <= counts["dual"] <= counts["attack leaves"] <= figures["clean"] <= 8
        assert not any(row["broken"] for row in radius.values())
    assert ("CROWN" in figures["radii"]["0.05"]) != ("auto_LiRPA is not installed" in answer.out)
    answer = call("benchmarks.rivals", *flags)
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)


def test_the_step_benchmark_prints_and_writes_its_recipes(call, tmp_path):
    path = tmp_path / "figures.json"
    chosen = {"mnist-4c3f": 256, "tinyimagenet-8c2f-maxmin": 8}
    flags = [
        "--recipes",
        *chosen,
        "--width",
        0.02,
        "--repeats",
        1,
        "--device",
        "cpu",
        "--compile",
        "no",
        "--certified_images",
        2,
        "--bfloat16",
    ]
    answer = call("benchmarks.training_step", *flags, "--json", path)
    assert answer.code == 0, answer.err
    recipes = {recipe["recipe"]: recipe for recipe in json.loads(path.read_text())["recipes"]}
    assert all(f"`{name}`" in answer.out for name in recipes)
    assert {name: recipe["batch_size"] for name, recipe in recipes.items()} == chosen
    for recipe in recipes.values():
        assert recipe["stored_bytes"] > 0
        for kind in ("all", "idle skipped", "bfloat16"):
            ratio = recipe[kind]["milliseconds"] / recipe["plain"]["milliseconds"]
            assert math.isclose(recipe[kind]["over_plain"], ratio)


@pytest.mark.parametrize("benchmark", ["certification", "training_step"])
def test_a_benchmark_replaces_its_figures_only_when_asked(benchmark, call, saved_net, tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("of a long run")
    flags = {
        "certification": [*TINY, "--saved_model", saved_net, "--epsilon", 0.01, "--images", 2, "--test_sniter", 2],
        "training_step": ["--recipes", "mnist-4c3f", "--width", 0.05, "--repeats", 1, "--device", "cpu"],
    }[benchmark]
    answer = call(f"benchmarks.{benchmark}", *flags, "--json", path)
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert "--overwrite" in answer.err
    assert path.read_text() == "of a long run"
    quick = ["--compile", "no", "--certified_images", 1] if benchmark == "training_step" else []
    answer = call(f"benchmarks.{benchmark}", *flags, *quick, "--json", path, "--overwrite")
    assert answer.code == 0, answer.err
    assert json.loads(path.read_text())["torch"] == torch.__version__
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".json"] == ["figures.json"]
