"""The graph of imports has no circle, and the integration of llm-compressor is built in levels."""

import subprocess
import sys
from pathlib import Path

import import_graph
import pytest
from import_graph import circles, drawing, levels, module_graph, room_graph

HERE = "integrations/llm_compressor/"
# From the bottom up. A room needs rooms of lower levels only; those of one level stand side by side
# and do not know each other.
LEVELS = (
    {
        "frozen_fields",
        "host",
        "kept_parts",
        "linearization",
        "one_rank",
        "one_run",
        "schemes",
        "unfinished",
    },
    {"calibration", "checkpoint", "places", "recipe", "solver_fields"},
    {"preflight", "solving", "self_sampling", "two_streams"},
    {"allocation", "awq", "prepare", "rotation"},
    {"moequant"},
    {"rwkv"},
)


def inner_rooms():
    """The rooms of llm-compressor's integration, without the list of its public names."""
    rooms = {
        room.removeprefix(HERE): {to.removeprefix(HERE) for to in needed}
        for room, needed in room_graph(HERE).items()
    }
    del rooms["__init__"]
    return rooms


def upward(rooms):
    """Arrows that do not lead to a lower level."""
    level = {room: number for number, names in enumerate(LEVELS) for room in names}
    arrows = {(a, b) for a, needed in rooms.items() for b in needed}
    # a room that has no level yet is nobody's ground to build on
    return {(a, b) for a, b in arrows if level.get(b, len(LEVELS)) >= level.get(a, 0)}


def test_modules_import_in_no_circle():
    graph = module_graph()
    within = {node for circle in circles(graph) for node in circle}
    guilty = {node: graph[node] & within for node in within}
    assert circles(graph) == [], f"modules import each other:\n{drawing(guilty)}"


def test_rooms_import_in_no_circle():
    graph = room_graph()
    assert circles(graph) == [], f"rooms import each other:\n{drawing(graph)}"


def test_every_room_has_a_level():
    assert sorted(inner_rooms()) == sorted(room for level in LEVELS for room in level)


def test_arrows_lead_down():
    rooms = inner_rooms()
    assert upward(rooms) == set(), f"arrows that do not lead down:\n{drawing(rooms)}"


def test_there_are_at_most_six_levels():
    rooms = inner_rooms()
    assert max(levels(rooms).values()) <= 6, f"too many levels:\n{drawing(rooms)}"
    assert len(LEVELS) <= 6


def test_a_planted_arrow_upwards_is_found():
    assert upward({"host": {"rwkv"}, "rwkv": {"host"}}) == {("host", "rwkv")}
    assert upward({"awq": {"allocation"}, "allocation": set()}) == {("awq", "allocation")}
    assert upward({"rwkv": {"new"}, "new": {"host"}}) == {("rwkv", "new"), ("new", "host")}


@pytest.mark.parametrize(
    ("arrows", "found", "highest"),
    [
        ("ab bc ac", [], 3),
        ("ab ba", ["ab"], 1),
        ("ab bc ca cd", ["abc"], 2),
        ("ab bc cb da ed de", ["bc", "de"], 3),
        ("", [], 0),
    ],
)
def test_planted_circles_are_found(arrows, found, highest):
    nodes = sorted(set(arrows) - {" "})
    graph = {n: frozenset(a[1] for a in arrows.split() if a[0] == n) for n in nodes}
    assert sorted("".join(group) for group in circles(graph)) == found
    assert max(levels(graph).values(), default=0) == highest
    for group in found:
        assert f"circle: {', '.join(group)}" in drawing(graph)


def test_imports_in_functions_and_for_types_count():
    source = "if TYPE_CHECKING:\n    from moeq_plugin.core import grid\n" + (
        "def f():\n    import moeq_plugin.core.hessian\n    from moeq_plugin.core.gptq import g\n"
    )
    names = {f"moeq_plugin.core.{name}" for name in ("grid", "hessian", "gptq")}
    assert import_graph.needs(source) == names


def test_a_relative_import_is_refused():
    with pytest.raises(ValueError, match="relative import in line 1"):
        import_graph.imports("from . import grid")


def test_the_graph_is_drawn():
    script = Path(import_graph.__file__)
    drawn = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    assert drawn.stdout.startswith("level 1\n")
    for room in ("core", "cli", "integrations/llm_compressor/host", "integrations/hf/gptq"):
        assert f"\n  {room}" in drawn.stdout
    graphviz = subprocess.run(
        [sys.executable, script, "dot"], check=True, capture_output=True, text=True
    )
    assert '"models" -> "core";' in graphviz.stdout
