"""Manifests of the deployment examples: what they hand to vLLM and to this project's own commands is understood there.

No cluster is asked; whether the chart accepts its values is for `helm template` to say.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_environment  # noqa: F401
import yaml
from strong_adapters import strong_loreft

from reft_plugins.references import resolve
from reft_vllm.settings import Settings

FOLDER = Path(__file__).parents[2] / "examples" / "kubernetes"


def documents(name: str) -> list[dict]:
    return [document for document in yaml.safe_load_all((FOLDER / name).read_text()) if document]


@pytest.fixture(scope="module")
def engine() -> dict:
    (model,) = documents("values.yaml")[0]["servingEngineSpec"]["modelSpec"]
    return model


def command(engine: dict) -> list[str]:
    """What the chart's template makes of a model's values, as far as it concerns vLLM's command line."""
    config = engine["vllmConfig"]
    named = {"maxModelLen": "--max-model-len", "dtype": "--dtype", "maxLoras": "--max_loras"}
    line = ["--model", engine["modelURL"], *(["--enable-lora"] if engine["enableLoRA"] else [])]
    line.append("--enable-prefix-caching" if config["enablePrefixCaching"] else "--no-enable-prefix-caching")
    for key, option in named.items():
        line += [option, str(config[key])]
    return [*line, *config["extraArgs"]]


def test_engines_understand_their_command_line(engine) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert all(isinstance(argument, str) for argument in engine["vllmConfig"]["extraArgs"])
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(command(engine))
    assert arguments.enable_lora and arguments.enable_prefix_caching
    assert arguments.max_cpu_loras >= arguments.max_loras
    assert [module.path for module in arguments.lora_modules] == ["french:prod", "tone:v2"]
    settings = Settings.of(arguments.additional_config)
    assert "block_output" in settings.sites
    assert arguments.additional_config == json.loads(json.dumps({"reft": {"sites": sorted(settings.sites)}}))


def test_engines_and_job_share_the_store(engine) -> None:
    environment = {variable["name"]: variable.get("value") for variable in engine["env"]}
    (mount,) = engine["extraVolumeMounts"]
    (volume,) = engine["extraVolumes"]
    claim, job = documents("store.yaml")
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert environment["REFT_STORE"] == mount["mountPath"] == container["env"][0]["value"]
    assert mount["name"] == volume["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "pods of several nodes read it"
    assert f"{engine['repository']}:{engine['tag']}" == container["image"]


def test_the_job_publishes_what_the_engines_serve(engine, tiny_llama, tmp_path, monkeypatch) -> None:
    """Its own script, on folders of this machine."""
    _, job = documents("store.yaml")
    container = job["spec"]["template"]["spec"]["containers"][0]
    strong_loreft(tiny_llama, "f1", seed=1).save(tmp_path / "adapters" / "french")
    script = container["args"][0].replace("/adapters/", f"{tmp_path}/adapters/")
    monkeypatch.setenv("REFT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    subprocess.run([*container["command"], script], check=True, timeout=120)
    assert "french=french:prod" in engine["vllmConfig"]["extraArgs"]
    assert (resolve("french:prod") / "adapter.json").is_file()


def test_adapters_loaded_later_are_store_references_for_this_model(engine) -> None:
    (adapter,) = documents("lora-adapter.yaml")
    source = adapter["spec"]["adapterSource"]
    assert adapter["spec"]["baseModel"] == engine["name"], "the controller finds pods by the label model"
    assert source["type"] == "local" and source["adapterPath"].startswith(f"{source['adapterName']}:")
    assert any(variable["name"] == "VLLM_ALLOW_RUNTIME_LORA_UPDATING" for variable in engine["env"])
    assert documents("values.yaml")[0]["loraController"]["enableLoraController"] is True
