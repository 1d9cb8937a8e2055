"""The command line of evaluate.py on proven certificates."""

import json
import re

import pytest
import torch
from conftest import TINY, WIDTH, read_csv
from oracles import train_a_little

import utils
from locallip.bound.stages import is_by_dual
from locallip.checkpoints import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(digits, tmp_path_factory):
    torch.manual_seed(0)
    model = train_a_little(utils.select_model("digits", "relux", width=WIDTH), digits[True], steps=60)
    path = tmp_path_factory.mktemp("net") / "net_best.pth"
    save_checkpoint(path, {"state_dict": model.state_dict(), "err": 1.0, "epoch": 0})
    return path


@pytest.fixture
def evaluate(call, checkpoint, tmp_path):
    """Evaluates 12 digits with further flags: the summary."""

    def run(*flags):
        base = [*TINY, "--epsilon", 0.01, "--images", 12, "--test_sniter", 30, "--saved_model", checkpoint]
        answer = call("evaluate", *base, "--out", tmp_path, "--overwrite", *flags)
        assert (answer.code, answer.err) == (0, "")
        return json.loads((tmp_path / "summary.json").read_text())

    return run


def test_an_evaluation_proves_by_default_and_says_what(evaluate, tmp_path):
    summary = evaluate()
    certificate = summary["certificate"]
    stages = certificate["stages"]
    assert certificate | {"seed": 0, "stages": []} == {
        "kind": "proven",
        "effort": "dual",
        "failure_probability": 1e-6,
        "seed": 0,
        "deployed": "exact",
        "clip": False,
        "stages": [],
        "certified_plain": None,
    }
    assert len(stages) == len(summary["stage_seconds"]) > 1
    assert re.fullmatch(r"dual, \d+ Lanczos steps", stages[-1])
    decided_by = [row["decided_by"] for row in read_csv(tmp_path / "images.csv")]
    assert len(decided_by) == 12
    assert sum(summary["decided_by"].values()) == 12
    assert set(decided_by) <= {*stages, "misclassified", "attack", "open"}
    assert sum(name in stages for name in decided_by) == summary["accuracy"]["certified"]["count"]
    accuracy = {name: summary["accuracy"][name]["count"] for name in ("certified", "pgd", "clean")}
    assert 0 < accuracy["certified"] <= accuracy["pgd"] <= accuracy["clean"]


def test_an_evaluation_can_stop_at_the_product_of_norms(evaluate):
    certificate = evaluate("--effort", "product")["certificate"]
    assert certificate["effort"] == "product"
    assert len(certificate["stages"]) == 4
    assert not any(map(is_by_dual, certificate["stages"]))


def test_an_evaluation_by_estimate_is_the_published_protocol(evaluate):
    proven, estimate = evaluate("--effort", "product"), evaluate("--certificate", "estimate")
    assert estimate["certificate"] == {"kind": "estimate", "power_iterations": 30, "clip": False}
    assert estimate["accuracy"]["clean"] == proven["accuracy"]["clean"]
    assert estimate["accuracy"]["certified"]["count"] > 0


def test_the_seed_of_a_certificate_is_used_and_recorded(evaluate, tmp_path):
    reports = []
    for seed in (3, 3, 4):
        summary = evaluate("--epsilon", 0.05, "--effort", "product", "--certificate_seed", seed)
        assert summary["certificate"]["seed"] == seed
        reports.append((tmp_path / "images.csv").read_bytes())
    assert reports[0] == reports[1]
    assert len({evaluate("--effort", "product")["certificate"]["seed"] for _ in range(2)}) == 2


def test_float32_and_clipping_are_recorded_and_change_the_certificate_as_they_should(evaluate):
    flags = "--effort", "product"
    plain = evaluate(*flags)["accuracy"]["certified"]["count"]
    deployed, clipped = evaluate(*flags, "--deployed", "float32"), evaluate(*flags, "--clip")
    assert deployed["certificate"]["deployed"] == "float32"
    assert clipped["certificate"]["clip"] is True
    assert deployed["accuracy"]["certified"]["count"] <= plain <= clipped["accuracy"]["certified"]["count"]


@pytest.mark.parametrize(
    "flags",
    [
        *(["--failure_probability", value] for value in ("0", "1", "nan", "-1", "inf", "likely")),
        ["--certificate", "x"],
        ["--certificate_seed", "-1"],
        ["--deployed", "float16"],
        ["--effort", "most"],
    ],
    ids="=".join,
)
def test_bad_values_are_refused_with_one_line(call, checkpoint, flags):
    answer = call("evaluate", *TINY, "--saved_model", checkpoint, *flags)
    assert (answer.code, answer.out) == (2, "")
    assert len(answer.err.splitlines()) == 1
    assert flags[0] in answer.err
