"""Which file of the package imports which, imports for types included."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import distriray.parallel

ROOT = Path(distriray.parallel.__file__).parent


def imports(path: Path, package: str = "distriray.parallel") -> set[str]:
    """The modules of a package that a file imports from."""
    nodes = ast.walk(ast.parse(path.read_text()))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name for name in names if name.startswith(package)}


def test_no_file_imports_itself_by_way_of_others() -> None:
    files = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    graph = {f"distriray.parallel.{name}": imports(path) for path, name in files.items()}
    assert len(graph) > 20 and graph["distriray.parallel.engine"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_layers_know_the_context_and_neither_engine_nor_exchange() -> None:
    for path in (ROOT / "layers").glob("*.py"):
        source = ast.parse(path.read_text())
        runtime = {node.module for node in source.body if isinstance(node, ast.ImportFrom)}
        ours = {name for name in runtime if name and name.startswith("distriray.parallel")}
        assert ours <= {f"distriray.parallel.{name}" for name in ("context", "moments", "partition")}, path


def test_only_the_table_knows_the_families_and_the_engine_knows_no_model() -> None:
    for path in ROOT.rglob("*.py"):
        assert "distriray.parallel.networks.unet" not in imports(path), path
    for name in ("engine", "parallelize", "networks/base", "networks/registry"):
        assert not imports(ROOT / f"{name}.py", "diffusers"), name
