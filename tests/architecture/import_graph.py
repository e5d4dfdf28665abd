"""The modules of this repository and who imports whom, read from the code.

python tests/architecture/import_graph.py         the graph of rooms, from the bottom up
python tests/architecture/import_graph.py dot     the same for Graphviz

A *room* is what a reader takes in at once: a folder of ``moeq_plugin`` with all that is below it, a
folder or a file of ``integrations/<framework>``, and each ``__init__.py`` that shows names of other
rooms. Imports inside functions count, and so do those for type checkers only: who must know a name
to be read depends on it, whenever it is loaded.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "moeq_plugin"
INTEGRATIONS = f"{PACKAGE}.integrations"
# folder -> the package that it is installed as
INSTALLED_AS = {ROOT / PACKAGE: PACKAGE, ROOT / "integrations": INTEGRATIONS}

Graph = Mapping[str, frozenset[str]]  # node -> the nodes that it needs


@dataclass(frozen=True)
class Import:
    """A name that a module imports.

    Attributes:
        name: dotted; of a module, or of something in one.
        is_lazy: whether it stands in a function, so that importing the module does not run it.
    """

    name: str
    is_lazy: bool

    @property
    def top(self) -> str:
        """Return the package that the name belongs to."""
        return self.name.partition(".")[0]


@cache
def modules() -> Mapping[str, Path]:
    """Return all modules by the names that they are installed under."""
    found = {}
    for folder, package in INSTALLED_AS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder.name == PACKAGE and parts[0] == "integrations":
                continue  # a link to the other folder, in a checkout that runs without installing
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def is_package(module: str) -> bool:
    """Return whether a module is the ``__init__.py`` of a folder."""
    return modules()[module].name == "__init__.py"


def imports(source: str) -> frozenset[Import]:
    """Return what ``source`` imports, at any depth.

    Raises:
        ValueError: for a relative import, which says less than the whole name.
    """
    return frozenset(_imports(ast.parse(source), is_lazy=False))


def _imports(tree: ast.AST, *, is_lazy: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, is_lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"relative import in line {node.lineno}")
            yield from (Import(f"{node.module}.{alias.name}", is_lazy) for alias in node.names)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(node, is_lazy=is_lazy or is_function)


def module_of(name: str) -> str | None:
    """Return the module of ours that ``name`` is, or is in; ``None`` if it is another's."""
    while name:
        if name in modules():
            return name
        name = name.rpartition(".")[0]
    return None


def needs(source: str) -> frozenset[str]:
    """Return the modules of ours that ``source`` imports from."""
    return frozenset(filter(None, (module_of(found.name) for found in imports(source))))


@cache
def module_graph() -> Graph:
    """Return which modules each module needs."""
    return {m: needs(path.read_text()) - {m} for m, path in modules().items()}


def room_of(module: str) -> str:
    """Return the room that a module is in, as a path such as ``integrations/hf/gptq``."""
    parts = module.split(".")[1:]
    depth = 3 if parts[:1] == ["integrations"] else 1
    if is_package(module) and len(parts) < depth:
        return "/".join((*parts, "__init__"))
    return "/".join(parts[:depth])


def room_graph(under: str = "") -> Graph:
    """Return which rooms each room needs, as far as both are ``under`` a folder."""
    graph = defaultdict(set)
    for module, needed in module_graph().items():
        room = room_of(module)
        if room.startswith(under):
            graph[room] |= {room_of(m) for m in needed if room_of(m).startswith(under)} - {room}
    return {room: frozenset(needed) for room, needed in graph.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Return the groups of nodes that need each other, on whatever way (Tarjan, 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for needed in sorted(graph.get(node, ())):
            if needed not in index:
                visit(needed)
                lowest[node] = min(lowest[node], lowest[needed])
            elif needed in stack:
                lowest[node] = min(lowest[node], index[needed])
        if lowest[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def levels(graph: Graph) -> dict[str, int]:
    """Return how many nodes the longest way down from each node has; one for those at the bottom.

    Nodes of a circle count as one.
    """
    circle = {node: frozenset(group) for group in circles(graph) for node in group}
    known: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in known:
            group = circle.get(node, frozenset({node}))
            below = frozenset().union(*(graph.get(n, ()) for n in group)) - group
            known.update(dict.fromkeys(group, 1 + max(map(level, below), default=0)))
        return known[node]

    return {node: level(node) for node in graph}


def drawing(graph: Graph) -> str:
    """Return a graph as text, the bottom first; what stands on a line needs only lines above it."""
    level = levels(graph)
    lines = []
    for number in sorted(set(level.values())):
        lines.append(f"level {number}")
        for node in sorted(n for n in graph if level[n] == number):
            lines.append(f"  {node} -> {_listed(graph[node])}" if graph[node] else f"  {node}")
    lines += [f"circle: {_listed(group)}" for group in circles(graph)]
    return "\n".join(lines)


def _listed(nodes: Iterable[str]) -> str:
    return ", ".join(sorted(nodes))


def dot(graph: Graph) -> str:
    """Return a graph in the language of Graphviz."""
    arrows = [f'  "{node}" -> "{to}";' for node in sorted(graph) for to in sorted(graph[node])]
    return "\n".join(["digraph rooms {", "  rankdir=BT;", *arrows, "}"])


if __name__ == "__main__":
    print((dot if sys.argv[1:] == ["dot"] else drawing)(room_graph()))
