"""What the demo calls equal, a tie, on target, and a success."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from examples.demo.compare import TIE, accuracy, agreement, first_difference
from examples.demo.environment import Workspace, prepare
from examples.demo.ollama import on_target
from examples.demo.report import Report

ROWS = [[5, 6, 2], [7, 2], [8, 9, 3, 2]]


def logits(best: int, other: int, margin: float) -> np.ndarray:
    row = np.zeros(16, dtype=np.float32)
    row[best], row[other] = 5.0, 5.0 - margin
    return row


def unexpected(row: int, step: int) -> np.ndarray:
    raise AssertionError("equal rows need no logits")


def test_accuracy_ignores_space_around_answers_only() -> None:
    assert accuracy([" Paris", "Rome", "Bern "], ["Paris", "Rome", "Bern"]) == 1.0
    assert accuracy([" Paris", "rome", "Bern Bern"], ["Paris", "Rome", "Bern"]) == pytest.approx(1 / 3)


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([], [4]) == 0


def test_equal_rows() -> None:
    found = agreement(ROWS, [list(row) for row in ROWS], unexpected)
    assert (found.tokens, found.equal, found.ties, found.different) == (9, 9, 0, ())
    assert found.holds


def test_tie_is_counted_and_ends_the_row() -> None:
    calls = []

    def near(row: int, step: int) -> np.ndarray:
        calls.append((row, step))
        return logits(9, 4, TIE / 2)

    found = agreement(ROWS, [*ROWS[:2], [8, 4, 11, 12, 13]], near)
    assert calls == [(2, 1)]
    assert (found.tokens, found.equal, found.ties, found.different) == (7, 6, 1, ())
    assert found.holds


def test_difference_without_a_tie_fails() -> None:
    found = agreement(ROWS, [*ROWS[:2], [8, 4, 3, 2]], lambda row, step: logits(9, 4, TIE * 2))
    assert found.different == (2,)
    assert not found.holds


def test_a_tie_of_two_other_tokens_excuses_nothing() -> None:
    found = agreement(ROWS, [*ROWS[:2], [8, 1, 3, 2]], lambda row, step: logits(9, 4, 0.0))
    assert found.different == (2,)


def test_a_row_that_ends_early_fails() -> None:
    assert not agreement(ROWS, [*ROWS[:2], [8, 9, 3]], lambda row, step: np.zeros(16, dtype=np.float32)).holds


def test_nothing_compared_is_no_success() -> None:
    assert not agreement([], [], unexpected).holds


def export_result(kind: str, difference: float, target: bool) -> SimpleNamespace:
    fidelity = SimpleNamespace(max_logit_difference=difference, on_target=target)
    good = SimpleNamespace(max_logit_difference=0.0, on_target=True)
    return SimpleNamespace(kind=kind, fidelity=good, sources={"one": good, "two": fidelity})


@pytest.mark.parametrize(
    ("kind", "dtype", "difference", "target", "expected"),
    [
        ("exact", "f32", 1e-5, True, True),
        ("exact", "f32", 1e-3, True, False),
        ("exact", "f16", 1e-3, True, True),
        ("approximated", "f16", 1.0, True, True),
        ("approximated", "f16", 1.0, False, False),
    ],
)
def test_every_source_of_an_export_must_be_on_target(kind, dtype, difference, target, expected) -> None:
    assert on_target(export_result(kind, difference, target), dtype) is expected


def quiet_report() -> Report:
    return Report(console=Console(file=io.StringIO(), width=120))


def test_exit_code_is_zero_only_if_every_check_passed() -> None:
    report = quiet_report()
    report.check("first", True, "1")
    report.check("second", False, "0", skipped="not asked")
    assert report.finish() == 0
    assert "not asked" in report.console.file.getvalue()
    report.check("third", False, "0")
    assert report.finish() == 1
    assert "failed: third" in report.console.file.getvalue()


def test_a_run_without_checks_fails() -> None:
    assert quiet_report().finish() == 1


def test_stages_are_timed_also_when_they_fail() -> None:
    report = quiet_report()
    with pytest.raises(ValueError, match="broken"), report.stage("first", "because"):
        raise ValueError("broken")
    assert list(report.seconds) == ["first"]


def test_workspace_follows_model(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("MODEL", raising=False)
    own = Workspace.from_environment()
    assert own.own
    assert own.base.endswith("base")
    monkeypatch.setenv("MODEL", "owner/name")
    other = Workspace.from_environment()
    assert (other.own, other.base) == (False, "owner/name")
    assert other.store != own.store
    monkeypatch.setenv("MODEL", "owner-name")
    assert Workspace.from_environment().folder != other.folder


def test_preparing_keeps_what_the_user_set(monkeypatch) -> None:
    workspace = Workspace("owner/name", False, Workspace.from_environment().folder)
    monkeypatch.setattr("os.environ", {"VLLM_LOGGING_LEVEL": "INFO", "REFT_STORE": "elsewhere"})
    prepare(workspace)
    import os

    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO"
    assert os.environ["REFT_STORE"] == str(workspace.store.resolve())
    assert "HF_HUB_OFFLINE" not in os.environ
