"""A certificate for people: one Markdown and one HTML file, complete in themselves and equal for equal certificates."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass

from reft_plugins.fidelity.certificate import CERTIFICATE_FILE, Certificate
from reft_plugins.fidelity.comparison import TARGET_KL, TARGET_REMOVED, TARGET_TOP1, Fidelity
from reft_plugins.fidelity.evaluation import Evaluation
from reft_plugins.fidelity.plots import BY_LAYER, BY_POSITION, BY_SOURCE, draw

MARKDOWN_FILE, HTML_FILE = "report.md", "report.html"

DOCUMENTS = (CERTIFICATE_FILE, MARKDOWN_FILE, HTML_FILE)
"""Names of all files that `documents` may make."""

MAX_ROWS = 64
"""Of a table; the rest is in `fidelity.json`."""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with a text, a picture (SVG), a table whose `numbers` are the columns aligned right, and a list."""

    title: str
    text: str = ""
    picture: str = ""
    columns: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    numbers: tuple[int, ...] = ()
    items: Sequence[str] = ()


def documents(certificate: Certificate, report: bool = True) -> dict[str, str]:
    """Contents of `fidelity.json` and, with `report`, of `report.md` and `report.html`, by file name."""
    found = {CERTIFICATE_FILE: certificate.text()}
    if report:
        found.update(_render(certificate))
    return found


def _render(certificate: Certificate) -> dict[str, str]:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    known = {
        "title": f"{certificate.adapter.reference} for {certificate.exported_to}",
        "verdict": verdict(certificate),
        "sections": sections(certificate, draw(certificate)),
    }
    texts = {}
    for name in (MARKDOWN_FILE, HTML_FILE):
        environment = Environment(
            loader=PackageLoader("reft_plugins.fidelity"),
            autoescape=name == HTML_FILE,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(data_uri=_data_uri, anchor=_anchor, cell=_cell)
        texts[name] = environment.get_template(name).render(known).rstrip() + "\n"
    return texts


def verdict(certificate: Certificate) -> str:
    """The result in two sentences."""
    exact = certificate.kind == "exact"
    first = (
        "This export is exact: its parameters can hold precisely what the adapter does, up to rounding."
        if exact
        else "This export is an approximation of the adapter."
    )
    if not certificate.measured:
        return f"{first} It was not measured."
    evaluation = certificate.measured[0][1]
    fidelity = evaluation.fidelity
    second = (
        f"On {fidelity.tokens:,} held-out predictions it puts the adapter's first choice first in "
        f"{fidelity.top1_agreement:.2%}, at a mean divergence of {fidelity.mean_kl:.2e} nats."
    )
    if exact:
        return f"{first} {second}"
    reached = "reaches its targets on every source of text" if evaluation.on_target else "misses its targets"
    return (
        f"{first} {second} It {reached} (top-1 at least {TARGET_TOP1}, mean KL at most {TARGET_KL} nats, "
        f"{TARGET_REMOVED:.0%} of the base model's divergence removed)."
    )


def sections(certificate: Certificate, pictures: dict[str, str]) -> list[Section]:
    """Everything below the verdict; sections with nothing to say are left out."""
    measured = certificate.measured
    found = [_identity(certificate)]
    if measured:
        found += _measurements(measured[0][1], pictures)
        if len(measured) > 1:
            rows = [(file.dtype or file.name, file.measured_in or "", *_numbers(e)) for file, e in measured]
            columns = ("format", "run by", *_NUMBERS)
            found.insert(1, Section("Number formats", "", "", columns, rows, _right(2, _NUMBERS)))
    found += [_nodes(certificate), _files(certificate), _texts(certificate)]
    found.append(Section("Notes", items=certificate.warnings))
    return [each for each in found if each.rows or each.items or each.text]


_NUMBERS = ("top-1", "mean KL", "removed", "max diff", "same answers")


def _numbers(evaluation: Evaluation) -> tuple[str, ...]:
    answers = "" if evaluation.answers is None else f"{evaluation.answers.identical:.1%}"
    fidelity = evaluation.fidelity
    return (*_row(fidelity)[2:], answers)


def _row(fidelity: Fidelity) -> tuple[str, ...]:
    return (
        f"{fidelity.tokens:,}",
        percent(fidelity.base_top1_agreement),
        percent(fidelity.top1_agreement),
        f"{fidelity.mean_kl:.1e}",
        percent(fidelity.kl_removed),
        f"{fidelity.max_logit_difference:.1e}",
    )


def _measurements(evaluation: Evaluation, pictures: dict[str, str]) -> list[Section]:
    fidelity, answers = evaluation.fidelity, evaluation.answers
    sources = Section(
        "Fidelity by source of text",
        "Every prediction of held-out text, compared with the adapter run as it is. top-1: share of predictions with "
        "the same first choice (base: without the adapter); mean KL: divergence from the adapter in nats; removed: "
        "share of the base model's divergence that is gone; max diff: largest difference of a logit. Dotted: the "
        "target of approximations.",
        pictures.get(BY_SOURCE, ""),
        ("text", "predictions", "base top-1", "top-1", "mean KL", "removed", "max diff"),
        [(name, *_row(each)) for name, each in {**evaluation.sources, "overall": fidelity}.items()],
        _right(1, range(6)),
    )
    positions = Section(
        "Fidelity by position",
        "By the token of the text at which the prediction is made, the first one being 0.",
        pictures.get(BY_POSITION, ""),
        ("token", "predictions", "top-1", "mean KL", "base mean KL"),
        [
            (
                str(b.first) if b.first == b.last else f"{b.first}-{b.last}",
                f"{b.tokens:,}",
                percent(b.top1_agreement),
                f"{b.mean_kl:.1e}",
                "" if b.base_mean_kl is None else f"{b.base_mean_kl:.1e}",
            )
            for b in fidelity.positions
        ],
        _right(0, range(5)),
    )
    layers = Section(
        "Error per layer",
        "Difference of the hidden state behind each layer from the adapter's, relative to its size, root mean square "
        "over tokens.",
        pictures.get(BY_LAYER, ""),
        ("layer", "error", "base model's"),
        [(str(e.layer), f"{e.error:.2e}", f"{e.base_error:.2e}") for e in evaluation.layers],
        _right(0, range(3)),
    )
    found = [sources, positions]
    if evaluation.layers:
        found.append(layers)
    if answers is not None:
        found.append(
            Section(
                "Greedy answers",
                f"{answers.prompts} held-out prompts, answered greedily with at most {answers.max_tokens} tokens. The "
                f"adapter's answers have {answers.mean_length:.1f} tokens on average.",
                columns=("model", "identical answers", "tokens until the first difference"),
                rows=[
                    ("export", f"{answers.identical:.1%}", f"{answers.mean_agreement:.1f}"),
                    ("base model", f"{answers.base_identical:.1%}", f"{answers.base_mean_agreement:.1f}"),
                ],
                numbers=(1, 2),
            )
        )
    return found


def _identity(certificate: Certificate) -> Section:
    base = certificate.base
    rows = [
        ("adapter", f"{certificate.adapter.reference} ({certificate.adapter.method})"),
        ("digest", certificate.adapter.digest),
        ("base model", f"{base.name} ({base.architecture}, {base.num_hidden_layers} layers of {base.hidden_size})"),
        ("fingerprint", base.fingerprint),
        ("kind", certificate.kind),
        ("strategy", certificate.strategy),
        ("made by", certificate.producer),
    ]
    return Section("What was exported", columns=("", ""), rows=rows)


def _nodes(certificate: Certificate) -> Section:
    rows = [(n.node, n.exported_as, "yes" if n.exact else "no") for n in certificate.nodes]
    more = f"The first {MAX_ROWS} of {len(rows)}; all are in {CERTIFICATE_FILE}." if len(rows) > MAX_ROWS else ""
    return Section("What became of the adapter", more, "", ("node", "exported as", "exact"), rows[:MAX_ROWS])


def _files(certificate: Certificate) -> Section:
    rows = [(file.name, file.dtype or "", f"{file.size:,}", file.sha256) for file in certificate.files]
    return Section("Files", "", "", ("file", "format", "bytes", "digest"), rows, (2,))


def _texts(certificate: Certificate) -> Section:
    texts = certificate.texts
    fitted, held_out = ({fact.source: fact for fact in facts} for facts in (texts.calibration, texts.held_out))
    rows = [
        (name, *(f"{facts[name].tokens:,}" if name in facts else "" for facts in (fitted, held_out)))
        for name in sorted({*fitted, *held_out})
    ]
    text = f"Tokens, by source. Sampled with seed {texts.seed}." if rows else ""
    return Section("Text", text, "", ("source", "to fit on", "to measure on"), rows, (1, 2))


def percent(share: float | None) -> str:
    """A share for people, to a hundredth of a percent; nothing for None."""
    return "" if share is None else f"{share:.2%}"


def _right(first: int, columns: Sequence[object] | range) -> tuple[int, ...]:
    return tuple(range(first, first + len(columns)))


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
