"""Adapters of a store behind Ray Serve LLM: clients ask for `MODEL:NAME:TAG` and the replica loads that version.

Run from the repository's root: BASE=... REFT_STORE=... serve run examples.ray_serve.app:app
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from typing import Any

from fastapi import HTTPException
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.utils.lora_serve_utils import LoraModelLoader
from ray.serve.llm import LLMConfig, LLMServer, LoraConfig, build_openai_app

from reft_plugins.errors import ReftError
from reft_plugins.references import resolve

MODEL = "base"
_numbers = itertools.count(1)


class StoreLoader(LoraModelLoader):
    """Finds adapters in the store instead of a bucket; the plugin in the engine checks and serves them."""

    async def load_model_from_config(self, lora_model_id: str, llm_config: LLMConfig) -> DiskMultiplexConfig:
        """What Ray Serve asks when a replica first gets a request for `MODEL:REFERENCE`."""
        reference = lora_model_id.removeprefix(f"{MODEL}:")
        try:
            path = await asyncio.to_thread(resolve, reference)
        except ReftError as error:
            raise HTTPException(404, str(error)) from None
        return DiskMultiplexConfig(
            model_id=lora_model_id,
            max_total_tokens=None,
            local_path=str(path),
            lora_assigned_int_id=next(_numbers),
        )


class StoreServer(LLMServer):
    """Ray Serve's replica of an engine, with the loader above."""

    async def __init__(self, llm_config: LLMConfig, **options: Any) -> None:
        await super().__init__(llm_config, **{**options, "model_downloader": StoreLoader})


def config(base: str) -> LLMConfig:
    """One engine for `base`; what adapters may change is named as for `vllm serve`.

    Settings of `ENGINE`, a JSON object, are added to the engine's.
    """
    engine = {
        "enable_lora": True,
        "max_loras": 8,
        "max_cpu_loras": 64,
        "max_lora_rank": 16,
        "additional_config": {"reft": {"sites": ["block_output", "virtual_tokens"]}},
        **json.loads(os.environ.get("ENGINE", "{}")),
    }
    return LLMConfig(
        model_loading_config={"model_id": MODEL, "model_source": base},
        engine_kwargs=engine,
        lora_config=LoraConfig(max_num_adapters_per_replica=64),
        accelerator_type=os.environ.get("ACCELERATOR"),
        accelerator_config=None if os.environ.get("ACCELERATOR") else {"kind": "cpu"},
        server_cls=StoreServer,
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        runtime_env={"env_vars": {name: os.environ[name] for name in ("REFT_STORE",) if name in os.environ}},
    )


app = build_openai_app({"llm_configs": [config(os.environ["BASE"])]})
