"""Options that both commands take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

FORMATS = (
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l"),
    *("q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"),
)
"""Names of `reft_ollama.weights.formats.FORMATS`, which is too heavy to import for `--help`."""

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)

_OPTIONS = (
    click.option("--base", required=True, help="Base model: folder or Hugging Face id."),
    click.option(
        "--approximate", is_flag=True, help="Apply edits of some positions at all of them; measures the loss."
    ),
    click.option(
        "--strategy",
        type=click.Choice(["auto", "low-rank", "distilled", "neurons"]),
        default="auto",
        show_default=True,
        help="How what weights cannot hold becomes weights: low-rank and distilled keep the model's size, neurons is "
        "nearly exact for affine edits of the residual stream.",
    ),
    click.option(
        "--distill", is_flag=True, help="Train the fitted weights to predict as the adapter where they miss the target."
    ),
    click.option(
        "--distill-steps", type=click.IntRange(min=1), default=200, show_default=True, help="Of that training."
    ),
    click.option("--rank", type=click.IntRange(min=1), help="Of fitted updates; by default that of the edits, or 32."),
    click.option(
        "--dtype",
        type=click.Choice(FORMATS, case_sensitive=False),
        metavar="FORMAT",
        multiple=True,
        default=("f16",),
        show_default=True,
        help="Number format of the file (f32, f16, bf16, q8_0, q4_k_m, …); give several for a file of each.",
    ),
    click.option("--calibration", type=_FILE, help="Text to fit on."),
    click.option("--held-out", type=_FILE, help="Text to measure on."),
    click.option(
        "--calibration-tokens", type=click.IntRange(min=1), help="How many to fit on; by default 10 per neuron."
    ),
    click.option(
        "--measure/--no-measure", default=True, help="Run the model to measure the export; exact ones need it not."
    ),
    click.option("--min-top1", type=click.FloatRange(0, 1), default=0.9, show_default=True, help="Fail below this."),
    click.option(
        "--report/--no-report", default=True, help="Also write the measurements as report.md and report.html."
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of sampled text."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)


def model_options(command: F) -> F:
    """Add the options that say which model is made and how it is measured."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
