"""Published chat templates, conversations, and what Go's own text/template makes of exported TEMPLATEs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from reft_ollama.templates.jinja import DATE, Message, assistant, system, user

FOLDER = Path(__file__).parent / "chat_templates"
RENDERINGS = Path(__file__).parent / "go_renderings"
MORE = "REFT_CHAT_TEMPLATES"
"""An environment variable: a folder with more `*.jinja`, of models whose licences keep their templates out of here."""

TURNS = [
    user("How far is the moon?"),
    assistant("384,400 km.\nOn average."),
    user("And {{ the sun }}?"),
    assistant("150 million km"),
    user("Merci! \\ \"one\" 'two' <b> & 日本 👩‍👧"),
]
SYSTEM = system("Be brief.\n\nAnswer in English.")
CONVERSATIONS = [
    *(TURNS[:count] for count in (1, 3, 5)),
    *([SYSTEM, *TURNS[:count]] for count in (1, 3, 5)),
]


def published() -> dict[str, str]:
    """Chat templates by name."""
    folders = [FOLDER, *([Path(os.environ[MORE])] if MORE in os.environ else [])]
    return {path.stem: path.read_text("utf-8") for folder in folders for path in sorted(folder.glob("*.jinja"))}


def tokenizer_with(chat_template: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def rendered(tokenizer: Any, messages: Sequence[Message], **settings: Any) -> str:
    """By Jinja, on the day that exports are pinned to, without BOS."""
    from datetime import datetime

    settings = {"add_generation_prompt": True, **settings}
    day = datetime.strptime(DATE, "%d %b %Y")
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, date_string=DATE, strftime_now=day.strftime, **settings
    )
    return str(text).removeprefix("<s>")


def values(messages: Sequence[Message], think: bool | None = None) -> dict[str, Any]:
    """What Ollama gives a TEMPLATE for alternating messages."""
    return {
        "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
        "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
        "Think": bool(think),
        "IsThinkSet": think is not None,
    }


def render_with_go(cases: Sequence[dict[str, Any]], timeout: float = 300) -> list[str]:
    """What Go's text/template makes of `{"template", "values"}`; needs Go."""
    command = ["go", "run", str(RENDERINGS / "render.go")]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, timeout=timeout, check=True)
    found: list[str] = json.loads(done.stdout)
    return found
