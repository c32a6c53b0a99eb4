"""The plugin refuses a vLLM it does not fit, says which version and what moved, and attaches wholly or not at all."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib import import_module
from inspect import getattr_static, signature
from pathlib import Path

import pytest
import vllm_environment  # noqa: F401

from reft_vllm.patches import PATCH_POINTS, RUNNER_POINTS, requirements
from reft_vllm.patching import Imports, PatchError, PatchPoint, Reads, check, problems
from reft_vllm.source import Tree, imported_from_vllm

MODULE = """
from vllm.other import imported

class Base:
    def inherited(self, request): ...

class Class(Base):
    field: int = 1

    def __init__(self):
        self.kept: int = 2

    @property
    def asked(self): ...

    @classmethod
    async def method(cls, request, *rest, option=None, **others): ...

if True:
    def conditional(new, form): ...
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A package named vllm with one module to attach to."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("from .shown import *\n")
    (package / "_version.py").write_text("__version__ = version = '9.8.7'\n")
    (package / "shown.py").write_text("def public(): ...\n")
    (package / "module.py").write_text(MODULE)
    (package / "other.py").write_text("def imported(one, two): ...\n")
    return Tree(tmp_path)


def point(attribute: str, parameters, **more) -> PatchPoint:
    return PatchPoint("vllm.module", attribute, parameters, lambda original: original, **more)


def test_the_installed_vllm_fits() -> None:
    assert problems(requirements(), Tree.installed()) == []
    assert len(requirements()) > 30


def test_source_files_say_what_python_says() -> None:
    """The check reads files; here against the imported functions themselves, before and after patching."""
    from reft_vllm.install import install

    install()
    import_module("vllm.v1.worker.cpu_worker")  # before the V2 runner, which needs its stand-ins for CUDA
    tree = Tree.installed()
    for one in (*PATCH_POINTS, *RUNNER_POINTS):
        owner = import_module(one.module)
        *path, name = one.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        function = getattr_static(owner, name)
        function = getattr(function, "__func__", function)
        found = [each for each in signature(function).parameters.values() if each.kind not in (each.VAR_POSITIONAL, 4)]
        assert tree.parameters(one.module, one.attribute) == tuple(each.name for each in found), str(one)


def test_patches_are_applied_once() -> None:
    from reft_vllm.install import install

    install()
    before = [each._find()[2] for each in PATCH_POINTS]
    for each in PATCH_POINTS:
        each.apply()
    assert [each._find()[2] for each in PATCH_POINTS] == before
    wraps = [getattr(found, "__func__", found)._reft_wraps for found in before]
    assert all(each.wrap in found for each, found in zip(PATCH_POINTS, wraps, strict=True))


def test_several_points_may_wrap_one_function(monkeypatch) -> None:
    module = types.ModuleType("vllm_stand_in")
    module.answer = lambda: 1
    monkeypatch.setitem(sys.modules, "vllm_stand_in", module)

    def plus(number: int):
        return lambda original: lambda: original() * 10 + number

    two, three = (PatchPoint("vllm_stand_in", "answer", (), plus(number)) for number in (2, 3))
    for each in (two, three, two, three):
        each.apply()
    assert module.answer() == 123
    with pytest.raises(PatchError, match="gone is not there"):
        PatchPoint("vllm_stand_in", "gone", (), plus(4)).apply()
    PatchPoint("vllm_stand_in", "gone", (), plus(4), optional="nothing").apply()


def test_nothing_of_the_v2_runner_is_imported_by_the_plugin() -> None:
    """On CPU it works only if its worker, with stand-ins for CUDA, is imported first."""
    script = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
print("reft_vllm.install" in sys.modules, [name for name in sys.modules if name.startswith("vllm.v1.worker.gpu.")])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert run.stdout.strip().endswith("True []"), run.stdout + run.stderr


def test_what_fits(tree: Tree) -> None:
    fitting = [
        point("Class.method", ("cls", "request")),
        point("Class.inherited", ("self", "request")),
        point("imported", ("one",)),
        point("conditional", {"1.0": ("old",), "2.0": ("new", "form")}),
        point("Class.gone", ("self",), optional="nothing is lost"),
        Reads("vllm.module", "Class", ("field", "kept", "asked", "inherited")),
        Imports("vllm.module", "imported"),
        Imports("vllm", "public"),
        Imports("vllm", "module"),
    ]
    assert problems(fitting, tree) == []
    check(fitting, tree)


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        (point("Class.gone", ("self",)), r"vllm\.module\.Class\.gone is not there"),
        (PatchPoint("vllm.gone", "f", (), lambda original: original), r"vllm\.gone\.f is not there"),
        (
            point("Class.method", ("cls", "adapter")),
            r"Class\.method takes \(cls, request, option\), expected \(cls, ad",
        ),
        (point("conditional", {"1.0": ("old",), "2.0": ("older",)}), r"expected \(old\) or \(older\)"),
        (point("imported", ("one", "two", "three"), optional="a form that is wrong counts"), "imported takes"),
        (Reads("vllm.module", "Class", ("kept", "lost", "missed")), r"vllm\.module\.Class has no lost, missed"),
        (Reads("vllm.module", "Gone", ("kept",)), r"vllm\.module\.Gone is not there"),
        (Imports("vllm.module", "elsewhere"), r"vllm\.module has no elsewhere"),
    ],
)
def test_what_moved_is_named_with_the_version(tree: Tree, requirement, said: str) -> None:
    with pytest.raises(PatchError, match=rf"does not fit vLLM 9\.8\.7: .*{said}.*VLLM_PLUGINS"):
        check([point("Class.method", ("cls",)), requirement], tree)


def test_every_difference_is_named_at_once(tree: Tree) -> None:
    with pytest.raises(PatchError, match="Class.one is not there; .*Class.two is not there"):
        check([point("Class.one", ()), point("Class.two", ())], tree)


def test_a_vllm_that_does_not_fit_is_left_as_it_is(tmp_path: Path) -> None:
    """A real process in which one function of vLLM has moved: nothing is patched, vLLM names the reason and ends."""
    script = """
import reft_vllm.patches.engine as engine
from reft_vllm.patching import PatchPoint
moved = PatchPoint("vllm.v1.engine.core", "EngineCore.admit_request", ("self", "request"), lambda original: original)
import reft_vllm.patches as patches
patches.PATCH_POINTS = (*patches.PATCH_POINTS, moved)
from reft_vllm.install import install
try:
    install()
except Exception as error:
    print(type(error).__name__, error)
import vllm.config.vllm as config
print("patched", hasattr(config.VllmConfig.compute_hash, "_reft_wraps"))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert "PatchError" in run.stdout and "EngineCore.admit_request is not there" in run.stdout, run.stderr
    assert Tree.installed().version in run.stdout
    assert "patched False" in run.stdout


def test_doctor_says_whether_the_installed_vllm_fits(monkeypatch, tree: Tree) -> None:
    from reft_vllm import patches, plugin

    def finding():
        found = []
        plugin.reft_diagnose(found.append)
        return next(one for one in found if one.name == "vllm patch points")

    assert finding().status == "ok" and Tree.installed().version in finding().detail
    monkeypatch.setattr(Tree, "installed", lambda: tree)
    assert finding().status == "broken" and "9.8.7 differs" in finding().detail and finding().todo
    monkeypatch.setattr(patches, "requirements", lambda: (point("conditional", ("new",)),))
    assert finding().status == "ok"


def test_the_check_does_not_import_vllm() -> None:
    script = (
        "import sys; from reft_vllm.patches import requirements; from reft_vllm.patching import problems; "
        "from reft_vllm.source import Tree; print(problems(requirements(), Tree.installed()), 'vllm' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert run.stdout.strip() == "[] False", run.stderr


def test_imports_in_alternatives_are_left_to_them(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "from vllm.a import x\ndef f():\n    from vllm.b import y\n    try:\n        from vllm.new import z\n"
        "    except ImportError:\n        from vllm.old import z\nimport vllm\nfrom other import x\n"
    )
    assert imported_from_vllm(tmp_path) == [("vllm.a", "x"), ("vllm.b", "y")]
