"""Which versions `ls` shows."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from reft_plugins.errors import StoreError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*([^\s<>=!]+)\s*(?:(>=|<=|==|!=|=|>|<)\s*(\S+))?\s*")


class Described(Protocol):
    """What conditions are about: a version of a store, or of a remote."""

    @property
    def name(self) -> str:
        """Of the adapter."""

    @property
    def method(self) -> str:
        """As its manifest says."""

    @property
    def base(self) -> str | None:
        """As its manifest says; None where it is not known."""

    @property
    def tags(self) -> Sequence[str]:
        """Those that point to it."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the training record."""


@dataclass(frozen=True, slots=True)
class MetricCondition:
    """`accuracy>=0.9`, or `accuracy` for any value. A version without that metric never meets it."""

    name: str
    compare: Callable[[float, float], bool]
    value: float

    @classmethod
    def parse(cls, text: str) -> MetricCondition:
        """Read a condition.

        Raises:
            StoreError: when it is none.
        """
        match = _CONDITION.fullmatch(text)
        try:
            if match is not None and match[2] is None:
                return cls(match[1], lambda found, value: True, 0.0)
            if match is not None:
                return cls(match[1], _OPERATORS[match[2]], float(match[3]))
        except ValueError:
            pass
        raise StoreError(f"{text!r} is no condition on a metric. Write for example 'accuracy>=0.9', or 'accuracy'")

    def met_by(self, record: Described) -> bool:
        """Whether a version's training record meets it."""
        return self.name in record.metrics and self.compare(record.metrics[self.name], self.value)


@dataclass(frozen=True, slots=True)
class Filter:
    """All that is given has to hold. `name` and `base` may be patterns of the shell, such as `team/*`."""

    name: str | None = None
    method: str | None = None
    base: str | None = None
    tag: str | None = None
    metrics: tuple[MetricCondition, ...] = ()

    @classmethod
    def of(
        cls, name: str | None, method: str | None, base: str | None, tag: str | None, metrics: Iterable[str]
    ) -> Filter:
        """Read the conditions on metrics.

        Raises:
            StoreError: when one is malformed.
        """
        return cls(name, method, base, tag, tuple(map(MetricCondition.parse, metrics)))

    @property
    def takes_all(self) -> bool:
        """Whether nothing is asked for."""
        return (self.name, self.method, self.base, self.tag, self.metrics) == (None, None, None, None, ())

    def takes_name(self, name: str) -> bool:
        """Whether versions of a name can be meant at all."""
        return self.name is None or fnmatchcase(name, self.name)

    def takes(self, record: Described) -> bool:
        """Whether a version is meant."""
        return (
            self.takes_name(record.name)
            and self.method in (None, record.method)
            and (self.base is None or fnmatchcase(record.base or "", self.base))
            and (self.tag is None or self.tag in record.tags)
            and all(each.met_by(record) for each in self.metrics)
        )
