"""MLflow's model registry on SQLite, in MLflow's environment: registered models, versions, aliases.

A resolve gives the folder that the database names; MLflow verifies nothing. An `add` copies the files into a folder, as
MLflow's own local artifact repository does, registers the version with method and base as tags, and moves an alias.
SQLite waits for the disk at every commit (`synchronous=FULL`, MLflow's default); the copied files are not synced.
"""

from __future__ import annotations

import logging
import os
import random
import time
from pathlib import Path
from typing import Any

from store_peers.clock import Clock, main, wait_for_start
from store_peers.plan import Plan, Version

FACTS = {"method": "loreft", "base": "llama"}
BATCH = 5000
MOST = 200_000
"""Versions that one search may give."""


os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


def known_as(name: str) -> str:
    """A name without '/', which MLflow does not allow."""
    return name.replace("/", ".")


def client(job: dict[str, Any]) -> Any:
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    place = f"sqlite:///{job['store']}/registry.db"
    return mlflow.MlflowClient(tracking_uri=place, registry_uri=place)


def fill(job: dict[str, Any], clock: Clock) -> None:
    """The first `by_api` versions by the client, the others by MLflow's own ORM models in transactions of 5,000."""
    plan = Plan(**job["plan"])
    Path(job["store"]).mkdir()
    registry = client(job)
    registry.search_registered_models(max_results=1)
    first = min(job["by_api"], plan.versions)
    for version in (plan.version(position) for position in range(first)):
        if version.number == 1:
            registry.create_registered_model(known_as(version.name))
        source = str(plan.tensors(version).parent)
        with clock.time("add by the client while empty"):
            registry.create_model_version(known_as(version.name), source, tags=FACTS, await_creation_for=0)
    insert(job, plan, first)
    found = len(registry.search_model_versions(max_results=MOST))
    if found != plan.versions:
        raise SystemExit(f"MLflow has {found} versions instead of {plan.versions}")


def insert(job: dict[str, Any], plan: Plan, first: int) -> None:
    from mlflow.store.model_registry.dbmodels.models import (
        SqlModelVersion,
        SqlModelVersionTag,
        SqlRegisteredModel,
        SqlRegisteredModelAlias,
    )
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    now = int(time.time() * 1000)
    versions = [plan.version(position) for position in range(first, plan.versions)]
    rows: dict[type, list[dict[str, Any]]] = {
        SqlRegisteredModel: [
            {"name": known_as(version.name), "creation_time": now, "last_updated_time": now}
            for version in versions
            if version.number == 1
        ],
        SqlModelVersion: [model_version(plan, version, now) for version in versions],
        SqlModelVersionTag: [
            {"name": known_as(version.name), "version": version.number, "key": key, "value": value}
            for version in versions
            for key, value in FACTS.items()
        ],
        SqlRegisteredModelAlias: [
            {"name": known_as(name), "alias": tag, "version": number} for name, tag, number in plan.tags()
        ],
    }
    with Session(create_engine(f"sqlite:///{job['store']}/registry.db")) as session:
        for model, found in rows.items():
            for start in range(0, len(found), BATCH):
                session.bulk_insert_mappings(model, found[start : start + BATCH])
                session.commit()


def model_version(plan: Plan, version: Version, now: int) -> dict[str, Any]:
    source = str(plan.tensors(version).parent)
    return {
        "name": known_as(version.name),
        "version": version.number,
        "creation_time": now,
        "last_updated_time": now,
        "source": source,
        "storage_location": source,
    }


def measure(job: dict[str, Any], clock: Clock) -> None:
    """One round in a new process."""
    plan = Plan(**job["plan"])
    with clock.time("open"):
        registry = client(job)
        resolve(registry, plan.version(0))
    with clock.time("ls, again"):
        list_all(registry, plan)
    for kind in ("tiny", "large"):
        sample = plan.sample(kind, job["sample"], 0)
        for version in random.Random(job["round"]).choices(sample, k=job["resolves"]):
            with clock.time(f"resolve, {kind}"):
                resolve(registry, version)
    for version in plan.sample("tiny", job["tags"], job["round"]):
        with clock.time("tag"):
            registry.set_registered_model_alias(known_as(version.name), "prod", str(version.number))
    add(job, clock, registry)


def list_once(job: dict[str, Any], clock: Clock) -> None:
    """In a new process, its imports not counted."""
    registry = client(job)
    with clock.time("ls, new process"):
        list_all(registry, Plan(**job["plan"]))


def list_all(registry: Any, plan: Plan) -> None:
    found, token = 0, None
    while found == 0 or token:
        page = registry.search_model_versions(max_results=MOST, page_token=token)
        found, token = found + len(page), page.token
    if found < plan.versions:
        raise SystemExit(f"MLflow lists {found} versions")


def resolve_once(job: dict[str, Any], clock: Clock) -> None:
    resolve(client(job), Plan(**job["plan"]).sample("tiny", 1, job["round"])[0])


def resolve(registry: Any, version: Version) -> None:
    if not Path(registry.get_model_version(known_as(version.name), str(version.number)).source).is_dir():
        raise SystemExit(f"{version.reference}: no folder")


def add_together(job: dict[str, Any], clock: Clock) -> None:
    """Add while other processes do."""
    registry = client(job)
    resolve(registry, Plan(**job["plan"]).version(0))
    wait_for_start()
    add(job, clock, registry, ", 4 processes")


def add(job: dict[str, Any], clock: Clock, registry: Any, together: str = "") -> None:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    for source, name, kind in job["adds"]:
        target = f"{job['store']}/files/{Path(source).name}"
        with clock.time(f"add, {kind}{together}"):
            LocalArtifactRepository(target).log_artifacts(source)
            version = registry.create_model_version(known_as(name), target, tags=FACTS, await_creation_for=0)
            registry.set_registered_model_alias(known_as(name), "newest", version.version)


if __name__ == "__main__":
    main(
        {
            "fill": fill,
            "measure": measure,
            "list once": list_once,
            "resolve once": resolve_once,
            "add together": add_together,
        }
    )
