"""Registers the transformers runtime."""

from __future__ import annotations

from collections.abc import Callable

from reft_plugins.hookspecs import hookimpl


@hookimpl
def reft_register_runtimes(register: Callable[..., None]) -> None:
    from reft_transformers.runtime import TransformersRuntime

    register("transformers", TransformersRuntime)
