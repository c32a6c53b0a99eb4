from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
from strong_adapters import strong_loreft

import reft_plugins as reft
from reft_plugins import cli
from reft_plugins.errors import ReftWarning


def task(path: Path) -> Path:
    rows = [{"prompt": f"the {word}", "completion": " garden"} for word in ("dog", "cat", "fox", "bird")]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def adapter_at(base: Path, directory: Path, positions: str = "f1+l1", **settings: Any) -> Path:
    return strong_loreft(base, positions, seed=1, **settings).save(directory)


PROBE = """
import resource, sys
sys.argv = ["reft", *{arguments!r}]
from reft_plugins.cli import main
try:
    main()
except SystemExit as exit_:
    assert not exit_.code, exit_.code
heavy = {{"torch", "transformers", "vllm", "numpy", "pydantic", "gguf"}} & set(sys.modules)
used = resource.getrusage(resource.RUSAGE_SELF)
print(sorted(heavy), used.ru_utime + used.ru_stime, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["export", "--help"], ["store", "--help"]])
def test_help_is_quick_and_imports_nothing_heavy(arguments: list[str]) -> None:
    """Seconds of processor time, not of the clock: other work on the machine must not fail this."""
    command = [sys.executable, "-c", PROBE.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    heavy, seconds = done.stderr.strip().splitlines()[-1].rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) <= 0.5
    assert "Example:" in done.stdout


def test_every_command_has_an_example(run: Any) -> None:
    assert run("--help").code == 0
    commands = cli.cli.commands
    assert {"train", "generate", "import", "inspect", "plugins", "doctor", "export", "store", "serve"} <= set(commands)
    for name in ("train", "generate", "import", "convert", "inspect", "plugins", "doctor", "export"):
        outcome = run(name, "--help")
        assert outcome.code == 0 and "Example: reft " + name in outcome.out, name


def test_warnings_of_ours_are_one_line_and_others_stay(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> None:
        warnings.warn("ours\nstays \x1b[31m", ReftWarning, stacklevel=2)
        warnings.warn("theirs", RuntimeWarning, stacklevel=2)

    monkeypatch.setitem(cli.cli.commands, "warn", click.Command("warn", callback=warn))
    with pytest.warns(RuntimeWarning) as seen:
        outcome = run("warn")
    assert outcome.code == 0
    assert outcome.err == "reft: warning: ours stays ?[31m\n"
    assert [str(each.message) for each in seen] == ["theirs"]


def test_the_version_is_the_packages(run: Any) -> None:
    assert run("--version").out.strip().endswith(reft.__version__)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train"],
        ["train", "BASE", "--out", "o"],
        ["train", "BASE", "--out", "o", "--data", "d", "--layers", "first"],
        ["train", "BASE", "--out", "o", "--data", "d", "--epochs", "many"],
        ["train", "BASE", "--out", "o", "--data", "d", "--set", "novalue"],
        ["train", "BASE", "--out", "o", "--data", "d", "--set", "a=1", "--set", "a=2"],
        ["train", "BASE", "--out", "o", "--data", "d", "--rank", "4", "--set", "rank=8"],
        ["train", "BASE", "--out", "o", "--data", "d", "--set", "seed=8"],
        ["generate", "BASE"],
        ["generate", "BASE", "--prompt", "a", "--adapter", "x", "--adapter", "y"],
        ["generate", "BASE", "--prompt", "a", "--max-new-tokens", "0"],
        ["import", "SRC", "--out", "o"],
        ["convert", "SRC", "--out", "o"],
        ["convert", "SRC", "--to", "nothing", "--out", "o"],
        ["inspect"],
    ],
    ids=" ".join,
)
def test_wrong_use_exits_with_two_and_says_how(run: Any, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2 and "Usage:" in outcome.err and not outcome.out


def test_failures_are_one_line_and_exit_with_one(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    data = task(tmp_path / "d.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n')
    out = tmp_path / "out"
    strange = adapter_at(tiny_llama, tmp_path / "strange")
    (strange / "adapter.json").write_text('{"schema": "reft-adapter/9"}')
    cut = adapter_at(tiny_llama, tmp_path / "cut")
    (cut / "adapter.safetensors").write_bytes((cut / "adapter.safetensors").read_bytes()[:-1])
    flipped = adapter_at(tiny_llama, tmp_path / "flipped")
    blob = bytearray((flipped / "adapter.safetensors").read_bytes())
    blob[-1] ^= 1
    (flipped / "adapter.safetensors").write_bytes(blob)
    train = ("train", tiny_llama, "--data", data, "--out", out)
    cases = [
        ((*train, "--positions", "x9"), "cannot read 'x9'"),
        ((*train, "--layers", "9"), "layers [9] are outside"),
        ((*train, "--rank", "500"), "rank 500 exceeds"),
        ((*train, "--method", "telepathy"), "unknown method 'telepathy'"),
        ((*train, "--set", "rnak=4"), "setting 'rnak'"),
        ((*train, "--epochs", "0"), "'epochs'"),
        ((*train, "--resume"), "no whole checkpoint"),
        (("train", tiny_llama, "--data", broken, "--out", out), "line 1: field 'completion' is missing"),
        (("train", tmp_path / "nowhere", "--data", data, "--out", out), "no such folder"),
        (("generate", tiny_llama, "--prompt", "a", "--adapter", "nobody:latest"), "no adapter under 'nobody:latest'"),
        (("generate", tiny_llama, "--prompt", "a", "--runtime", "abacus"), "unknown runtime 'abacus'"),
        (("generate", tiny_llama, "--prompt", "a", "--adapter", cut), "truncated"),
        (("generate", tiny_llama, "--prompt", "a", "--adapter", flipped), "a bit changed"),
        (("inspect", "nobody:latest"), "no adapter under"),
        (("inspect", strange), "unknown schema 'reft-adapter/9'"),
        (("inspect", cut), "truncated or altered"),
        (("inspect", tmp_path), "reft import"),
        (("import", tmp_path, "--base", tiny_llama, "--out", out), "no known format"),
        (("import", tmp_path, "--base", tiny_llama, "--out", cut), "already holds an adapter"),
    ]
    for arguments, message in cases:
        outcome = run(*arguments)
        line = outcome.err.strip().splitlines()[-1]
        assert outcome.code == 1 and line.startswith("reft: ") and message in line, (arguments, outcome)
        assert "Traceback" not in outcome.err and not outcome.out
    assert not (out / "adapter.json").exists()


def test_errors_do_not_talk_to_the_terminal(run: Any, tmp_path: Path) -> None:
    hostile = tmp_path / "\x1b]0;owned\x07"
    hostile.mkdir()
    (hostile / "adapter.json").write_text("{")
    outcome = run("inspect", hostile)
    assert outcome.code == 1 and "?]0;owned?/adapter.json" in outcome.err
    assert "\x1b" not in outcome.err and "\x07" not in outcome.err


def test_an_adapter_for_another_base_is_refused(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    directory = adapter_at(tiny_llama, tmp_path / "a")
    manifest = json.loads((directory / "adapter.json").read_text())
    manifest["base"]["fingerprint"] = "sha256:" + "0" * 64
    (directory / "adapter.json").write_text(json.dumps(manifest))
    outcome = run("generate", tiny_llama, "--prompt", "a", "--adapter", directory)
    assert outcome.code == 1 and "was made for base model 'tiny-llama'" in outcome.err


def test_train_generate_inspect(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    data, out = task(tmp_path / "d.jsonl"), tmp_path / "adapter"
    given = (
        "--positions",
        "f1+l1",
        "--rank",
        "2",
        "--layers",
        "1,3",
        "--set",
        "dropout=0.05",
        "--epochs",
        "2",
        "--json",
    )
    trained = run("train", tiny_llama, "--data", data, "--eval", data, "--out", out, *given)
    assert trained.code == 0
    report = json.loads(trained.out)
    assert report["training"]["examples"] == 4 and report["training"]["steps"] == 2
    assert "eval_loss" in report["training"]["metrics"] and report["out"] == str(out)

    looked = json.loads(run("inspect", out, "--json").out)
    assert looked["manifest"]["config"]["layers"] == [1, 3] and looked["manifest"]["config"]["dropout"] == 0.05
    assert looked["parameters"] == 2 * (2 * 2 * 128 + 2)
    text = run("inspect", out).out
    for part in (
        "loreft",
        "layer 1 block_output, positions f1+l1, rank 2",
        "1,028",
        "2 steps on 4 examples",
        "tiny-llama",
    ):
        assert part in text, part

    again = run("train", tiny_llama, "--data", data, "--out", out)
    assert again.code == 1 and "already holds a finished adapter" in again.err


def test_generate_prints_what_the_runtime_answers(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    directory = adapter_at(tiny_llama, tmp_path / "a", "all", scale=9.0)
    prompts = ["the small dog", "count: one,"]
    runtime = reft.runtime("transformers", tiny_llama)
    expected = runtime.generate(prompts, [directory] * 2, max_new_tokens=5)
    asked = ("generate", tiny_llama, "--max-new-tokens", 5, "--prompt", prompts[0], "--prompt", prompts[1])
    outcome = run(*asked, "--adapter", directory)
    assert outcome.code == 0 and outcome.out == "".join(f"{g.text}\n" for g in expected)
    rows = json.loads(run(*asked, "--adapter", directory, "--json").out)
    assert [row["token_ids"] for row in rows] == [g.token_ids for g in expected]
    bare = json.loads(run(*asked, "--json").out)
    assert bare[0]["token_ids"] != rows[0]["token_ids"] and bare[0]["adapter"] is None


def test_import_says_what_it_found_and_assumed(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    source, out = tmp_path / "pyreft", tmp_path / "imported"
    source.mkdir()
    unit = {
        "weight": torch.randn(2, 128),
        "bias": torch.randn(2),
        "rotate_layer": torch.linalg.qr(torch.randn(128, 2))[0],
    }
    torch.save(unit, source / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin")
    refused = run("import", source, "--base", tiny_llama, "--out", out)
    assert refused.code == 1 and "--positions" in refused.err and not out.exists()
    given = ("--positions", "f2;cap=half", "--option", "activation=relu")
    outcome = run("import", source, "--base", tiny_llama, "--out", out, *given)
    assert outcome.code == 0
    for part in ("1 interventions of kind loreft", "positions f2;cap=half", "activation relu", f"saved to {out}"):
        assert part in outcome.out
    assert reft.load(out, base=tiny_llama).manifest.config["activation"] == "relu"


def test_plugins_lists_what_is_installed(run: Any) -> None:
    found = json.loads(run("plugins", "--json").out)
    assert {"loreft", "lora"} <= set(found["methods"]) and {"peft", "pyreft", "reft"} <= set(found["formats"])
    assert "transformers" in found["runtimes"] and "reft_plugins.builtin" in found["plugins"]
    assert "loreft" in run("plugins").out


def test_a_plugin_whose_commands_fail_takes_only_its_own_away(run: Any) -> None:
    from reft_plugins import hookimpl, plugins

    class Broken:
        @hookimpl
        def reft_register_commands(self, cli: Any) -> None:
            raise ImportError("half installed")

    plugin = Broken()
    plugins.manager().register(plugin, name="broken")
    try:
        outcome = run("plugins")
    finally:
        plugins.manager().unregister(plugin)
    assert outcome.code == 0 and "loreft" in outcome.out
    assert "commands of plugin 'broken' are missing: ImportError: half installed" in outcome.err
