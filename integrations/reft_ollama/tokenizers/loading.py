"""Loading a base model's tokenizer in the form that is written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEKKEN = "tekken.json"
FILES = ("tokenizer.json", "tokenizer.model*", TEKKEN, "vocab.json", "merges.txt", "*.tiktoken")
"""What tokenizers are stored in; where there is none of these, transformers makes an empty one of some classes."""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder.

    Where Mistral's own package is installed, transformers prefers it for folders with a `tekken.json`; it gives the
    same tokens but cannot be looked into, so those folders are read here.

    Raises:
        ExportError: the folder has no tokenizer, or none that is known.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any(any(directory.glob(pattern)) for pattern in FILES):
        raise ExportError(f"{directory}: no tokenizer there ({', '.join(FILES)}). Copy the base model's files into it")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # tokenizers raises bare ones
        reason = str(error).partition("\n")[0]
        raise ExportError(f"{directory}: transformers cannot load its tokenizer: {reason}") from None
    if hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer
    if (directory / "tokenizer.json").is_file():
        fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(directory)
        return fast
    if (directory / TEKKEN).is_file():
        return _from_tekken(directory, tokenizer)
    return tokenizer


def _from_tekken(directory: Path, preferred: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.mistral.tokenizer import MistralConverter

    backend = MistralConverter(str(directory / TEKKEN)).converted()
    first = (str(preferred.bos_token), preferred.bos_token_id)
    backend.post_processor = processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    names = {f"{role}_token": getattr(preferred, f"{role}_token", None) for role in ("bos", "eos", "unk", "pad")}
    template = directory / "chat_template.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template.read_text("utf-8") if template.is_file() else None,
        **{role: name for role, name in names.items() if name is not None},
    )
