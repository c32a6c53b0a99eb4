"""Every supported version of vLLM has what the plugin needs, in one of the forms it knows."""

from __future__ import annotations

import json

import pytest
import vllm_environment  # noqa: F401
from recorded_vllm import NotRecordedError, Recorded, read, table_of

from reft_vllm.patches import requirements
from reft_vllm.patching import Imports, PatchError, PatchPoint, Reads, check, problems
from reft_vllm.source import Tree

VERSIONS = ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
PREPARE = "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs"


@pytest.mark.parametrize("version", VERSIONS)
def test_supported_versions_fit(version) -> None:
    assert problems(requirements(), Recorded(read(), version)) == []


def test_versions_differ_where_it_matters() -> None:
    """The forms in which V2 prepares a batch; a table with the same lines for all versions would prove nothing."""
    table = read()
    assert tuple(table["versions"]) == VERSIONS
    assert [len(form) for form in table["parameters"][PREPARE].values()] == [3, 4, 5]


def test_the_table_tells_the_truth_of_the_installed_version() -> None:
    installed = Tree.installed()
    assert installed.version in VERSIONS
    recorded = table_of({installed.version: Recorded(read(), installed.version)}, requirements())
    found = table_of({installed.version: installed}, requirements())
    assert json.dumps(recorded) == json.dumps(found)


def moved(part: str, key: str, value):
    table = read()
    assert key in table[part]
    table[part][key] = value
    return table


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("parameters", PREPARE, {"0.26.0": None}, "GPUModelRunner.prepare_inputs is not there"),
        (
            "parameters",
            PREPARE,
            {"0.26.0": ["self", "batch_desc", "scheduler_output"]},
            r"takes \(self, batch_desc, scheduler_output\), expected \(self, scheduler_output, batch_desc\) or \(",
        ),
        (
            "absent",
            "vllm.v1.worker.gpu.states:RequestState.prompt_len",
            ["0.33.0"],
            "RequestState has no prompt_len",
        ),
        ("absent", "vllm.lora.lora_model:LoRAModel", ["0.33.0"], "vllm.lora.lora_model has no LoRAModel"),
    ],
    ids=["moved", "other parameters", "renamed attribute", "moved class"],
)
def test_a_version_in_which_something_moved_is_refused(part, key, value, said) -> None:
    with pytest.raises(PatchError, match=f"does not fit vLLM 0.33.0: .*{said}"):
        check(requirements(), Recorded(moved(part, key, value), "0.33.0"))


def test_what_nobody_looked_up_is_not_taken_for_granted() -> None:
    known = Recorded(read(), "0.33.0")
    asked = (
        PatchPoint("vllm.new", "point", (), lambda original: original),
        Reads("vllm.new", "Class", ("attribute",)),
        Imports("vllm.new", "name"),
    )
    for requirement in asked:
        with pytest.raises(NotRecordedError, match="recorded_vllm"):
            requirement.problem(known)
