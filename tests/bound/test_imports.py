"""What a certificate rests on stands in one folder."""

import ast
import sys
from pathlib import Path

import pytest

import locallip.bound

BOUND = Path(locallip.bound.__file__).parent
FILES = sorted(BOUND.rglob("*.py"))
# Where a bar is asked for, tqdm is imported then.
ALLOWED = {"torch", "numpy", *sys.stdlib_module_names}
ON_REQUEST = {"pieces.py": ["tqdm"]}


def imported(path):
    """The names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield node.module


def is_allowed(module):
    return module.split(".")[0] in ALLOWED or module == "locallip.bound" or module.startswith("locallip.bound.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(BOUND).as_posix())
def test_the_bound_imports_nothing_outside_itself_but_torch_numpy_and_the_standard_library(path):
    assert [module for module in imported(path) if not is_allowed(module)] == ON_REQUEST.get(path.name, [])


def test_the_files_of_the_bound_were_found_and_other_imports_would_be_noticed(tmp_path):
    assert {"walk.py", "operators.py", "proof.py"} <= {path.name for path in FILES}
    (tmp_path / "spoiled.py").write_text(
        "def f():\n    from locallip.training import vectors\n\nimport utils\nimport torch.nn\n"
    )
    modules = list(imported(tmp_path / "spoiled.py"))
    assert sorted(module for module in modules if not is_allowed(module)) == ["locallip.training", "utils"]
