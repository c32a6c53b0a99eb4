"""Writing a transformers tokenizer into a GGUF file so that llama.cpp gives the same tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gguf

from reft_ollama.tokenizers.added_tokens import AddedTokens, file_name
from reft_ollama.tokenizers.control_names import hide
from reft_ollama.tokenizers.pretokenizers import Splitter, find_splitter
from reft_ollama.tokenizers.sentencepiece import WAY_OUT, looks_like_sentencepiece, piece_scores, space_prefix
from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKENS = {f"<0x{value:02X}>" for value in range(256)}
_NOT_WRITTEN = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


@dataclass(slots=True)
class GgufTokenizer:
    """What a file stores about the tokenizer.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece); pre: name of the text splitter, BPE only.
        tokens, types: one per row of the embedding; scores: SentencePiece only; merges: BPE only.
        special: ids by role (`bos`, `eos`, `unk`, `pad`).
        strips_right: whether white space behind added tokens is dropped, which `file_name` must then say.
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
    strips_right: bool = False
    warnings: list[str] = field(default_factory=list)

    def file_name(self, name: str) -> str:
        """`general.name` for a model called `name`; llama.cpp takes a property of the tokenizer from it."""
        return file_name(name, self.strips_right)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add all of it as key/value pairs; the name is the caller's to write."""
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
        rows: rows of the embedding; ids without a token become unused ones, added tokens without a row are left out.

    Raises:
        ExportError: naming what llama.cpp cannot express.
    """
    definition = _definition(tokenizer)
    _check_rows(definition, rows)
    sentencepiece = looks_like_sentencepiece(definition)
    splitter = Splitter() if sentencepiece else find_splitter(definition)
    added = AddedTokens.of(definition, rows, sentencepiece)
    prefix = space_prefix(definition, _chat(tokenizer)) if sentencepiece else None
    add_bos, add_eos = _added_around(tokenizer)
    tokens, types = _vocabulary(definition, added, rows)
    taken = hide(tokens, types, lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    normalizer = tokenizer.backend_tokenizer.normalizer
    return GgufTokenizer(
        model="llama" if sentencepiece else "gpt2",
        pre=splitter.name,
        tokens=tokens,
        types=types,
        scores=piece_scores(definition, rows, added.cut_out) if sentencepiece else None,
        merges=[] if sentencepiece else [_merge(pair) for pair in definition["model"]["merges"]],
        special=_special_ids(tokenizer, rows),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=prefix is not None and prefix.add,
        chat_template=_chat_template(tokenizer),
        strips_right=added.strips_right,
        warnings=[
            *added.differences(normalizer.normalize_str if normalizer else lambda text: text),
            *(prefix.differences if prefix else ()),
            *splitter.differences,
            *taken,
        ],
    )


def _definition(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"tokenizer: {type(tokenizer).__name__} has no tokenizer.json. Save it once as a fast tokenizer with "
            "AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)"
        )
    definition: dict[str, Any] = json.loads(backend.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"tokenizer: a {model['type']} model; the export writes BPE and SentencePiece-BPE tokenizers. {WAY_OUT}"
        )
    if settings := [f"{name} {model[name]!r}" for name in _NOT_WRITTEN if model.get(name)]:
        raise ExportError(f"tokenizer: llama.cpp's BPE has no {', '.join(settings)}. {WAY_OUT}")
    return definition


def _check_rows(definition: dict[str, Any], rows: int) -> None:
    last = max(definition["model"]["vocab"].values(), default=-1)
    if last >= rows:
        raise ExportError(f"tokenizer: token id {last} has no row in the embedding, which has {rows}")


def _vocabulary(definition: dict[str, Any], added: AddedTokens, rows: int) -> tuple[list[str], list[int]]:
    """Token and type of each row. Texts are unique, as llama.cpp stops the process where two are equal."""
    tokens: list[str | None] = [None] * rows
    types = [int(gguf.TokenType.UNUSED)] * rows
    for token, index in definition["model"]["vocab"].items():
        if tokens[index] is None or token in _BYTE_TOKENS:
            tokens[index] = token
            types[index] = int(_ordinary_type(token, added))
    for entry in added.entries:
        tokens[entry["id"]], types[entry["id"]] = added.text(entry), int(added.token_type(entry))
    used = {token for token in tokens if token is not None}
    for index, token in enumerate(tokens):
        if token is None:
            name = f"[PAD{index}]"
            tokens[index] = name if name not in used else f"[PAD{index}, unused]"
    found = [str(token) for token in tokens]
    if len(set(found)) < rows:
        twice = next(token for token in found if found.count(token) > 1)
        raise ExportError(f"tokenizer: two of its tokens are {twice!r} in a GGUF file. {WAY_OUT}")
    return found, types


def _ordinary_type(token: str, added: AddedTokens) -> gguf.TokenType:
    if not added.sentencepiece:
        return gguf.TokenType.NORMAL
    if token in (added.unknown, "<unk>"):
        return gguf.TokenType.UNKNOWN
    return gguf.TokenType.BYTE if token in _BYTE_TOKENS else gguf.TokenType.NORMAL


def _merge(pair: str | list[str]) -> str:
    """A merge as llama.cpp reads it: two parts with a space between, spaces inside parts in byte-level spelling."""
    return pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair)


def _special_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")}
    return {role: token for role, token in roles.items() if token is not None and token < rows}


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


def _chat(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A conversation as the chat template renders it."""
    import jinja2

    if _chat_template(tokenizer) is None:
        return None
    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": "reft"}], tokenize=False))
    except jinja2.TemplateError:
        return None
