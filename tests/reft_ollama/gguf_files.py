"""GGUF files of programs that weights hold exactly."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from reft_ollama.architectures.table import architecture_of
from reft_ollama.plan.planning import make_plan
from reft_ollama.tokenizers.conversion import convert_tokenizer
from reft_ollama.weights.assembly import assemble
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.gguf_file import write_gguf
from reft_plugins.program import Program


def write(base: Path, program: Program, target: Path, dtype: str = "f32") -> Path:
    """A GGUF file for a program that merges exactly."""
    config = AutoConfig.from_pretrained(base)
    architecture = architecture_of(config)
    plan = make_plan(program, architecture, config)
    assert plan.exact
    tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(base), config.vocab_size)
    weights = assemble(plan, Checkpoint(base), architecture, config)
    write_gguf(target, weights, architecture, tokenizer, dtype=dtype)
    return target
