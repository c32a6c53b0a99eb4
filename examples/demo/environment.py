"""Where the demo keeps its files, and the environment it needs, set before torch and vLLM are imported."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(".cache") / "demo"
BASE_VARIABLE = "MODEL"


@dataclass(frozen=True, slots=True)
class Workspace:
    """Folders of one base model.

    Attributes:
        base: folder or hub id of the base model.
        own: whether the base is the demo's, which it trains itself.
        folder: holds `adapters`, `data`, `ollama` and `store`.
    """

    base: str
    own: bool
    folder: Path

    @classmethod
    def from_environment(cls) -> Workspace:
        """The demo's own base model, or the one that `MODEL` names."""
        chosen = os.environ.get(BASE_VARIABLE, "").strip()
        if not chosen:
            return cls(str(CACHE / "base"), True, CACHE)
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", chosen).strip("-.")[-40:]
        digest = hashlib.sha256(chosen.encode()).hexdigest()[:8]
        return cls(chosen, False, CACHE / "models" / f"{slug}-{digest}")

    @property
    def store(self) -> Path:
        """Folder of the store."""
        return self.folder / "store"


def prepare(workspace: Workspace) -> None:
    """Set what the libraries read from the environment; what the user has set stays, but for the store."""
    os.environ["REFT_STORE"] = str(workspace.store.resolve())
    defaults = {
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for work leave the core to others
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "VLLM_CACHE_ROOT": str((CACHE / "vllm").resolve()),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if workspace.own or Path(workspace.base).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
