"""The README names files, functions, tests and flags; each must exist, or a reader is sent to look for a ghost."""

import ast
import re
from pathlib import Path

import pytest

import demo
import sft

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def names_in(path: Path) -> set[str]:
    """Functions, classes, their methods and fields, and module-level names of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:[\w]+/)*[\w]+\.(?:py|md|txt))`", README))))
def test_files_exist(name: str):
    """A file that was renamed or merged leaves the README's table behind."""
    assert (ROOT / name).exists() or (ROOT / "tests" / name).exists()


@pytest.mark.parametrize("module, name", sorted(set(re.findall(r"`([a-z]+)\.([A-Za-z_]+)`", README))))
def test_functions_exist(module: str, name: str):
    """The T1 map must point at code: a function that moved must move there too."""
    if name in ("py", "json", "md", "png", "txt", "jsonl"):
        pytest.skip("a file, checked above")
    path = ROOT / f"{module}.py" if (ROOT / f"{module}.py").exists() else ROOT / module / "__init__.py"
    assert name in names_in(path), f"README.md names {module}.{name}"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", README))))
def test_tests_exist(name: str):
    """An idea whose test is gone is an idea without proof."""
    tests = set().union(*(names_in(path) for path in (ROOT / "tests").glob("test_*.py")))
    assert name in tests


def test_flags_exist():
    """Commands are copied from the README: a flag that is gone makes the first try fail."""
    for script, rest in re.findall(r"^(?:\$ )?python (\w+\.py)([^\n#]*)", README, flags=re.M):
        known = {name.replace("_", "-") for source in (script, "recipes.py") for name in fields(ROOT / source)}
        for flag in re.findall(r"--([a-z-]+)", rest):
            assert flag in known, f"README.md: {script} has no --{flag}"


def test_no_figure_is_left_to_fill_in():
    """A placeholder that was forgotten, or a number that the code has left behind."""
    assert not re.findall(r"DEMO_[A-Z]+", README)
    assert f"{demo.Config.chains:,} chains" in README
    assert f"{sum(p.numel() for p in sft.begin(sft.Config(out=''))[0].parameters()):,} parameters" in README


def fields(path: Path) -> set[str]:
    """Annotated fields of the dataclasses in a file."""
    tree = ast.parse(path.read_text())
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {
        n.target.id for c in classes for n in c.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
