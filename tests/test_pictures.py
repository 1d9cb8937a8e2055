"""Drawing depends on nothing that the caller's environment says of matplotlib, and who does not draw does without."""

import runpy
import shutil

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, TINY, spawn

from locallip.evaluation import pictures

NOTEBOOK = "module://matplotlib_inline.backend_inline"  # what Jupyter and Colab export, mostly not installed here
NOWHERE = "/dev/null/nowhere"  # no folder can be made there, by whomever
NO_HOME = {"HOME": NOWHERE, "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": NOWHERE}
ENVIRONMENTS = {
    "notebook": {"MPLBACKEND": NOTEBOOK},
    "unknown backend and no folder": {"MPLBACKEND": "no such backend", "MPLCONFIGDIR": NOWHERE},
    "window and no home": NO_HOME | {"MPLBACKEND": "qtagg", "DISPLAY": ""},
}
WITHOUT_DRAWING = """
import contextlib, io, os, runpy, sys

sys.path.insert(0, os.getcwd())
scripts = {scripts!r}
for command in [[script, "--help"] for script in scripts] + [{evaluation!r}, {falsification!r}, {benchmark!r}]:
    sys.argv = command
    for name in {drivers!r}:
        sys.modules.pop(name, None)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            assert end.code == 0, (command, end.code)
    assert out.getvalue(), command
    assert "matplotlib" not in sys.modules, command
"""
DRIVERS = ["evaluate", "falsify"]
SCRIPTS = [path.name for path in ROOT.glob("*.py") if "run_script(main)" in path.read_text()]
SCRIPTS += [f"{folder}/{p.name}" for folder in ("TinyImagenet", "benchmarks") for p in (ROOT / folder).glob("*.py")]


def test_no_script_imports_matplotlib_for_its_help_or_where_it_draws_nothing(saved_net):
    assert {"evaluate.py", "falsify.py", "train_mnist.py", "benchmarks/training_step.py"} <= set(SCRIPTS)
    net = [*map(str, TINY), "--saved_model", str(saved_net), "--images", "4", "--epsilon", "1e-4"]
    code = WITHOUT_DRAWING.format(
        scripts=SCRIPTS,
        drivers=DRIVERS,
        evaluation=["evaluate.py", *net],
        falsification=["falsify.py", *net, "--restarts", "1", "--slope_steps", "2"],
        benchmark=["benchmarks/certification.py", *net, "--test_sniter", "2"],
    )
    answer = spawn("-c", code, MPLBACKEND="no such backend")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_every_environment_gets_its_pictures(environment, saved_net, tmp_path):
    net = [*TINY, "--saved_model", saved_net, "--images", 4, "--epsilon", 1e-4]
    answer = spawn("evaluate.py", *net, "--out", tmp_path / "report", **environment)
    assert (answer.code, "Traceback" in answer.err) == (0, False), answer.err
    assert len(list((tmp_path / "report").glob("*.png"))) == 3


def test_falsification_draws_for_a_notebook(saved_net, tmp_path):
    net = [*TINY, "--saved_model", saved_net, "--images", 4, "--epsilon", 1e-4, "--restarts", 1, "--slope_steps", 2]
    answer = spawn("falsify.py", *net, "--out", tmp_path, **ENVIRONMENTS["notebook"])
    assert (answer.code, answer.err) == (0, "")
    assert (tmp_path / "bounds_and_slopes.png").is_file()


def test_the_table_draws_trainings_for_a_notebook(tmp_path):
    folder = tmp_path / "results" / "mnist-4c3f"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "results" / "mnist-4c3f" / "epochs.csv", folder)
    for readme in ("README.md", "results/README.md"):
        shutil.copy(ROOT / readme, tmp_path / readme)
    code = "import table; from pathlib import Path; import sys\n"
    code += f"table.ROOT = Path({str(tmp_path)!r}); sys.argv = ['table']; table.main()"
    answer = spawn("-c", code, **ENVIRONMENTS["notebook"])
    assert (answer.code, answer.err) == (0, "")
    assert (folder / "training.png").is_file()


def test_an_import_of_matplotlib_that_failed_before_does_no_harm(tmp_path):
    code = "import contextlib, sys, pathlib\nwith contextlib.suppress(ValueError):\n    import matplotlib\n"
    code += "assert 'matplotlib' not in sys.modules\nfrom locallip.evaluation import pictures\n"
    code += f"with pictures.drawing(pathlib.Path({str(tmp_path / 'line.png')!r})) as axes:\n    axes.plot([0, 1])\n"
    answer = spawn("-c", code, **ENVIRONMENTS["notebook"])
    assert (answer.code, answer.err) == (0, "")
    assert (tmp_path / "line.png").is_file()


def a_line(path):
    with pictures.drawing(path) as axes:
        axes.plot(np.arange(3))
    return matplotlib.image.imread(path)


def test_the_callers_style_stays_as_it_is_and_changes_no_picture(tmp_path):
    plain = a_line(tmp_path / "plain.png")
    theirs = {"figure.dpi": 30, "lines.linewidth": 9, "axes.facecolor": "red", "savefig.bbox": "tight"}
    with matplotlib.rc_context(theirs):
        assert np.array_equal(a_line(tmp_path / "styled.png"), plain)
        assert {name: matplotlib.rcParams[name] for name in theirs} == theirs


def test_a_picture_that_cannot_be_drawn_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), pictures.drawing(tmp_path / "picture.png"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_the_pictures_of_the_dual_are_drawn(tmp_path):
    draw = runpy.run_path(str(ROOT / "docs" / "draw_dual.py"))
    for name in ("draw_unit", "draw_gains"):
        draw[name](tmp_path / f"{name}.png")
        assert matplotlib.image.imread(tmp_path / f"{name}.png").std() > 0.01
