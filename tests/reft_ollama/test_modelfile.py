"""Modelfiles, read back as Ollama reads them, and the licenses in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modelfile_reader import read
from raw_programs import as_adapter

from reft_ollama.commands.ollama import ollama
from reft_ollama.export import export_ollama
from reft_ollama.templates import go_template
from reft_ollama.templates.chat_template import NO_CHAT
from reft_ollama.templates.licenses import find_licenses
from reft_ollama.templates.modelfile import Modelfile
from reft_plugins.errors import ExportError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site

TEXTS = st.lists(
    st.one_of(
        st.sampled_from(['"', '""', '"""', '""""', "\n", "\r\n", " ", "\t", "#", "FROM x", "\\", "{{", "é 日本 😀"]),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=3),
    ),
    max_size=8,
).map("".join)


def kept(text: str) -> str:
    return "".join(c for c in text if c.isprintable() or c in "\n\r\t")


@settings(max_examples=800, deadline=None, derandomize=True)
@given(system=TEXTS, stop=TEXTS, license=TEXTS)
@example('say """ twice """', 'a "quoted" one', '"')
@example('begins """\nwith', '"""', "a\r\nb")
@example("", "", '"""\x1b\n')
@example('"""\n', "<|end|>", '"begins with a quote')
def test_what_ollama_reads_is_what_was_written(system: str, stop: str, license: str) -> None:
    modelfile = Modelfile(
        "model.gguf", NO_CHAT, {"temperature": 0, "stop": ["</s>", stop]}, system, ["MIT", license], ["two\nlines"]
    )
    try:
        text = modelfile.text()
    except ExportError:
        assert any('"""' in kept(value) for value in (system, stop, license))
        return
    assert read(text) == [
        ("from", "./model.gguf"),
        ("template", NO_CHAT),
        ("system", kept(system)),
        ("temperature", "0"),
        ("stop", "</s>"),
        ("stop", kept(stop)),
        ("license", "MIT"),
        ("license", kept(license)),
    ]
    dropped = " ".join(modelfile.problems())
    assert ("from SYSTEM" in dropped) == (kept(system) != system)
    assert ("from stop" in dropped) == (kept(stop) != stop)


@pytest.mark.parametrize(
    "text", ['ends with """', 'a """ b\nc', '"quoted"\nlines', '""" one line """', '"', '""', 'a\n"""', ""]
)
def test_texts_with_quotes_that_fit(text: str) -> None:
    assert read(Modelfile("m", NO_CHAT, system=text).text())[2:] == [("system", text)]


def test_a_text_that_no_quoting_fits_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match='SYSTEM: .*one ends in """'):
        Modelfile("m", NO_CHAT, system='x """\ny').text()
    with pytest.raises(ValueError, match="unexpected end|unknown instruction"):
        read('FROM m\nSYSTEM """x """\ny"""\nLICENSE a')


def test_templates_keep_every_character() -> None:
    text = 'a """\n{{ \u00a0\u200d\U000e0001\ufeff 日本\r\n "x" '
    ((_, template),) = read(Modelfile("m", go_template.literal(text)).text())[1:]
    assert go_template.render(template, {}) == text


def test_a_system_message_that_the_template_has_no_place_for_is_a_problem() -> None:
    assert "no place" in Modelfile("m", NO_CHAT, system="Be brief.").problems()[0]
    assert Modelfile("m", "{{ .System }}{{ .Prompt }}", system="Be brief.").problems() == []


def test_every_instruction_stands_on_a_line() -> None:
    modelfile = Modelfile("model.gguf", "{{ .Prompt }}\n", {"top_k": 5, "stop": ["</s>"]}, None, ["Be kind."], ["made"])
    assert modelfile.text() == (
        "# made\n"
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ .Prompt }}\n"""\n'
        "PARAMETER top_k 5\n"
        'PARAMETER stop """</s>"""\n'
        'LICENSE """Be kind."""\n'
    )


def test_licenses_of_base_and_adapter(tmp_path: Path) -> None:
    base, adapter, card = tmp_path / "base", tmp_path / "adapter", tmp_path / "card"
    for folder in (base, adapter, card):
        folder.mkdir()
    (base / "LICENSE.txt").write_text("Do as you like.\r\nBe kind.\n")
    (base / "NOTICE").write_text("Made with care.")
    (base / "licenses-of-tests").mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    assert find_licenses(base, adapter) == ["Do as you like.\nBe kind.", "Made with care."]
    (adapter / "LICENSE").write_text("Mine.")
    assert find_licenses(base, adapter, notes={"license": "unused"})[2:] == ["Mine."]
    (adapter / "LICENSE").write_text("Made with care.")
    assert len(find_licenses(base, adapter)) == 2
    assert find_licenses(base, None, notes={"license": "CC0"})[2:] == ["License of the adapter: CC0"]
    assert find_licenses(card, None, notes={}) == []
    (card / "README.md").write_text(
        "---\nlicense: other\nlicense_name: kind\nlicense_link: https://example.org\n---\n#"
    )
    assert find_licenses(card) == ["License: kind (https://example.org)"]
    (card / "README.md").write_text("no head")
    assert find_licenses(card) == []


def test_an_export_says_system_and_licenses(tiny_llama: Path, tmp_path: Path) -> None:
    shift = torch.randn(128, generator=torch.Generator().manual_seed(4))
    folder = as_adapter(tiny_llama, Edit(Site(1), Positions.parse("all"), shift=shift)).save(tmp_path / "constant")
    (folder / "LICENSE").write_text("Free as in birds.")
    options = ["--base", str(tiny_llama), "--out", str(tmp_path / "out"), "--no-measure", "--system", "Be brief."]
    done = CliRunner().invoke(ollama, [str(folder), *options])
    assert done.exit_code == 0, done.output
    assert "no place for the SYSTEM message" in done.output
    found = read((tmp_path / "out" / "Modelfile").read_text("utf-8"))
    assert ("system", "Be brief.") in found and ("license", "Free as in birds.") in found
    assert "# TEMPLATE has no place for the SYSTEM message" in (tmp_path / "out" / "Modelfile").read_text("utf-8")
    with pytest.raises(ExportError, match="SYSTEM"):
        export_ollama(folder, tiny_llama, tmp_path / "none", measure=False, system='"""\n"""\n')
    assert not (tmp_path / "none" / "model.gguf").exists()
