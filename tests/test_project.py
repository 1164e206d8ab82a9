"""The project's own promises: files in step with each other, notebooks without outputs, small files."""

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_environment_is_in_step_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python{project['requires-python']}" in environment
    pip = next(d["pip"] for d in environment if isinstance(d, dict))
    install = next(line for line in pip if line.startswith("-e"))
    assert set(re.search(r"\[(.*)\]", install).group(1).split(",")) == set(project["optional-dependencies"]) - {"peers"}
    assert "-c constraints.txt" in pip


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    wanted = list(project["dependencies"]) + [d for ds in project["optional-dependencies"].values() for d in ds]
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement).group(0).lower().replace("_", "-")
        assert re.search(rf"^{re.escape(name)}==", lines, re.MULTILINE), name


def test_citation_and_package_have_one_version():
    from cryobench import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"] == __version__
    assert __version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_in_git_carry_no_outputs_and_nothing_left_to_write(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")
        assert cell.get("id")
        assert not re.search(r"@@|TODO|FIXME|\bTEXT\b", "".join(cell["source"]))


def test_no_file_is_long_and_lower_rooms_never_import_higher_ones():
    rooms = ["specimens", "imaging", "reconstruction", "methods", "metrics", "bench"]
    allowed = {"metrics": 2}
    for path in (ROOT / "cryobench").rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 350, path
        room = path.relative_to(ROOT / "cryobench").parts[0]
        if room not in rooms:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cryobench."):
                other = node.module.split(".")[1]
                if other in rooms and other != room:
                    highest = allowed.get(room, rooms.index(room))
                    assert rooms.index(other) < highest, f"{path} imports {node.module}"


def test_no_path_of_a_machine_in_tracked_files():
    pattern = re.compile(r"(^|[^A-Za-z0-9_.])/(root|home/[a-z]+)/")
    for path in tracked():
        if path.suffix in (".py", ".md", ".yml", ".ipynb", ".toml", ".txt", ".json", "") and path.is_file():
            assert not pattern.search(path.read_text(errors="ignore")), path
