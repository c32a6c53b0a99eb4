"""The plugins that come with the core: its methods, formats, commands, and paths as references."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from reft_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import click

    from reft_plugins.diagnosis import Report


@hookimpl
def reft_register_methods(register: Callable[..., None]) -> None:
    from reft_plugins.methods.adalora import AdaLoRA
    from reft_plugins.methods.bottleneck import Bottleneck
    from reft_plugins.methods.consreft import ConsReFT
    from reft_plugins.methods.das import DAS
    from reft_plugins.methods.direft import DiReFT
    from reft_plugins.methods.direft_orthonormal import OrthonormalDiReFT
    from reft_plugins.methods.full import Full
    from reft_plugins.methods.head import Head
    from reft_plugins.methods.ia3 import IA3
    from reft_plugins.methods.interchange import Interchange
    from reft_plugins.methods.llama_adapter import LlamaAdapter
    from reft_plugins.methods.lobireft import LobiReFT
    from reft_plugins.methods.lora import LoRA
    from reft_plugins.methods.lora_dash import LoRADash
    from reft_plugins.methods.loreft import LoReFT
    from reft_plugins.methods.noreft import NoReFT
    from reft_plugins.methods.p_tuning import PTuning
    from reft_plugins.methods.prefix_tuning import PrefixTuning
    from reft_plugins.methods.program import ProgramMethod
    from reft_plugins.methods.prompt_tuning import PromptTuning
    from reft_plugins.methods.red import RED
    from reft_plugins.methods.steering import Steering

    for method in (LoReFT(), LoRA(), ProgramMethod(), Bottleneck()):
        register(method)
    for of_weights in (AdaLoRA(), LoRADash(), IA3(), Full(), Head()):
        register(of_weights)
    for member in (NoReFT(), DiReFT(), OrthonormalDiReFT(), ConsReFT(), LobiReFT(), RED(), Steering()):
        register(member)
    for exchange in (DAS(), Interchange()):
        register(exchange)
    for in_front in (PromptTuning(), PTuning(), PrefixTuning(), LlamaAdapter()):
        register(in_front)


@hookimpl
def reft_register_formats(register: Callable[..., None]) -> None:
    from reft_plugins.formats.adapterhub import AdapterHubFormat
    from reft_plugins.formats.lora_dash import LoRADashFormat
    from reft_plugins.formats.native import NativeFormat
    from reft_plugins.formats.peft import PeftFormat
    from reft_plugins.formats.pyreft import PyreftFormat

    for reader in (NativeFormat(), PeftFormat(), LoRADashFormat(), PyreftFormat(), AdapterHubFormat()):
        register(reader)


@hookimpl(tryfirst=True)
def reft_resolve_adapter(reference: str) -> Path | None:
    """An existing folder wins over a store's name, as with a model's path and its hub id."""
    return Path(reference) if os.path.isdir(reference) else None


@hookimpl(tryfirst=True)
def reft_register_commands(cli: click.Group) -> None:
    from reft_plugins.cli import built_in_commands

    for command in built_in_commands():
        cli.add_command(command)


@hookimpl(tryfirst=True)
def reft_diagnose(report: Report) -> None:
    from reft_plugins.diagnosis import python_libraries

    python_libraries(report)
