"""A room of the package imports only rooms below it: what its files import, held against the order of the rooms."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

NAME = "cdmoe_plugin"
ROOT = Path(__file__).parents[2] / NAME
# From the top down. A room is a folder or a module of the package; those of the ground lie side by side.
ROOMS = [
    "__init__",
    "__main__",
    "scripts",
    "integrations",
    "api",
    "estimate",
    "adapter",
    "export",
    "recovery",
    "search",
    "loading",
]
ROOMS += ["condense", "decoder", "blocks", "model", "cards"]
GROUND = [
    "plan",
    "plan_files",
    "plan_layer",
    "shapes",
    "config",
    "calibration",
    "data",
    "reference",
    "checks",
    "sizes",
    "atomic",
    "offload",
    "registry",
]
GROUND += [
    "metrics",
    "after_import",
    "autocast",
    "images",
    "knapsack",
    "naming",
    "presets",
    "processes",
    "samples",
    "spread",
    "tokenizing",
]
LEVELS = {room: level for level, room in enumerate(ROOMS)} | dict.fromkeys(GROUND, len(ROOMS))


@dataclass
class Module:
    """A module of the package: the package that its relative imports start from, and its syntax tree."""

    package: str
    tree: ast.Module


def parse(sources: dict[str, str]) -> dict[str, Module]:
    """Parse files, given by their paths in the package, into modules by their full names."""
    modules = {}
    for path, text in sources.items():
        folder, _, file = f"{NAME}/{path}".replace("/", ".").removesuffix(".py").rpartition(".")
        modules[folder if file == "__init__" else f"{folder}.{file}"] = Module(folder, ast.parse(text))
    return modules


def imported_names(module: Module) -> Iterator[str]:
    """The full names that a module imports, in functions and for type checkers too."""
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=name, names=names, level=level):
                start = resolve_name("." * level + (name or ""), module.package)
                yield from (f"{start}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield resolve_name(name, module.package)


def arrows(modules: dict[str, Module]) -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports."""
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, module in modules.items():
        for target in imported_names(module):
            while target and target not in modules:  # a name in a module, or one outside the package
                target = target.rpartition(".")[0]
            found[name] |= {target} - {"", name}
    return found


def room_of(name: str) -> str:
    return name.partition(".")[2].partition(".")[0] or "__init__"


def unknown_rooms(modules: dict[str, Module]) -> list[str]:
    return sorted({room_of(name) for name in modules} - LEVELS.keys())


def upward_imports(modules: dict[str, Module]) -> list[str]:
    pairs = [(name, target) for name, targets in arrows(modules).items() for target in sorted(targets)]
    return [f"{name} -> {target}" for name, target in pairs if LEVELS[room_of(target)] < LEVELS[room_of(name)]]


def circle(modules: dict[str, Module]) -> list[str]:
    try:
        TopologicalSorter(arrows(modules)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, but not into functions."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from run_on_import(child)


def hooks(modules: dict[str, Module]) -> list[str]:
    """Places where the import of a module overwrites an attribute of something that it imported."""
    found = []
    for name, module in modules.items():
        imports = [node for node in ast.walk(module.tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        foreign = {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}
        for node in run_on_import(module.tree):
            match node:
                case ast.Attribute(value=owner, ctx=ast.Store() | ast.Del()):
                    pass
                case ast.Call(func=ast.Name(id="setattr" | "delattr"), args=[owner, *_]):
                    pass
                case _:
                    continue
            if foreign & {part.id for part in ast.walk(owner) if isinstance(part, ast.Name)}:
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.fixture(scope="module")
def package() -> dict[str, Module]:
    return parse({path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in ROOT.rglob("*.py")})


def test_every_room_has_its_place(package: dict[str, Module]) -> None:
    assert unknown_rooms(package) == []


def test_no_room_imports_one_above_it(package: dict[str, Module]) -> None:
    assert upward_imports(package) == []


def test_no_circles(package: dict[str, Module]) -> None:
    assert circle(package) == []


def test_no_hooks(package: dict[str, Module]) -> None:
    assert hooks(package) == []


HOUSE = {"__init__.py": "", "api.py": "", "blocks/__init__.py": "", "blocks/find.py": "", "plan.py": "PLAN = 1"}


@pytest.mark.parametrize(
    "line",
    [
        "from ..api import condense",
        "from .. import api",
        "from .. import __version__",
        "import cdmoe_plugin.api as api",
        "def f():\n    from cdmoe_plugin.api import condense",
        "if TYPE_CHECKING:\n    from ..api import condense",
        "importlib.import_module('..api', __package__)",
    ],
)
def test_an_upward_import_is_seen(line: str) -> None:
    assert len(upward_imports(parse({**HOUSE, "blocks/find.py": line}))) == 1
    below = {**HOUSE, "blocks/find.py": "from .. import plan\nfrom ..plan import PLAN"}
    assert upward_imports(parse(below)) == []


def test_a_circle_and_an_unknown_room_are_seen() -> None:
    inside = {**HOUSE, "blocks/__init__.py": "from .find import f", "blocks/find.py": "def f():\n    from . import g"}
    assert set(circle(parse(inside))) == {"cdmoe_plugin.blocks", "cdmoe_plugin.blocks.find"}
    assert circle(parse(HOUSE)) == []
    assert unknown_rooms(parse({**HOUSE, "utils/misc.py": ""})) == ["utils"]


@pytest.mark.parametrize(
    "line",
    [
        "plan.PLAN = 2",
        "plan.Plan.load += 2",
        "if True:\n    plan.PLAN, x = 2, 3",
        "setattr(plan, 'PLAN', 2)",
        "class A:\n    del plan.PLAN",
    ],
)
def test_a_hook_is_seen(line: str) -> None:
    assert len(hooks(parse({**HOUSE, "blocks/find.py": f"from .. import plan\n{line}"}))) == 1
    within = "def f(self):\n    self.plan = plan.PLAN\n    plan.PLAN = 2\nx = object()\nx.plan = 3"
    assert hooks(parse({**HOUSE, "blocks/find.py": f"from .. import plan\n{within}"})) == []
