"""Descriptors for constructor arguments, which are checked whenever they are set."""

from __future__ import annotations

import math
from typing import Any, Generic, TypeVar, overload

from mtlfast._numbers import is_finite, plain, shown

T = TypeVar("T")


class Setting(Generic[T]):
    """An attribute that raises for a value that it cannot hold. Scalars of numpy and torch become Python's."""

    expected: str

    def holds(self, value: Any) -> bool:
        """Whether the attribute may be set to `value`."""
        raise NotImplementedError

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Setting[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Setting[T] | T:
        if instance is None:
            return self
        value: T = instance.__dict__[f"_{self.name}"]
        return value

    def __set__(self, instance: object, value: T) -> None:
        if not self.holds(value):
            raise ValueError(f"{type(instance).__name__}: {self.name} is {shown(value)}, expected {self.expected}")
        instance.__dict__[f"_{self.name}"] = plain(value)


class Real(Setting[float]):
    """A finite number from `least` to `most`. `least_itself` and `most_itself` say whether the ends are allowed."""

    def __init__(
        self, least: float = -math.inf, most: float = math.inf, least_itself: bool = True, most_itself: bool = True
    ) -> None:
        self.least, self.most = least, most
        self.least_itself, self.most_itself = least_itself, most_itself
        if most == math.inf:
            self.expected = f"a number {'of at least' if least_itself else 'above'} {least:g}"
        else:
            ends = "[" if least_itself else "(", "]" if most_itself else ")"
            self.expected = f"a number in {ends[0]}{least:g}, {most:g}{ends[1]}"

    def holds(self, value: Any) -> bool:
        value = plain(value)
        if not is_finite(value):
            return False
        if value in (self.least, self.most):
            return self.least_itself if value == self.least else self.most_itself
        return bool(self.least < value < self.most)


class Whole(Setting[int]):
    """An integer of at least `least`."""

    def __init__(self, least: int) -> None:
        self.least, self.expected = least, f"an integer of at least {least}"

    def holds(self, value: Any) -> bool:
        value = plain(value)
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.least


class Choice(Setting[T]):
    """One of a few values."""

    def __init__(self, *values: T) -> None:
        self.values = values
        self.expected = f"{', '.join(map(repr, values[:-1]))} or {values[-1]!r}"

    def holds(self, value: Any) -> bool:
        value = plain(value)
        alike = isinstance(value, (str, int, float)) and any(
            value == x and isinstance(value, bool) == isinstance(x, bool) for x in self.values
        )
        return alike or any(value is x for x in self.values)


class Or(Setting[Any]):
    """A value that another setting holds, or one of a few other values."""

    def __init__(self, setting: Setting[Any], *values: object) -> None:
        self.setting, self.values = setting, values
        self.expected = " or ".join([setting.expected, *map(repr, values)])

    def holds(self, value: Any) -> bool:
        """Whether the value is one of the others, or the setting holds it."""
        value = plain(value)
        if any(value is x for x in self.values) or (isinstance(value, str) and value in self.values):
            return True
        return self.setting.holds(value)
