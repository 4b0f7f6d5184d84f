"""Imports run downwards only: the rules of ARCHITECTURE.md, read from the source of every module.

`ROOMS` is the whole rule: a room is a package or a top-level module of `gateway`, and may import itself and
what stands beside it. Imports inside functions and under TYPE_CHECKING count like any other. The rest are
rules on foreign packages, on file names, and on cycles between modules (those that exist at run time).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
BASE = {"errors", "core"}
SHELL = BASE | {"observe", "registry", "backends.interface"}
EVERYTHING = {"*"}

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "extras": set(),
    "core": {"errors"},
    "protocol": BASE,
    "observe": BASE,
    "provenance": BASE,
    "workers": BASE | {"protocol", "observe"},
    "backends": BASE | {"workers", "protocol", "observe"},
    "registry": BASE | {"provenance", "protocol", "workers.bundle"},
    "inference_log": BASE | {"observe", "provenance"},
    "dispatcher": SHELL,
    "scheduler": SHELL | {"dispatcher"},
    "loading": SHELL | {"backends.one_shot", "backends.binding", "protocol"},
    "intake": BASE | {"observe"},
    "response_cache": BASE | {"observe"},
    "shared_memory": BASE,
    "ensemble": SHELL | {"loading"},
    "sequence_scheduler": SHELL | {"scheduler", "dispatcher", "backends.slotted"},
    "catalog": SHELL | {"scheduler", "sequence_scheduler", "loading", "intake", "ensemble"},
    "remote": SHELL | {"backends", "catalog", "loading", "config"},
    "traffic": SHELL | {"catalog", "ensemble", "sequence_scheduler", "provenance"},
    "variants": BASE | {"catalog", "traffic", "loading", "plan", "config", "registry", "observe"},
    "pipeline": BASE | {"scheduler", "catalog", "response_cache", "observe", "provenance"},
    "releases": SHELL | {"plan", "catalog", "loading", "config"},
    "management": BASE
    | {"plan", "catalog", "scheduler", "sequence_scheduler", "loading", "config", "registry", "protocol", "observe"}
    | {"shared_memory", "releases"},
    "ingress": BASE
    | {"pipeline", "catalog", "management", "protocol", "observe", "provenance", "inference_log.handover"},
    "prober": SHELL | {"backends.one_shot", "catalog", "scheduler", "sequence_scheduler"},
    "agreement": SHELL | {"catalog", "dispatcher", "scheduler"},
    "operations": BASE
    | {
        "variants",
        "releases",
        "pipeline",
        "catalog",
        "protocol",
        "observe",
        "provenance",
        "console",
        "inference_log.feedback",
    },
    "console": BASE | {"pipeline", "catalog", "protocol", "observe"},
    "config": BASE | {"protocol", "registry", "extras"},
    "client": BASE | {"protocol", "provenance"},
    "demo": BASE | {"client", "config", "protocol", "provenance", "registry"},
    "plan": BASE | {"catalog", "loading", "ensemble", "config", "provenance", "registry"},
    "terminal": BASE | {"catalog", "provenance"},
    "conversion": BASE | {"workers", "provenance"},
    "cli": BASE
    | {
        "extras",
        "conversion",
        "app",
        "client",
        "config",
        "demo",
        "inference_log",
        "provenance",
        "protocol",
        "registry",
        "supervisor",
        "side_threads",
        "terminal",
    },
    "app": EVERYTHING,
    "supervisor": EVERYTHING,
    "__main__": {"cli"},
    "__init__": set(),
    "side_threads": set(),
}
"""A module is in the room its name begins with: `config_schema` is in `config`, `cli_models` in `cli`."""

ONLY_IN: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("workers/session.py",),
    "tritonclient": (),
    "grpc": (),
    "aiohttp.web": ("operations.py", "console/"),
    "grpc_tools": ("protocol/schema/compile.py",),
    "google.protobuf": ("protocol/",),
    "onnx": ("demo/train.py", "demo/layers.py"),
    "sklearn": ("demo/train.py", "conversion_process.py"),
    "yaml": ("config", "registry/mlmodel.py"),
    "pickle": (),
    "_pickle": (),
    "cloudpickle": (),
    "dill": (),
    "marshal": (),
    "shelve": (),
    "joblib": ("conversion_process.py",),
    "skl2onnx": ("conversion_process.py",),
    "multiprocessing": (),
    "torch": (),
}
"""Foreign packages and the only places, below `gateway/`, that may import them."""

IMPURE = {"asyncio", "time", "random", "secrets", "socket", "threading", "uvloop"}
NOT_IN: dict[str, set[str]] = {
    "core/": IMPURE | {"logging", "os", "pathlib"},
    "protocol/": IMPURE,
    "workers/process.py": {"asyncio", "uvloop", "aiohttp"},
    "workers/session.py": {"asyncio", "uvloop", "aiohttp"},
}
"""What pure and sans-I/O code must do without. Time and chance are arguments."""

DYNAMIC = {"import_module", "__import__"}
COMPUTED = "<a name computed at run time>"
FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "common", "manager", "handler", "base"}


def modules(root: Path) -> dict[str, Path]:
    """Module path below the package (`core/tensor.py`) → file."""
    return {str(p.relative_to(root)): p for p in sorted(root.rglob("*.py"))}


class _Runtime(ast.NodeTransformer):
    """Drops what stands under `if TYPE_CHECKING`."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:  # the base class's naming
        self.generic_visit(node)
        return node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else node


def imports(file: Path, inside: str, *, at_run_time: bool = False) -> Iterator[str]:
    """Absolute dotted names a file imports; `inside` is its package, for relative imports."""
    tree: ast.AST = ast.parse(file.read_text(), str(file))
    for node in ast.walk(_Runtime().visit(tree) if at_run_time else tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                start = _start(inside, module, level)
                yield from (f"{start}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Attribute(attr=called) | ast.Name(id=called)) if called in DYNAMIC:
                constants = (a.value for a in node.args if isinstance(a, ast.Constant))
                yield from [c for c in constants if isinstance(c, str)] or [COMPUTED]


def _start(inside: str, module: str | None, level: int) -> str:
    """Prefix of a `from` import: one dot is the file's own package, each further one its parent."""
    above = inside.rsplit(".", level - 1)[0] if level else ""
    return ".".join(part for part in (above, module) if part)


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room_of(module: str) -> str:
    """`core/tensor.py` → core; `cli_models.py` → cli; unknown names are their own room."""
    first = module.split("/", 1)[0].removesuffix(".py")
    prefix = first.split("_", 1)[0]
    return prefix if first not in ROOMS and prefix in ROOMS else first


def dotted(module: str) -> str:
    return module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def violations(root: Path) -> list[str]:
    """Every broken rule in the package at `root`, as text."""
    files = modules(root)
    found = [*_bad_names(files), *_cycles(root, files)]
    for module, file in files.items():
        for name in imports(file, ".".join(["gateway", *module.split("/")[:-1]])):
            found += _room_violations(root, module, name)
            found += _foreign_violations(module, name)
    return found


def _room_violations(root: Path, module: str, name: str) -> list[str]:
    if not is_below(name, "gateway"):
        return []
    target = name.removeprefix("gateway").removeprefix(".")
    first = target.split(".")[0]
    if not first or not ((root / first).is_dir() or (root / f"{first}.py").is_file()):
        return []  # the package itself, gateway.__version__ and the like
    room, other = room_of(module), room_of(first + ".py")
    if room not in ROOMS:
        return [f"{module}: the room {room!r} has no rule"]
    allowed = ROOMS[room] | {room}
    if other in allowed or allowed & EVERYTHING or any("." in a and is_below(target, a) for a in allowed):
        return []
    return [f"{module}: {room} must not import {name}"]


def _foreign_violations(module: str, name: str) -> list[str]:
    found = []
    for package, places in ONLY_IN.items():
        if is_below(name, package) and not module.startswith(places):
            found.append(f"{module}: {package} may be imported only by {', '.join(places) or 'nobody'}")
    for place, banned in NOT_IN.items():
        if module.startswith(place):
            found += [f"{module}: {b} does not belong in {place}" for b in banned if is_below(name, b)]
    if name == COMPUTED:
        found.append(f"{module}: imports {COMPUTED}")
    return found


def _bad_names(files: dict[str, Path]) -> list[str]:
    seen: dict[str, str] = {}
    found = []
    for module in files:
        parts = module.removesuffix(".py").split("/")
        stem = parts[-1]
        if stem in ("__init__", "__main__"):
            stem = parts[-2] if len(parts) > 1 else ""
        if not stem:
            continue
        if stem in seen:
            found.append(f"{module}: has the same name as {seen[stem]}")
        if stem in sys.stdlib_module_names:
            found.append(f"{module}: shadows a module of the standard library")
        if stem in FORBIDDEN_NAMES:
            found.append(f"{module}: {stem!r} says nothing about what the file decides")
        seen[stem] = module
    return found


def _cycles(root: Path, files: dict[str, Path]) -> list[str]:
    names = {f"gateway.{dotted(m)}" if m != "__init__.py" else "gateway": m for m in files}
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        inside = ".".join(["gateway", *module.split("/")[:-1]])
        wanted = set()
        for name in imports(file, inside, at_run_time=True):
            target = names.get(name) or names.get(name.rpartition(".")[0])
            if target and target != module:
                wanted.add(target)
        graph[module] = wanted
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"imports go round in a circle: {' → '.join(error.args[1])}"]
    return []


def test_the_gateway_keeps_every_rule() -> None:
    found = violations(REPOSITORY / "gateway")
    assert not found, "\n" + "\n".join(found)


def test_the_rules_see_the_whole_gateway() -> None:
    files = modules(REPOSITORY / "gateway")
    assert {"core/tensor.py", "errors.py", "backends/interface.py"} <= set(files)
    assert {room_of(m) for m in files} <= set(ROOMS)


PLANTED = [
    ("core/tensor.py", "import asyncio", "asyncio does not belong in core/"),
    ("core/tensor.py", "from time import monotonic", "time does not belong in core/"),
    ("core/tensor.py", "if TYPE_CHECKING:\n    import gateway.app", "core must not import gateway.app"),
    ("core/tensor.py", "from gateway.protocol import http1", "core must not import gateway.protocol"),
    ("core/tensor.py", "from ..protocol import http1", "core must not import gateway.protocol"),
    ("core/tensor.py", "def f():\n    import gateway.protocol", "core must not import gateway.protocol"),
    ("protocol/http1.py", "import asyncio.streams", "asyncio does not belong in protocol/"),
    ("scheduler.py", "from gateway.backends.onnx import X", "scheduler must not import gateway.back"),
    ("ingress/listener.py", "from gateway.workers.pool import P", "ingress must not import gateway.workers"),
    ("ingress/listener.py", "from aiohttp import web", "aiohttp.web may be imported only by"),
    ("app.py", "import onnxruntime as ort", "onnxruntime may be imported only"),
    ("app.py", "import importlib\nimportlib.import_module('pickle')", "pickle may be imported only by"),
    ("app.py", "import importlib as i\ni.import_module(input())", "imports <a name computed at run time>"),
    ("app.py", "from multiprocessing import shared_memory", "multiprocessing may be imported only by"),
    ("app.py", "import grpc.aio", "grpc may be imported only by nobody"),
    ("workers/process.py", "import asyncio", "asyncio does not belong in workers/process.py"),
    ("workers/tensor.py", "", "has the same name as core/tensor.py"),
    ("workers/queue.py", "", "shadows a module of the standard library"),
    ("workers/helpers.py", "", "says nothing about what the file decides"),
    ("attic/thing.py", "import gateway.core", "the room 'attic' has no rule"),
    ("protocol/http1.py", "import gateway.protocol.http1_head", "imports go round in a circle"),
]

GOOD = {
    "__init__.py": "",
    "app.py": "from gateway.scheduler import S\nfrom gateway.workers.pool import P",
    "scheduler.py": "import asyncio\nfrom gateway.backends.interface import R\nfrom gateway.core import x",
    "backends/interface.py": "from gateway.core.tensor import T",
    "backends/onnx.py": "from gateway.workers.pool import P",
    "core/tensor.py": "import numpy",
    "ingress/listener.py": "import asyncio\nimport gateway.protocol.http1",
    "protocol/http1.py": "from gateway.core.tensor import T",
    "protocol/http1_head.py": "from gateway.protocol.http1 import H",
    "workers/hosting.py": "if TYPE_CHECKING:\n    from gateway.workers.pool import P",
    "workers/pool.py": "import asyncio\nfrom gateway.workers import hosting",
    "workers/process.py": "import numpy",
    "workers/session.py": "import onnxruntime",
    "operations.py": "from aiohttp import web",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for module, source in files.items():
        path = root / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")
    return root


def test_a_good_tree_passes(tmp_path: Path) -> None:
    assert violations(plant(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("module", "source", "expected"), PLANTED)
def test_a_planted_violation_is_named(tmp_path: Path, module: str, source: str, expected: str) -> None:
    found = violations(plant(tmp_path, GOOD | {module: GOOD.get(module, "") + "\n" + source}))
    assert any(expected in text and module in text for text in found), found
