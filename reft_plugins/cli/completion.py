"""`reft completion`, and the completion of references that plugins offer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

VARIABLE = "_REFT_COMPLETE"
SHELLS = ("bash", "zsh", "fish")

_BASH = r"""%(complete_func)s() {
    local IFS=$'\n' completion
    COMPREPLY=()
    for completion in $(COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \
%(complete_var)s=bash_complete "$1" 2>/dev/null); do
        case "${completion%%%%,*}" in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            *) COMPREPLY+=("${completion#*,}") ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _WholeWords(ShellComplete):
    """Click's completion of `--option=value` gives the value alone, with which shells replace the whole word."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """The completions, each as the whole word."""
        option = re.match("-[^=]*=", incomplete)
        found = super().get_completions(args, incomplete)
        if option is None:
            return found
        return [CompletionItem(option[0] + item.value, item.type, item.help) for item in found]


@add_completion_class
class Bash(_WholeWords, BashComplete):
    """Click's, except that words with ':', '@' and '=' are completed: bash takes such a word for several."""

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one being typed, and that one up to the cursor."""
        line = os.environ.get("COMP_LINE", "")
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1:].isspace() else ""
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        return words[1:], incomplete

    def complete(self) -> str:
        """The completions, without what bash does not count to the word any more."""
        args, incomplete = self.get_completion_args()
        settled = incomplete[: _settled(incomplete, os.environ.get("COMP_LINE", ""))]
        found = self.get_completions(args, incomplete)
        return "\n".join(f"{item.type},{item.value.removeprefix(settled)}" for item in found)


@add_completion_class
class Zsh(_WholeWords, ZshComplete):
    """Click's, with whole words."""


@add_completion_class
class Fish(_WholeWords, FishComplete):
    """Click's, with whole words."""


def _settled(word: str, line: str) -> int:
    """How much of a word bash leaves as it is: up to the last separator, which it keeps with the rest if it is '@'."""
    separators = set(":=@") & set(os.environ.get("COMP_WORDBREAKS", ""))
    quoted = re.search(r"""(?:^|\s)["'][^"']*\Z""", line) is not None
    last = -1 if quoted else max((word.rfind(each) for each in separators), default=-1)
    return last + (word[last] != "@") if last >= 0 else 0


def references(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """For `shell_complete=`: references of every plugin, and folders. Never raises, whatever a plugin does."""
    if incomplete.startswith((".", "/", "~")):
        return [CompletionItem(incomplete, type="dir")]
    from reft_plugins.plugins import manager

    found: list[str] = []
    for implementation in manager().hook.reft_complete_reference.get_hookimpls():
        try:
            offered: Any = implementation.function(incomplete)
            found += offered or ()
        except Exception:
            continue  # nothing may be written into the line that is being typed
    return items(found, incomplete) or [CompletionItem(incomplete, type="dir")]


def named_references(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """For `shell_complete=` of `NAME=REFERENCE`."""
    name, equals, reference = incomplete.partition("=")
    if not equals:
        return []
    return [
        CompletionItem(f"{name}={item.value}", type=item.type) for item in references(context, parameter, reference)
    ]


def items(texts: Iterable[str], incomplete: str) -> list[CompletionItem[str]]:
    """The distinct texts that begin like what was typed."""
    return [CompletionItem(text) for text in dict.fromkeys(texts) if text.startswith(incomplete)]


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print a script that completes commands, options and references of the store in SHELL.

    \b
    bash: eval "$(reft completion bash)"             in ~/.bashrc
    zsh:  eval "$(reft completion zsh)"              in ~/.zshrc, after compinit
    fish: reft completion fish > ~/.config/fish/completions/reft.fish

    Example: eval "$(reft completion bash)"
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "reft", VARIABLE).source(), nl=False)
