"""Texts that llama.cpp takes for special tokens whatever a file says their type is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gguf

_ENDS = """
    </s> <eos> <EOT> _<EOT> [EOT] [EOS] [e~[ <turn|> <end_of_turn> <end_of_utterance> <|eot_id|> <|eom_id|> <|im_end|>
    <|end|> <|return|> <|call|> <|calls|> <|flush|> <|endoftext|> <|end_of_text|> <|tool_response> <|file_sep|> <PAD>
    [PAD] <REPO> <|fim_pad|> <fim-pad> <fim_pad> <|fim_repo|> <|repo_name|> <fim-repo> <reponame>
"""
_OTHERS = """
    <|fim_prefix|> <fim-prefix> <fim_prefix> <PRE> ▁<PRE> <|code_prefix|> <|prefix|> <|fim_suffix|> <fim-suffix>
    <fim_suffix> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> <|fim_middle|> <fim-middle> <fim_middle> <MID> ▁<MID>
    <|code_middle|> <|middle|> <|channel|> <|message|> <|start|> <|constrain|>
"""

ENDS_OF_ANSWERS = frozenset(_ENDS.split())
"""Answers end at these, also where they are ordinary text."""

OTHERS = frozenset(_OTHERS.split())


def hide(tokens: list[str], types: list[int], ids_of: Callable[[str], Sequence[int]]) -> list[str]:
    """Rename pieces of an ordinary vocabulary that are called like special tokens, where the tokenizer has no use for
    them (Qwen's `</s>`): its text would be cut out whole, and answers would end there.

    Args:
        tokens, types: of the file, changed in place; ids_of: what the tokenizer makes of a text.

    Returns:
        what stays different, in sentences.
    """
    warnings = []
    normal, named = int(gguf.TokenType.NORMAL), int(gguf.TokenType.USER_DEFINED)
    for index, token in enumerate(tokens):
        if types[index] == normal and (token in ENDS_OF_ANSWERS or token in OTHERS):
            if index in ids_of(token):
                warnings.append(f"llama.cpp takes {token} for a special token, the tokenizer for ordinary text")
            else:
                tokens[index], types[index] = f"[unused {token}]", int(gguf.TokenType.UNUSED)
        elif types[index] == named and token in ENDS_OF_ANSWERS:
            warnings.append(f"llama.cpp ends an answer at {token}, which is not special in the tokenizer")
    return warnings
