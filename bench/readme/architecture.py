"""The picture of the tree and its arrows in docs/design/architecture.md: python -m bench.readme.architecture

Boxes are the packages of qlora_kernels and the folders of csrc, arrows the imports and includes between them, read from
the sources. An arrow that follows from others (a uses b, b uses c, so a may use c) is left out. The SVG holds no date
and nothing of the machine: the same tree gives the same bytes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path, PurePosixPath

from .graph import imports, includes, modules, sources

ROOT = Path(__file__).resolve().parent.parent.parent
PATH = ROOT / "docs" / "design" / "architecture.svg"
PACKAGE = "qlora_kernels"

#: From a package or folder to those that it uses.
Graph = dict[str, set[str]]

# --------------------------------------------------------------------------------------------------- the sources


def python_graph(root: Path = ROOT) -> Graph:
    """The rooms of the Python package: its subpackages, and modules at its top.

    Its ``__init__`` and ``__main__``, which pass names on, are no rooms.
    """

    def room(name: str) -> str:
        return name.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]

    rooms = {room(name) for name in modules(root, PACKAGE)} - {"", "__main__"}
    return _between(rooms, ((room(arrow.source), room(arrow.target)) for arrow in imports(root, [PACKAGE])))


def include_graph(csrc: Path = ROOT / "csrc") -> Graph:
    """The folders of C++ sources, by what their files include."""

    def room(file: str) -> str:
        return (PurePosixPath("csrc") / file).parent.as_posix()

    arrows = ((room(arrow.source), room(arrow.target)) for arrow in includes(csrc))
    return _between({room(file) for file in sources(csrc)}, arrows)


def _between(rooms: set[str], arrows: Iterable[tuple[str, str]]) -> Graph:
    graph: Graph = {room: set() for room in sorted(rooms)}
    for source, target in arrows:
        if source != target and source in graph and target in graph:
            graph[source].add(target)
    return graph


# ----------------------------------------------------------------------------------------------------- the graph


def reachable(graph: Graph, start: str) -> set[str]:
    """Everything that a room uses, directly or through others."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph[name]
    return seen


def reduced(graph: Graph) -> Graph:
    """The graph without arrows that follow from others; those of a circle stay."""
    far = {name: reachable(graph, name) for name in graph}
    return {
        name: {
            used for used in uses if not any(used in far[other] and name not in far[other] for other in uses - {used})
        }
        for name, uses in graph.items()
    }


def levels(graph: Graph) -> dict[str, int]:
    """How many floors lie below each room; rooms of a circle share one."""
    far = {name: reachable(graph, name) for name in graph}

    def level(name: str, known: dict[str, int]) -> int:
        if name not in known:
            below = [used for used in sorted(far[name]) if name not in far[used]]
            known[name] = 1 + max((level(used, known) for used in below), default=-1)
        return known[name]

    known: dict[str, int] = {}
    for name in sorted(graph):
        level(name, known)
    return known


# --------------------------------------------------------------------------------------------------- the picture

_HEIGHT, _GAP, _FLOOR, _BEND = (
    30,
    18,
    74,
    14,
)  # a box, between neighbours, from floor to floor, the room of a passing line
_FONT = "font-family='system-ui, sans-serif'"


@dataclass
class Node:
    """A box, or with ``label`` None a place where an arrow passes a floor."""

    label: str | None
    floor: int
    x: float = 0.0

    @property
    def width(self) -> float:
        return _BEND if self.label is None else 24 + 7.2 * len(self.label)


def _layout(graph: Graph) -> tuple[dict[str, Node], list[list[Node]]]:
    """Nodes by name, and every arrow as the nodes that it passes, from above to below."""
    floors = levels(graph)
    nodes = {name: Node(name, floors[name]) for name in sorted(graph)}
    paths = []
    for name, uses in sorted(reduced(graph).items()):
        for used in sorted(uses):
            between = [Node(None, floor) for floor in range(floors[name] - 1, floors[used], -1)]
            paths.append([nodes[name], *between, nodes[used]])
    rows = [[] for _ in range(max(floors.values(), default=0) + 1)]
    for node in (*nodes.values(), *(node for path in paths for node in path[1:-1])):
        rows[node.floor].append(node)
    neighbours: dict[int, list[Node]] = {}
    for path in paths:
        for upper, lower in itertools.pairwise(path):
            neighbours.setdefault(id(upper), []).append(lower)
            neighbours.setdefault(id(lower), []).append(upper)
    _spread(rows)
    for turn in range(24):
        downwards = turn % 2 == 0
        for row in rows[::-1] if downwards else rows:
            wanted = {}
            for node in row:
                near = [n.x for n in neighbours.get(id(node), []) if (n.floor > node.floor) == downwards]
                wanted[id(node)] = sum(near) / len(near) if near else node.x
            row.sort(key=lambda node: wanted[id(node)])
            _settle(row, wanted)
    return nodes, paths


def _spread(rows: Iterable[list[Node]]) -> None:
    for row in rows:
        at = 0.0
        for node in row:
            node.x = at + node.width / 2
            at += node.width + _GAP


def _settle(row: list[Node], wanted: dict[int, float]) -> None:
    """Puts a row's nodes as near to where they should be as their order and widths allow."""
    groups: list[list[Node]] = []
    centres: list[float] = []

    def width(group: list[Node]) -> float:
        return sum(node.width for node in group) + _GAP * (len(group) - 1)

    def centre(group: list[Node]) -> float:
        """Of the whole group, so that its nodes are on average where they should be."""
        at, total = -width(group) / 2, 0.0
        for node in group:
            total += wanted[id(node)] - (at + node.width / 2)
            at += node.width + _GAP
        return total / len(group)

    for node in row:
        groups.append([node])
        centres.append(wanted[id(node)])
        while len(groups) > 1 and (
            centres[-1] - width(groups[-1]) / 2 < centres[-2] + width(groups[-2]) / 2 + _GAP - 1e-9
        ):
            last = groups.pop()
            centres.pop()
            groups[-1] += last
            centres[-1] = centre(groups[-1])
    for group, middle in zip(groups, centres):
        at = middle - width(group) / 2
        for node in group:
            node.x = at + node.width / 2
            at += node.width + _GAP


def _curve(points: list[tuple[float, float]]) -> str:
    text = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        text += f" C{x0:.1f},{middle:.1f} {x1:.1f},{middle:.1f} {x1:.1f},{y1:.1f}"
    return text


def _drawn(graph: Graph, title: str, color: str, left: float) -> tuple[list[str], float, float]:
    """A graph's SVG elements, with their left side at ``left``; and their width and height."""
    nodes, paths = _layout(graph)
    everything = [*nodes.values(), *(node for path in paths for node in path)]
    shift = left - min(node.x - node.width / 2 for node in everything)
    top = max(node.floor for node in everything)

    def y(node: Node) -> float:
        return 56 + (top - node.floor) * _FLOOR

    lines = [f"<text x='{left}' y='30' {_FONT} font-size='17' font-weight='600'>{escape(title)}</text>"]
    for path in paths:
        points = []
        for node in path:
            x = node.x + shift
            if node is path[0]:
                points.append((x, y(node) + _HEIGHT))
            elif node is path[-1]:
                points.append((x, y(node) - 3))
            else:
                points += [(x, y(node)), (x, y(node) + _HEIGHT)]
        if path[0].floor == path[-1].floor:  # rooms of a circle
            points = [(path[0].x + shift, y(path[0])), (path[-1].x + shift, y(path[-1]) - 3)]
        lines.append(f"<path d='{_curve(points)}' class='arrow' marker-end='url(#tip)'/>")
    for name, node in nodes.items():
        x = node.x + shift
        lines.append(
            f"<rect x='{x - node.width / 2:.1f}' y='{y(node)}' width='{node.width:.1f}' height='{_HEIGHT}' rx='5' "
            f"fill='{color}' stroke='#555'/>"
            f"<text x='{x:.1f}' y='{y(node) + 20}' {_FONT} font-size='13' text-anchor='middle'>{escape(name)}</text>"
        )
    width = max(node.x + node.width / 2 for node in everything) + shift - left
    return lines, width, 56 + top * _FLOOR + _HEIGHT


def svg(root: Path = ROOT) -> str:
    """The whole picture."""
    package, package_width, package_height = _drawn(python_graph(root), PACKAGE, "#dbe9f6", 20)
    native, native_width, native_height = _drawn(include_graph(root / "csrc"), "csrc", "#fde8cf", 20)
    width = max(package_width, native_width) + 40
    lower = package_height + 30
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {lower + native_height + 20:.0f}' "
            f"width='{width:.0f}'>",
            "<style>.arrow{fill:none;stroke:#777;stroke-width:1.2}</style>",
            "<defs><marker id='tip' viewBox='0 0 8 8' refX='6' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
            "<path d='M0,0 L8,4 L0,8 z' fill='#777'/></marker></defs>",
            "<rect width='100%' height='100%' fill='#fff'/>",
            *package,
            f"<g transform='translate(0,{lower:.0f})'>",
            *native,
            "</g>",
            "</svg>",
            "",
        ]
    )


def main() -> int:
    PATH.write_text(svg(), encoding="utf-8")
    print(f"{PATH.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
