"""``crossft list methods|backbones|tasks``: found in the packages' source, so nothing heavy is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import crossft
from crossft.errors import ConfigError

__all__ = ["Entry", "found", "run"]

Entry = tuple[str, str, str]
"""Name, class path, and the first sentence of the docstring with the paper."""

_ROOT = Path(crossft.__file__).parent
KINDS = {
    "methods": sorted(p for p in (_ROOT / "callbacks").glob("*/__init__.py") if p.parent.name != "monitoring"),
    "backbones": [_ROOT / "backbones" / "__init__.py"],
    "tasks": [_ROOT / "tasks" / "__init__.py"],
}
_ABSTRACT = {"Backbone", "MethodCallback", "PublishedWeights", "Task"}
_BASES = {"methods": "Callback", "backbones": "Backbone", "tasks": "Task"}


def run(command: str, arguments: list[str]) -> int:
    """Print one line an entry."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: crossft list methods|backbones|tasks\n\nOne line each: name, class path, what it is, paper.")
        return 0 if arguments else 2
    if arguments[0] not in KINDS or len(arguments) > 1:
        raise ConfigError(f"crossft list {' '.join(arguments)}: choose one of {', '.join(KINDS)}")
    entries = list(found(arguments[0]))
    widths = [max((len(entry[i]) for entry in entries), default=0) for i in (0, 1)]
    for name, path, text in entries:
        print(f"{name:<{widths[0]}}  {path:<{widths[1]}}  {text}")
    if arguments[0] == "methods":
        print("\nswitch one on with --methods.NAME CLASS_PATH, set it with --methods.NAME.ARGUMENT=VALUE")
    return 0


def found(kind: str) -> Iterator[Entry]:
    """Every public class of a kind, by walking the ``__all__`` of its packages; helpers of other kinds are left out."""
    room = _ROOT / KINDS[kind][0].relative_to(_ROOT).parts[0]
    classes = {
        node.name: node
        for file in sorted(room.rglob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    for init in KINDS[kind]:
        package = ".".join(init.parent.relative_to(_ROOT.parent).parts)
        for name in _exported(init):
            node = classes.get(name)
            if node is not None and name not in _ABSTRACT and _is_a(node, classes, _BASES[kind]):
                text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                yield name, f"{package}.{name}", text


def _exported(init: Path) -> list[str]:
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def _is_a(node: ast.ClassDef, classes: dict[str, ast.ClassDef], base: str) -> bool:
    names = [b.id for b in node.bases if isinstance(b, ast.Name)]
    return base in names or any(n in classes and _is_a(classes[n], classes, base) for n in names)
