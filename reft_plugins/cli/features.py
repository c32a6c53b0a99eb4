"""`reft features`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from reft_plugins.cli.completion import references


@click.command("features")
@click.argument("base")
@click.option("--data", required=True, type=click.Path(path_type=Path), help='JSONL of {"text", "label"}.')
@click.option("--layer", type=int, default=-1, show_default=True, help="From 0, or from the end; -1 is the last state.")
@click.option(
    "--pool",
    type=click.Choice(["mean", "last", "first", "cls"]),
    default="mean",
    show_default=True,
    help="Over tokens.",
)
@click.option(
    "--adapter",
    shell_complete=references,
    help="Path or store reference of an adapter that works while texts are read.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the features: .safetensors or .npz.")
@click.option("--classifier", type=click.Choice(["logistic"]), help="Fit it and report held-out accuracy.")
@click.option(
    "--eval", "evaluation", type=click.Path(path_type=Path), help="Held-out texts; by default a fifth of DATA."
)
@click.option("--classifier-out", type=click.Path(path_type=Path), help="Save the fitted classifier: .safetensors.")
@click.option("--apply", "saved", type=click.Path(path_type=Path), help="Label DATA by a saved classifier instead.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is held out.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--max-length", type=int, help="Most tokens per text; by default the base model's context.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="By default a GPU if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    base: str,
    data: Path,
    out: Path | None,
    classifier: str | None,
    evaluation: Path | None,
    classifier_out: Path | None,
    saved: Path | None,
    seed: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Turn texts into pooled hidden states of the model BASE, and classify by them.

    Example: reft features BASE --data texts.jsonl --pool cls --out features.safetensors --classifier logistic
    """
    if not (out or classifier or saved):
        raise click.UsageError("nothing to do: give --out, --classifier or --apply")
    if out is not None and out.suffix not in (".safetensors", ".npz"):
        raise click.UsageError(f"--out {out}: features are written as .safetensors or .npz")
    if (evaluation or classifier_out) and not classifier:
        raise click.UsageError("--eval and --classifier-out go with --classifier")
    from reft_plugins.classification.features import extract
    from reft_plugins.classification.logistic import LogisticClassifier, split

    loaded = None if saved is None else LogisticClassifier.load(saved)
    features = extract(base, data, progress=not as_json, **settings)
    report: dict[str, Any] = {"texts": len(features.values), "hidden_size": features.values.shape[1]}
    if out is not None:
        report["out"] = str(features.save(out))
    if classifier:
        held = None if evaluation is None else extract(base, evaluation, progress=not as_json, **settings)
        training, held = (features, held) if held is not None else split(features, seed=seed)
        fitted = LogisticClassifier.fit(training, seed=seed)
        report |= {"labels": list(fitted.labels), "held_out_texts": len(held.values), "accuracy": fitted.accuracy(held)}
        if classifier_out is not None:
            report["classifier_out"] = str(fitted.save(classifier_out))
    if loaded is not None:
        report["predicted"] = loaded.predict(features)
        if features.labels is not None:
            report["accuracy"] = loaded.accuracy(features)
    _print(report, as_json)


def _print(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for label in report.pop("predicted", []):
        click.echo(label)
    click.echo(f"{report['texts']} texts, {report['hidden_size']} numbers each", err=True)
    if "accuracy" in report:
        held = f" on {report['held_out_texts']} held-out texts" if "held_out_texts" in report else ""
        click.echo(f"accuracy {report['accuracy']:.3f}{held}", err="held_out_texts" not in report)
    for name in ("out", "classifier_out"):
        if name in report:
            click.echo(f"saved to {report[name]}", err=True)
