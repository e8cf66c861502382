"""The rules of the house, checked on the source: who may import whom, what is public, how long, and nothing patched.

Each rule is a function from a file's syntax tree to its violations, and is itself tried on a snippet that breaks it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "crossft"
PROGRAMS = [p for folder in ("experiments", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

FOUNDATION = {"errors", "types", "runs"}
MIDDLE = {"backbones", "data", "optim", "metrics"}
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),  # crossft/__init__.py
    "errors": set(),
    "types": {"errors"},
    "runs": {"errors"},
    "functional": FOUNDATION,
    **dict.fromkeys(MIDDLE, FOUNDATION | {"functional"}),
    "tasks": FOUNDATION | {"functional"} | MIDDLE,
    "callbacks": FOUNDATION | {"functional"} | MIDDLE | {"tasks"},
    "reports": {"errors", "runs"},
    "sweeps": {"errors", "runs"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT) | {"cli"}
MAX_LINES, MAX_TEST_LINES = 400, 600  # a table of bad input is long and has one job
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}
FOREIGN = {"trainer", "_trainer", "strategy", "_strategy", "fit_loop", "epoch_loop", "precision_plugin", "accelerator"}
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "unittest"}

Rule = Callable[[ast.Module], Iterator[str]]


def room(path: Path) -> str:
    """The room a module belongs to: ``data`` for crossft/data/mix.py, ``errors`` for crossft/errors.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def dotted(node: ast.AST) -> list[str]:
    """``a.b.c`` as ["a", "b", "c"]; calls and subscripts in between are looked through."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    if isinstance(node, ast.Call):
        return dotted(node.func)
    return dotted(node.value) if isinstance(node, ast.Subscript) else [""]


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            if node.module == "crossft":
                yield from (f"crossft.{alias.name}" for alias in node.names)


def imported_names(tree: ast.Module) -> set[str]:
    """The names that imports bind, anywhere in the file."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    return {(alias.asname or alias.name).split(".")[0] for node in nodes for alias in node.names}


def wrong_imports(tree: ast.Module, own: str) -> Iterator[str]:
    for name in imported_modules(tree):
        if name.startswith("."):
            yield f"relative import {name}: write crossft.{own}..."
        if not name.startswith("crossft."):
            continue
        other = name.split(".")[1]
        if other not in MAY_IMPORT[own] | {own, "__version__"}:
            yield f"{own} imports {other}"


def forbidden_imports(tree: ast.Module) -> Iterator[str]:
    """Modules that run what a file says; the errors that ``pickle`` raises may be named, to be caught."""
    uses = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and dotted(n.value) == ["pickle"]}
    only_errors = uses and all(name.endswith("Error") for name in uses)
    for name in imported_modules(tree):
        if name.split(".")[0] in FORBIDDEN_IMPORTS and not (name == "pickle" and only_errors):
            yield f"imports {name}"


def wrong_all(tree: ast.Module) -> Iterator[str]:
    """``__all__`` names what the module binds, and every public class and function it defines."""
    bound, defined, exported = set(imported_names(tree)), set(), None
    lazy: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            defined.add(node.name)
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
            lazy = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            bound.update(n.id for n in ast.walk(target or ast.Pass()) if isinstance(n, ast.Name))
        if isinstance(node, ast.Assign) and dotted(node.targets[0]) == ["__all__"]:
            exported = [n.value for n in getattr(node.value, "elts", []) if isinstance(n, ast.Constant)]
    if exported is None:
        if bound | defined:
            yield "has no __all__"
        return
    if len(exported) != len(set(exported)):
        yield "__all__ repeats a name"
    yield from (f"__all__ names {n}, which is not there" for n in exported if n not in bound | defined | lazy)
    yield from (f"{n} is not in __all__" for n in sorted(defined - set(exported)) if not n.startswith("_"))


def assigned(tree: ast.Module) -> Iterator[tuple[ast.Attribute, ast.expr | None]]:
    """Every ``x.y = value``, ``x.y += value`` and ``del x.y``."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            for part in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                if isinstance(part, ast.Attribute):
                    yield part, getattr(node, "value", None)


def patched(tree: ast.Module) -> Iterator[str]:
    """Assignments to imported names, to Lightning's own objects, or of functions to somebody else's attribute."""
    names = imported_names(tree)
    functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    rewraps = {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and "configure_ddp" in ast.dump(function)
        for inner in ast.walk(function)
    }
    for target, value in assigned(tree):
        chain = dotted(target)
        text = ".".join(chain)
        if chain[-2:] == ["strategy", "model"] and id(target) in rewraps:
            continue  # the one assignment of its kind: wrapping DDP again
        if chain == ["trainer", "should_stop"]:
            continue  # Lightning's documented way to end a fit
        if chain[0] in names:
            yield f"line {target.lineno}: assigns to {text}, which is imported"
        elif FOREIGN & set(chain[:-1]):
            yield f"line {target.lineno}: assigns to {text}, an attribute of Lightning's"
        elif chain[:-1] != ["self"] and (isinstance(value, ast.Lambda) or (value and dotted_name(value) in functions)):
            yield f"line {target.lineno}: replaces the function {text}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func)[-1] in {"setattr", "delattr", "__setattr__"} and node.args:
            first = dotted(node.args[1 if dotted(node.func)[0] == "type" else 0])
            if first != ["self"]:
                yield f"line {node.lineno}: setattr on {'.'.join(first)}"


def dotted_name(node: ast.expr) -> str:
    """A plain name, or the first argument of ``partial(name, ...)`` and ``MethodType(name, ...)``."""
    if isinstance(node, ast.Call) and dotted(node.func)[-1] in {"partial", "MethodType"} and node.args:
        node = node.args[0]
    return node.id if isinstance(node, ast.Name) else ""


def trainer_subclasses(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(dotted(base)[-1].endswith("Trainer") for base in node.bases):
            yield f"class {node.name} subclasses a Trainer"


def silenced(tree: ast.Module) -> Iterator[str]:
    """Bare ``except:``, and warnings silenced outside ``catch_warnings`` without naming a message or a module."""
    scoped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any("catch_warnings" in dotted(i.context_expr) for i in node.items):
            scoped.update(id(inner) for inner in ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: bare except"
        if not isinstance(node, ast.Call) or id(node) in scoped:
            continue
        narrow = len(node.args) > 1 or any(k.arg in {"message", "module"} for k in node.keywords)
        if dotted(node.func)[-1] == "simplefilter" or (dotted(node.func)[-1] == "filterwarnings" and not narrow):
            yield f"line {node.lineno}: silences warnings globally"


def unsafe_calls(tree: ast.Module) -> Iterator[str]:
    """Calls that run or unpickle what a file says."""
    froms = {n.module: {a.name for a in n.names} for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    bare_load = "load" in froms.get("torch", set())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if (name == ["torch", "load"] or (bare_load and name == ["load"])) and options.get("weights_only") is not True:
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if name[0] == "yaml" and name[-1] in {"load", "unsafe_load", "full_load"}:
            yield f"line {node.lineno}: yaml.{name[-1]} where safe_load belongs"
        yield from (
            f"line {node.lineno}: {option}=True"
            for option in ("trust_remote_code", "allow_pickle", "shell")
            if options.get(option) not in (None, False)
        )
        if name in (["eval"], ["exec"], ["os", "system"]) or name[-1] == "read_pickle":
            yield f"line {node.lineno}: {'.'.join(name)}"


def breaks(rule: Rule, paths: list[Path]) -> list[str]:
    return [f"{p.relative_to(ROOT)}: {found}" for p in paths for found in rule(ast.parse(p.read_text("utf-8")))]


@pytest.mark.parametrize(
    ("rule", "paths"),
    [
        (forbidden_imports, MODULES),
        (patched, MODULES + PROGRAMS),
        (trainer_subclasses, MODULES + PROGRAMS),
        (silenced, MODULES + PROGRAMS),
        (unsafe_calls, MODULES + PROGRAMS),
        (wrong_all, [p for p in MODULES if p.name == "__init__.py" or not p.name.startswith("_")]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_source_keeps_the_rule(rule: Rule, paths: list[Path]) -> None:
    found = breaks(rule, paths)
    assert not found, "\n".join(["", *found])


def test_rooms_import_one_way() -> None:
    unknown = {room(p) for p in MODULES} - set(MAY_IMPORT)
    assert not unknown, f"a room that MAY_IMPORT does not place: {unknown}"
    found = [line for p in MODULES for line in breaks(partial(wrong_imports, own=room(p)), [p])]
    assert not found, "\n".join(["", *found])


def test_files_are_short_and_named_for_what_they_do() -> None:
    assert len(MODULES) > 5
    lines = {p: len(p.read_text("utf-8").splitlines()) for p in MODULES + TESTS + PROGRAMS}
    limits = {p: MAX_TEST_LINES if p in TESTS else MAX_LINES for p in lines}
    assert not {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > limits[p]}
    assert not [str(p.relative_to(ROOT)) for p in lines if DRAWERS & {p.stem, *p.relative_to(ROOT).parts[:-1]}]


LIGHT = """
import contextlib, importlib, io, pkgutil, sys
heavy = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "timm", "transformers", "pandas", "matplotlib"}
loaded = lambda names: sorted(n for n in names if n in sys.modules)
import crossft.cli
sys.argv = ["crossft", "--help"]
out = io.StringIO()
with contextlib.redirect_stdout(out):
    try:
        crossft.cli.main()
    except SystemExit as end:
        assert end.code in (0, None), end.code
assert "fit" in out.getvalue(), out.getvalue()
assert not loaded(heavy), f"crossft --help imports {loaded(heavy)}"
import crossft.runs, crossft.errors
assert not loaded(heavy), f"crossft.runs imports {loaded(heavy)}"
import crossft
for room in sorted({"reports", "sweeps"} & {m.name for m in pkgutil.iter_modules(crossft.__path__)}):
    package = importlib.import_module(f"crossft.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"crossft.{room}."):
        importlib.import_module(module.name)
        assert not loaded(heavy - {"pandas", "matplotlib"}), f"{module.name} imports {loaded(heavy)}"
print("light")
"""


def test_help_runs_and_reports_start_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "light", done.stderr


BAD = [
    (forbidden_imports, "import pickle"),
    (forbidden_imports, "import pickle\npickle.loads(b'')\npickle.UnpicklingError"),
    (forbidden_imports, "from pickle import loads"),
    (forbidden_imports, "def f():\n    from unittest import mock"),
    (wrong_all, "def f(): ..."),
    (wrong_all, "__all__ = ['g']\ndef _f(): ..."),
    (wrong_all, "__all__ = ['f']\ndef f(): ...\nclass G: ..."),
    (wrong_all, "__all__ = ['f', 'f']\ndef f(): ..."),
    (patched, "import torch\ntorch.load = print"),
    (patched, "from timm.layers import Mlp\nMlp.forward = None"),
    (patched, "from a import B\ndel B.c"),
    (patched, "def f(model, value):\n    setattr(model, 'x', value)"),
    (patched, "def f(strategy, task):\n    strategy.setup_environment = task"),
    (patched, "class C:\n    def f(self):\n        self.trainer.strategy.model = self"),
    (patched, "def f(trainer):\n    trainer.fit_loop.max_epochs = 3"),
    (patched, "def g(): ...\ndef f(model):\n    model.forward = g"),
    (patched, "def f(model):\n    model.forward = lambda x: x"),
    (patched, "from functools import partial\ndef g(): ...\ndef f(model):\n    model.forward = partial(g, 1)"),
    (trainer_subclasses, "import lightning as L\nclass Mine(L.Trainer): ..."),
    (silenced, "import warnings\nwarnings.filterwarnings('ignore')"),
    (silenced, "from warnings import simplefilter\nsimplefilter('ignore')"),
    (silenced, "try:\n    f()\nexcept:\n    pass"),
    (unsafe_calls, "import torch\ntorch.load('x')"),
    (unsafe_calls, "from torch import load\nload('x', weights_only=False)"),
    (unsafe_calls, "f(trust_remote_code=True)"),
    (unsafe_calls, "import numpy as np\nnp.load('x', allow_pickle=True)"),
    (unsafe_calls, "import yaml\nyaml.load('x', Loader=yaml.Loader)"),
    (unsafe_calls, "eval('1')"),
]
GOOD = """
import pickle, warnings, torch
from a import B
__all__ = ["C", "f"]
class C:
    def f(self, parameter: B) -> None:
        self.x = torch.load("x", weights_only=True)
        parameter.grad = None
        object.__setattr__(self, "y", 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raise pickle.UnpicklingError
        warnings.filterwarnings("ignore", message="one known sentence")
def f(strategy, task):
    strategy.model = task
    strategy.configure_ddp()
"""


@pytest.mark.parametrize(("rule", "snippet"), BAD)
def test_rule_finds_what_it_forbids(rule: Rule, snippet: str) -> None:
    assert list(rule(ast.parse(snippet)))


@pytest.mark.parametrize("rule", [forbidden_imports, wrong_all, patched, trainer_subclasses, silenced, unsafe_calls])
def test_rule_lets_the_allowed_pass(rule: Rule) -> None:
    assert not list(rule(ast.parse(GOOD)))


@pytest.mark.parametrize(
    ("own", "line", "wrong"),
    [
        ("data", "from crossft.metrics import x", True),
        ("types", "import crossft.functional.kernels", True),
        ("callbacks", "def f():\n    from crossft.cli import main", True),
        ("callbacks", "from crossft.tasks import Task", False),
        ("tasks", "from crossft import callbacks", True),
        ("reports", "from crossft.types import Batch", True),
        ("data", "from .mix import x", True),
        ("callbacks", "from crossft.data import x", False),
        ("cli", "from crossft.reports import x", False),
        ("reports", "from crossft.runs import x\nfrom crossft import __version__", False),
    ],
)
def test_import_directions_are_told_apart(own: str, line: str, wrong: bool) -> None:
    assert bool(list(wrong_imports(ast.parse(line), own))) is wrong
