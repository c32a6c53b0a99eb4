"""Whether the trust policy lets a version be used. Asked by everything that hands versions to runtimes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from adapters_store.layout.contents import unpack
from adapters_store.limits import MAX_SIGNATURES
from adapters_store.trust.policy import Policy, active
from adapters_store.trust.signing import judge, signatures
from reft_plugins.errors import ReftError, StoreError, UntrustedError

if TYPE_CHECKING:
    from adapters_store.verbs.reading import Reading

NO_POLICY = "no policy"
"""What stands for a rule where there is no policy."""

_REMEMBERED = 4096
_admitted: OrderedDict[tuple[object, ...], None] = OrderedDict()
_lock = Lock()


def admit(store: Reading, name: str, digest: str, files: Mapping[str, str], policy: Policy | None = None) -> None:
    """Refuse a version that the policy does not admit; without a policy every version is admitted.

    What was admitted once is remembered by the digests of the version, the policy with its keys, and the signatures,
    for as long as the process lives; what was refused is looked at again.

    Args:
        name: under which the version was asked for.
        digest: of its image manifest.
        files: digest by name, of the very files that are about to be handed out.
        policy: instead of the active one.

    Raises:
        UntrustedError: saying what is missing or wrong, and how to go on.
    """
    policy = policy or active()
    if policy is None:
        return
    rule = policy.rule_for(name)
    if rule.verdict == "allow":
        return
    reference = f"{name}@{digest}"
    if rule.verdict == "refuse":
        raise UntrustedError(
            f"{store.find(reference).reference}: the policy {policy.path} has no rule that admits the name {name!r}. "
            "Add one, or use an adapter of a name that it admits"
        )
    facts = (str(store.root), digest, policy.digest, rule.number, *files.items())
    try:
        if _was_admitted((*facts, *(each.descriptor.digest for each in signatures(store, reference)[:MAX_SIGNATURES]))):
            return
        verdict = judge(store, reference, files, rule.keys)
    except StoreError as error:
        raise UntrustedError(f"{reference}: its signatures cannot be checked: {error}") from None
    if len(verdict.signers) < rule.at_least:
        named = store.find(reference).reference
        raise UntrustedError(
            f"{named}: not admitted by the policy {policy.path}, {rule}: {verdict.explain()}. Sign it with "
            f"`reft store sign {named} --key …`, or pull it with its signatures from where it was published"
        )
    _remember((*facts, *(each.digest for each in verdict.signatures)))


def _was_admitted(facts: tuple[object, ...]) -> bool:
    with _lock:
        if facts in _admitted:
            _admitted.move_to_end(facts)
        return facts in _admitted


def _remember(facts: tuple[object, ...]) -> None:
    with _lock:
        _admitted[facts] = None
        while len(_admitted) > _REMEMBERED:
            _admitted.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy says of one version; `problem` is None where it admits it."""

    reference: str
    rule: str
    problem: str | None

    @property
    def admitted(self) -> bool:
        """True when runtimes get it."""
        return self.problem is None

    def explain(self) -> str:
        """In one line."""
        if self.problem is not None:
            return f"refused: {self.problem}"
        return "admitted, as there is no policy" if self.rule == NO_POLICY else f"admitted by {self.rule}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "admitted": self.admitted}


def decisions(store: Reading, policy: Policy | None, reference: str | None = None) -> Iterator[Decision]:
    """What a policy says of one version, or of every version; without a policy it is admitted.

    Raises:
        UnknownReferenceError: when there is no such version, listing what exists.
    """
    for record in store.list() if reference is None else (store.find(reference),):
        rule = NO_POLICY if policy is None else str(policy.rule_for(record.name))
        try:
            if policy is not None:
                contents = unpack(store.blobs, store.descriptor(f"{record.name}@{record.digest}"))
                files = {name: each.digest for name, each in contents.files.items()}
                admit(store, record.name, record.digest, files, policy)
            yield Decision(record.reference, rule, None)
        except ReftError as error:
            yield Decision(record.reference, rule, str(error).removeprefix(f"{record.reference}: "))
