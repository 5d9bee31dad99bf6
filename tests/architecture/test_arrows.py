"""The arrows between rooms, as a literal table: a room imports the rooms listed for it and no others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "quire"
NOTHING: set[str] = set()

# A room is a folder or file directly under quire/; the two torch-free files of models/ are rooms of their own.
ALLOWED: dict[str, set[str]] = {
    "errors": NOTHING,
    "batch": NOTHING,
    "metrics": NOTHING,
    "presets": {"errors"},
    "envs": {"errors"},
    "log": {"envs"},
    "speculation": {"errors"},
    "config": {"errors", "speculation"},
    "request": {"errors", "presets"},
    "text": {"errors", "request"},
    "ops": {"envs", "errors"},
    "layers": {"batch", "ops"},
    "models.config": {"errors", "layers"},
    "models.registry": {"errors", "models.config", "models"},
    "models": {"batch", "layers", "models.config", "ops"},
    "quant": {"batch", "errors", "layers", "models", "models.config", "ops"},
    "scheduler": {"errors", "request", "speculation"},
    "sampling": {"errors", "ops", "request"},
    "weights": {"envs", "errors", "log", "models", "models.config", "quant"},
    "plan": {"config", "envs", "errors", "models.config", "presets", "quant"},  # of quant, what knows no torch
    "lora": {"batch", "errors", "layers", "log", "models", "models.config", "models.registry", "ops", "weights"},
    "merging": {
        "assemble", "envs", "errors", "log", "lora", "models", "models.config", "models.registry", "plan", "quant", "text",
        "weights",
    },
    "datasets": {"errors"},
    "assemble": {"models", "models.config", "models.registry", "quant", "weights"},
    "engine": {
        "assemble", "batch", "config", "errors", "log", "lora", "metrics", "models", "models.config", "models.registry",
        "ops", "plan", "presets", "request", "sampling", "scheduler", "speculation", "text", "weights",
    },
    "train": {
        "assemble", "batch", "config", "envs", "errors", "layers", "log", "lora", "models", "models.config", "models.registry",
        "ops", "plan", "quant", "text", "weights",
    },
    "service": {
        "config", "engine", "errors", "log", "lora", "metrics", "plan", "presets", "request", "text", "train", "weights",
    },
    "server": {"config", "errors", "log", "metrics", "presets", "request", "service", "envs"},
    "embedded": NOTHING,
}  # fmt: skip
# The command line may use every room, but each command imports it inside.
DOOR = "cli"


def room_of(parts: tuple[str, ...]) -> str:
    """("models", "config") -> "models.config"; ("text", "chat") -> "text"."""
    return ".".join(parts[:2]) if parts[:2] in (("models", "config"), ("models", "registry")) else parts[0]


def imports(path: Path) -> Iterator[str]:
    """Rooms that a file imports, at its top or inside a function, for typing or for running."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"quire.{alias.name}" for alias in node.names] if node.module == "quire" else [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "quire" and len(parts) > 1 and parts[1] != "__version__":
                yield room_of(parts[1:])


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_import_follows_an_arrow() -> None:
    wrong = []
    for path in files():
        room = room_of(path.relative_to(PACKAGE).with_suffix("").parts)
        if room == DOOR:
            continue
        assert room in ALLOWED, f"{room} is a new room: give it its arrows"
        strange = set(imports(path)) - ALLOWED[room] - {room}
        wrong += [f"{path.relative_to(PACKAGE)} imports {other}" for other in sorted(strange)]
    assert not wrong, wrong


def test_the_table_itself_has_no_cycle() -> None:
    # models.registry names the family files as strings; that models uses models.config is an arrow within the folder.
    order: list[str] = []
    left = {room: set(others) - {room} for room, others in ALLOWED.items()}
    while left:
        free = [room for room, others in left.items() if not others & set(left)]
        assert free, f"a cycle among {sorted(left)}"
        order += free
        for room in free:
            del left[room]
    assert set(order) == set(ALLOWED)


def test_only_the_door_imports_the_door() -> None:
    assert not [path for path in files() if "cli" not in path.parts and DOOR in set(imports(path))]


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_runs_code_from_data(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"line {node.lineno}: {node.func.id}()"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            # Only the exception class may be named: torch.load(weights_only=True) raises it.
            assert not name.startswith("pickle.") or name == "pickle.UnpicklingError", f"line {node.lineno}: {name}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True", f"line {node.lineno}: torch.load without weights_only=True"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            pytest.fail(f"trust_remote_code at line {node.value.lineno}")
