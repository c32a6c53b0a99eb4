"""What a terminal shows of evaluations."""

from __future__ import annotations

from io import StringIO

from fidelity_bench import Bench
from rich.console import Console

from reft_plugins.fidelity.evaluation import Evaluation
from reft_plugins.fidelity.table import show_evaluations


def shown(evaluations: dict[str, Evaluation]) -> str:
    target = StringIO()
    show_evaluations(evaluations, Console(file=target, width=80))
    return target.getvalue()


def worst_case(evaluation: Evaluation) -> Evaluation:
    """The same with the longest name of a source and the widest numbers that occur."""
    wide = evaluation.fidelity.model_copy(update={"tokens": 1234567, "mean_kl": 123.4, "max_logit_difference": 1234.5})
    return evaluation.model_copy(
        update={"fidelity": wide, "sources": {"general passages": wide, "held-out file": wide}}
    )


def test_every_number_is_there_at_80_columns(bench: Bench) -> None:
    found = worst_case(bench.evaluator.installed())
    text = shown({"f16": found, "q4_k_m": found})
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    rows = [line for line in lines if "1.2e+02" in line]
    assert len(rows) == 5 and all("1.2e+03" in row and "%" in row for row in rows), "no cell is cut or wrapped"
    assert "general passages" in text and "…" not in text
    assert "greedy answers: 100.0%" in text and "behind layer" in text


def test_one_format_has_no_table_of_formats(bench: Bench) -> None:
    found = bench.evaluator.installed()
    one, two = shown({"f16": found}), shown({"f16": found, "f32": found})
    assert "By number format" not in one and "By number format" in two
    assert "f32" not in one and "f32" in two


def test_rows_stand_in_columns(bench: Bench) -> None:
    lines = shown({"f16": bench.evaluator.installed()}).splitlines()
    rows = [line for line in lines if line.strip().startswith(("long", "short", "overall"))]
    assert len(rows) == 3 and len({len(row) for row in rows}) == 1 and len({row.index("%") for row in rows}) == 1


def test_nothing_measured_is_said() -> None:
    assert shown({}) == "exact by construction, not measured\n"
