"""What the plugin needs of each supported version of vLLM, recorded, so that no test has to download them.

To record again, after adding patch points or for a new version (downloads a wheel of 100 to 400 MB for each):

    PYTHONPATH=integrations python tests/recorded_vllm.py [VERSION ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reft_vllm.patches import requirements
from reft_vllm.patching import Imports, PatchPoint, Reads, Requirement
from reft_vllm.source import Source, Tree

TABLE = Path(__file__).with_name("recorded_vllm.json")


class NotRecordedError(LookupError):
    """The plugin asks for something that nobody looked up when the table was made."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not in {TABLE.name}; record it: see {Path(__file__).name}")


class Recorded:
    """`Source` of one version in the table.

    Attributes:
        parameters_: by `module:attribute`, by version from which they are so; None where there is no such function.
        absent: by `module:name` or `module:class.attribute`, the versions that do not have it.
    """

    def __init__(self, table: Mapping[str, Any], version: str) -> None:
        self._versions: list[str] = table["versions"]
        self._parameters, self._absent = table["parameters"], table["absent"]
        self.version = version

    def parameters(self, module: str, attribute: str) -> tuple[str, ...] | None:
        forms = self._look_up(self._parameters, f"{module}:{attribute}")
        until_now = self._versions[: self._versions.index(self.version) + 1]
        form = forms[[version for version in until_now if version in forms][-1]]
        return None if form is None else tuple(form)

    def attributes(self, module: str, name: str) -> frozenset[str] | None:
        start = f"{module}:{name}."
        asked = {key.removeprefix(start): absent for key, absent in self._absent.items() if key.startswith(start)}
        if not asked:
            raise NotRecordedError(start)
        return frozenset(attribute for attribute, absent in asked.items() if self.version not in absent)

    def has(self, module: str, name: str) -> bool:
        return self.version not in self._look_up(self._absent, f"{module}:{name}")

    def _look_up(self, part: Mapping[str, Any], key: str) -> Any:
        if key not in part:
            raise NotRecordedError(key)
        return part[key]


def table_of(sources: Mapping[str, Source], needed: Iterable[Requirement]) -> dict[str, Any]:
    """The table of some versions, in ascending order."""
    parameters: dict[str, dict[str, Any]] = {}
    absent: dict[str, list[str]] = {}
    for requirement in needed:
        if isinstance(requirement, PatchPoint):
            forms = parameters[f"{requirement.module}:{requirement.attribute}"] = {}
            for version, source in sources.items():
                form = source.parameters(requirement.module, requirement.attribute)
                if not forms or list(forms.values())[-1] != form:
                    forms[version] = form
        elif isinstance(requirement, Reads):
            held = {each: one.attributes(requirement.module, requirement.name) or () for each, one in sources.items()}
            for attribute in requirement.attributes:
                missing = [version for version, found in held.items() if attribute not in found]
                absent[f"{requirement.module}:{requirement.name}.{attribute}"] = missing
        elif isinstance(requirement, Imports):
            module, name = requirement.module, requirement.name
            absent[f"{module}:{name}"] = [each for each, one in sources.items() if not one.has(module, name)]
    return {"versions": list(sources), "parameters": parameters, "absent": absent}


def write(table: Mapping[str, Any]) -> None:
    """Save a table, an entry a line."""
    parts = [f' "versions": {json.dumps(table["versions"])}']
    for part in ("parameters", "absent"):
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table[part].items())]
        parts.append(f' "{part}": {{\n' + ",\n".join(lines) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def read() -> dict[str, Any]:
    """The saved table."""
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def download(version: str, folder: Path) -> Tree:
    """The Python files of a version's wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"vllm=={version}"], check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])
    wheel.unlink()
    return Tree(folder)


def main(versions: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = {version: download(version, Path(folder) / version) for version in versions}
        write(table_of(sources, requirements()))


if __name__ == "__main__":
    main(sys.argv[1:] or read()["versions"])
