"""Writing a transformers tokenizer into a GGUF file so that llama.cpp gives the same tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gguf

from reft_ollama.tokenizers.pretokenizers import pretokenizer_name
from reft_ollama.tokenizers.sentencepiece import looks_like_sentencepiece, piece_scores, space_prefix
from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKENS = {f"<0x{value:02X}>" for value in range(256)}


@dataclass(slots=True)
class GgufTokenizer:
    """What a file stores about the tokenizer.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece); pre: name of the text splitter, BPE only.
        tokens, types: one per row of the embedding; scores: SentencePiece only; merges: BPE only.
        special: ids by role (`bos`, `eos`, `unk`, `pad`).
        warnings: what llama.cpp does differently, in words.
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None
    warnings: list[str] = field(default_factory=list)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add all of it as key/value pairs."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre or "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def convert_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> GgufTokenizer:
    """Translate a fast tokenizer.

    Args:
        rows: rows of the embedding; ids without a token become unused ones.

    Raises:
        ExportError: naming what llama.cpp cannot express.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"tokenizer: {type(tokenizer).__name__} has no tokenizer.json. Save it once as a fast tokenizer with "
            "AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)"
        )
    definition: dict[str, Any] = json.loads(backend.to_str())
    if definition["model"]["type"] != "BPE":
        raise ExportError(
            f"tokenizer: a {definition['model']['type']} model; the export writes BPE and SentencePiece-BPE tokenizers"
        )
    add_bos, add_eos = _added_around(tokenizer)
    vocabulary = {**definition["model"]["vocab"], **{t["content"]: t["id"] for t in definition["added_tokens"]}}
    if max(vocabulary.values()) >= rows:
        raise ExportError(
            f"tokenizer: token id {max(vocabulary.values())} has no row in the embedding, which has {rows}"
        )
    sentencepiece = looks_like_sentencepiece(definition)
    result = GgufTokenizer(
        model="llama" if sentencepiece else "gpt2",
        pre=None if sentencepiece else pretokenizer_name(definition),
        tokens=[f"[PAD{index}]" for index in range(rows)],
        types=[int(gguf.TokenType.UNUSED)] * rows,
        scores=piece_scores(definition, rows) if sentencepiece else None,
        merges=[] if sentencepiece else [_merge(pair) for pair in definition["model"]["merges"]],
        special=_special_ids(tokenizer),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=sentencepiece and space_prefix(definition),
        chat_template=_chat_template(tokenizer),
    )
    for token, index in vocabulary.items():
        result.tokens[index] = token
        result.types[index] = int(_ordinary_type(token, definition, sentencepiece))
    for added in definition["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        unknown = sentencepiece and added["content"] == definition["model"].get("unk_token")
        result.types[added["id"]] = int(gguf.TokenType.UNKNOWN if unknown else kind)
    result.warnings += _differences(definition)
    return result


def _ordinary_type(token: str, definition: dict[str, Any], sentencepiece: bool) -> gguf.TokenType:
    if not sentencepiece:
        return gguf.TokenType.NORMAL
    if token == definition["model"].get("unk_token"):
        return gguf.TokenType.UNKNOWN
    return gguf.TokenType.BYTE if token in _BYTE_TOKENS else gguf.TokenType.NORMAL


def _merge(pair: str | list[str]) -> str:
    """A merge as llama.cpp reads it: two parts with a space between, spaces inside parts in byte-level spelling."""
    return pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")}
    return {role: token for role, token in roles.items() if token is not None}


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts its BOS in front of and its EOS behind every text, seen from what it does."""
    probe = "reft"
    plain = tokenizer(probe, add_special_tokens=False).input_ids
    full = tokenizer(probe).input_ids
    for bos in (False, True):
        for eos in (False, True):
            front = [tokenizer.bos_token_id] if bos else []
            back = [tokenizer.eos_token_id] if eos else []
            if full == [*front, *plain, *back]:
                return bos, eos
    raise ExportError(
        f"tokenizer: it turns {probe!r} into {tokenizer.convert_ids_to_tokens(full)}; a GGUF file can only put BOS "
        f"{tokenizer.bos_token!r} in front and EOS {tokenizer.eos_token!r} behind"
    )


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _differences(definition: dict[str, Any]) -> list[str]:
    found = []
    stripped = [t["content"] for t in definition["added_tokens"] if t.get("lstrip") or t.get("rstrip")]
    if stripped:
        found.append(f"llama.cpp keeps the spaces around {', '.join(stripped)}, which the tokenizer drops")
    if (definition.get("normalizer") or {}).get("type") == "NFC":
        found.append("llama.cpp does not compose Unicode (NFC) before tokenizing; text that is not NFC differs")
    return found
