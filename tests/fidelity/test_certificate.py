"""The manifest of an export, and the reports made of it."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fidelity_bench import Bench

from reft_plugins.errors import DataError
from reft_plugins.fidelity.certificate import (
    AdapterFact,
    Certificate,
    FileFact,
    NodeFact,
    TextsFact,
    count_texts,
    moved,
    read_certificate,
    reference_name,
    summary,
)
from reft_plugins.fidelity.evaluation import Evaluation
from reft_plugins.fidelity.report import HTML_FILE, MARKDOWN_FILE, MAX_ROWS, documents

DIGEST = "sha256:" + "ab" * 32


@pytest.fixture(scope="module")
def exact(bench: Bench) -> Evaluation:
    return bench.evaluator.installed()


@pytest.fixture(scope="module")
def damaged(bench: Bench) -> Evaluation:
    """Every seventh token predicted wrongly, in a student that shows its logits only."""

    def logits(token_ids: list[int]) -> Any:
        found = bench.logits(token_ids)
        found[::7] = -found[::7]
        return found

    return bench.evaluator.student(logits)


@pytest.fixture
def certificate(bench: Bench, exact: Evaluation, damaged: Evaluation) -> Certificate:
    return Certificate(
        producer="reft-plugins 1",
        exported_to="ollama",
        kind="approximated",
        strategy="low-rank",
        adapter=AdapterFact(reference="task:v1", digest=bench.adapter.digest, method="shift <script>"),
        base=bench.runtime.identity,
        nodes=(NodeFact(node="Edit(layer 1 | block_output)", exported_as="bias", exact=True),),
        texts=TextsFact(held_out=count_texts(bench.texts), seed=3),
        files=(
            FileFact(name="model.gguf", sha256=DIGEST, size=1234567, dtype="f32", evaluation=exact),
            FileFact(name="model-q4_0.gguf", sha256=DIGEST, size=234567, dtype="q4_0", evaluation=damaged),
            FileFact(name="Modelfile", sha256=DIGEST, size=99),
        ),
        warnings=("something is different",),
    )


def test_a_certificate_is_read_back_as_it_was_written(bench: Bench, certificate: Certificate, tmp_path: Path) -> None:
    (tmp_path / "fidelity.json").write_text(certificate.text(), "utf-8")
    again = read_certificate(tmp_path)
    assert again.text() == certificate.text()
    assert again.adapter == certificate.adapter and again.files[2] == certificate.files[2]
    content = json.loads(certificate.text())
    assert content["schema"] == "reft-export/1"
    assert content["fidelity"] == certificate.files[0].evaluation.fidelity.to_json()  # type: ignore[union-attr]
    assert content["files"][1]["evaluation"]["fidelity"]["top1_agreement"] < 0.9
    counted = {fact["source"]: (fact["texts"], fact["tokens"]) for fact in content["texts"]["held_out"]}
    tokens = {source: sum(len(t.tokens) for t in bench.texts if t.source == source) for source in ("long", "short")}
    assert counted == {"long": (6, tokens["long"]), "short": (12, tokens["short"])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "reft-export/2"}, "schema"),
        ({"kind": "perfect"}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"files": [{"name": "a", "sha256": "b", "size": 1}]}, "files.0.sha256"),
    ],
)
def test_other_documents_are_refused_by_field(
    change: dict[str, Any], message: str, certificate: Certificate, tmp_path: Path
) -> None:
    path = tmp_path / "fidelity.json"
    path.write_text(json.dumps({**json.loads(certificate.text()), **change}))
    with pytest.raises(DataError, match=f"fidelity.json: not a certificate of schema reft-export/1: {message}"):
        read_certificate(path)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot read the certificate"):
        read_certificate(path)


def test_references_name_no_folder_of_this_computer(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert reference_name("task:v1") == "task:v1"
    assert reference_name(tmp_path / "mine") == reference_name(str(tmp_path / "mine")) == "mine"


class Page(HTMLParser):
    """Collects tags, pictures and the cells of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name == "src"]
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_html_report_shows_every_number_and_needs_nothing_else(certificate: Certificate) -> None:
    page = Page()
    page.feed(documents(certificate)[HTML_FILE])
    assert "script" not in page.tags and "link" not in page.tags and not page.links
    assert page.tags.count("table") >= 8 and "shift <script>" in page.text
    assert len(page.sources) == 3
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        picture = ElementTree.fromstring(base64.b64decode(data))
        assert picture.tag.endswith("svg")
    evaluation = certificate.files[0].evaluation
    assert evaluation is not None
    for layer in evaluation.layers:
        assert f"{layer.base_error:.2e}" in page.text
    for bucket in evaluation.fidelity.positions:
        assert f"{bucket.base_mean_kl:.1e}" in page.text
    for part in ("task:v1", "q4_0", "1,234,567", DIGEST, "something is different", "Greedy answers", "64-127", "short"):
        assert part in page.text


def test_the_markdown_report_has_whole_tables(certificate: Certificate) -> None:
    lines = documents(certificate)[MARKDOWN_FILE].splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) > 40
    widths = {}
    for index, line in enumerate(lines):
        if re.fullmatch(r"\|(---:?\|)+", line):
            assert lines[index - 2] == "", "a table needs an empty line before it"
            count = line.count("|")
            row = index - 1
            while row < len(lines) and lines[row].startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", lines[row])) == count, lines[row]
                row += 1
            widths[index] = row - index
    assert len(widths) >= 8 and all(rows > 1 for rows in widths.values())
    assert r"layer 1 \| block_output" in "\n".join(lines)
    assert sum(line.startswith("![") for line in lines) == sum(line.startswith("[") for line in lines) == 3


def test_reports_are_left_out_when_not_wanted(certificate: Certificate) -> None:
    assert set(documents(certificate)) == {"fidelity.json", "report.md", "report.html"}
    assert set(documents(certificate, report=False)) == {"fidelity.json"}


def test_what_was_not_measured_is_said(certificate: Certificate) -> None:
    files = tuple(file.model_copy(update={"evaluation": None}) for file in certificate.files)
    bare = certificate.model_copy(update={"files": files, "kind": "exact"})
    assert json.loads(bare.text())["fidelity"] is None
    found = documents(bare)
    assert "It was not measured." in found[MARKDOWN_FILE] and "img" not in found[HTML_FILE].partition("<body>")[2]
    assert summary(None) == ("exact by construction, not measured",)


def test_long_lists_of_nodes_end_in_the_report_only(certificate: Certificate) -> None:
    node = certificate.nodes[0]
    many = certificate.model_copy(update={"nodes": (node,) * (MAX_ROWS + 9)})
    assert documents(many)[MARKDOWN_FILE].count("block_output") == MAX_ROWS
    assert f"of {MAX_ROWS + 9}" in documents(many)[MARKDOWN_FILE]
    assert len(json.loads(many.text())["nodes"]) == MAX_ROWS + 9


def test_equal_certificates_make_equal_documents_in_every_process(certificate: Certificate, tmp_path: Path) -> None:
    (tmp_path / "fidelity.json").write_text(certificate.text(), "utf-8")
    script = (
        "import hashlib, sys\n"
        "from pathlib import Path\n"
        "from reft_plugins.fidelity.certificate import read_certificate\n"
        "from reft_plugins.fidelity.report import documents\n"
        "for name, text in documents(read_certificate(Path(sys.argv[1]))).items():\n"
        "    print(name, hashlib.sha256(text.encode()).hexdigest())\n"
    )
    (tmp_path / "matplotlibrc").write_text("font.size: 20\n")
    found = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            cwd=directory,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path.cwd())},
        ).stdout
        for seed, directory in (("1", tmp_path), ("2", Path.cwd()))
    ]
    assert found[0] == found[1] and found[0].count("\n") == 3


def test_summaries_are_short(exact: Evaluation) -> None:
    lines = summary(exact)
    assert len(lines) == 3 and all(len(line) < 140 for line in lines)
    assert "top-1 agreement 1.0000" in lines[1] and "100.0% of" in lines[2]


def test_renamed_files_keep_what_was_measured_of_them(certificate: Certificate) -> None:
    found = moved(certificate, "gguf", {"model.gguf": "task.gguf"})
    assert found.exported_to == "gguf" and [file.name for file in found.files] == ["task.gguf"]
    assert found.fidelity == certificate.fidelity
