"""The throw-away plugin, installed where this process and every process of an engine finds it."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
from third_party import environment_with, install_steering_demo

from reft_plugins import plugins


@pytest.fixture(scope="module")
def steering_plugin(tmp_path_factory):
    target = install_steering_demo(tmp_path_factory.mktemp("plugin") / "site")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = environment_with(target)["PYTHONPATH"]
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()
    plugins.manager.cache_clear()
    yield target
    sys.path.remove(str(target))
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    sys.modules.pop("reft_steering", None)
    plugins.manager.cache_clear()
