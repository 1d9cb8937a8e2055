"""The package stands alone: what a person runs imports it, never the other way round."""

import ast

import pytest
from conftest import ROOT

FILES = sorted((ROOT / "locallip").rglob("*.py"))
# What Python finds beside the package where a script of the repository runs, its folder and TinyImagenet/.
TOP_LEVEL = {path.stem for folder in (ROOT, ROOT / "TinyImagenet") for path in folder.glob("*.py")}
TOP_LEVEL |= {path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier()} - {"locallip"}


def of_the_top_level(source):
    """The modules of the top level that some code imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found.append(node.module)
    return [module for module in found if module.partition(".")[0] in TOP_LEVEL]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_package_imports_nothing_from_the_top_level(path):
    assert of_the_top_level(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import utils", ["utils"]),
        ("def f():\n    from data_load import DATA_SETS", ["data_load"]),
        ("import torch, benchmarks.certification as c", ["benchmarks.certification"]),
        ("from train_tinyimagenet import main", ["train_tinyimagenet"]),
        ("from locallip.training import run\nimport torch.utils", []),
    ],
)
def test_an_import_from_the_top_level_would_be_noticed(source, found):
    assert of_the_top_level(source) == found


def test_the_files_of_the_package_were_found():
    assert {"distributed.py", "flags.py", "step.py", "walk.py", "report.py"} <= {path.name for path in FILES}
