"""Who imports whom, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One module named by an import statement.

    `at_import_time` is True where importing the module runs the statement: not inside a function,
    and not in a block for the type checker alone.
    """

    module: str
    target: str
    line: int
    at_import_time: bool


def module_name(path: Path, top: Path) -> str:
    """Return the dotted name of a source file below `top`."""
    parts = path.relative_to(top).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(top: Path, packages: Iterable[str]) -> dict[str, Path]:
    """Return the modules of those of `packages` that exist below `top`."""
    return {
        module_name(path, top): path
        for package in packages
        for path in sorted((top / package).rglob("*.py"))
    }


def imports_of(modules: Mapping[str, Path]) -> list[Import]:
    """Return every import of `modules`; what is imported from one of them is traced to its file."""
    found: list[Import] = []
    for module, path in modules.items():
        tree = ast.parse(path.read_bytes(), filename=str(path))
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node, at_import_time in _statements(tree.body, at_import_time=True):
            found += [
                Import(module, target, node.lineno, at_import_time)
                for target in _targets(node, package, modules)
            ]
    return found


def _statements(
    body: Iterable[ast.AST], *, at_import_time: bool
) -> Iterator[tuple[ast.stmt, bool]]:
    """Yield the import statements below `body`, and whether importing the module runs them."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, at_import_time
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(ast.iter_child_nodes(node), at_import_time=False)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _statements(node.body, at_import_time=False)
            yield from _statements(node.orelse, at_import_time=at_import_time)
        else:
            yield from _statements(ast.iter_child_nodes(node), at_import_time=at_import_time)


def _targets(node: ast.stmt, package: str, modules: Mapping[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *filter(None, [base])])
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            yield submodule if submodule in modules else base


def cycles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return one cycle for every module that closes one, each as the modules along it."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in done:
            for target in sorted(edges.get(module, ())):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found
