"""Defines the sections of a typed config: frozen dataclasses whose field types state the allowed values.

A field's type is int, float, bool, str, a tuple of these, a `Literal`, a dictionary, another section, or one of them
`Annotated` with an `Allowed`. A section is read from a nested dictionary, and written as JSON beside a run.
"""

import dataclasses
import json
import math
import os
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from favchat_jax.errors import UserError

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The allowed values of a field.

    Attributes:
        holds: returns whether a value is allowed.
        otherwise: text of the message after FIELD=VALUE.
    """

    holds: Callable[[Any], bool]
    otherwise: str


def at_least(least: int) -> Allowed:
    """Allows numbers of at least `least`."""
    return Allowed(lambda value: value >= least, f" is too small: give at least {least}")


Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
Positive = Annotated[float, Allowed(lambda value: 0 < value < math.inf, ": give a number above 0")]
NotNegative = Annotated[float, Allowed(lambda value: 0 <= value < math.inf, ": give a number of at least 0")]
Share = Annotated[float, Allowed(lambda value: 0 <= value <= 1, " is a share: give a number from 0 to 1")]
# A file or folder; `~` at its start becomes the user's home. Empty if it is not set.
Place = Annotated[str, Allowed(lambda path: "\0" not in path, ": a path has no zero character; remove it")]
ShareBelowOne = Annotated[float, Allowed(lambda value: 0 <= value < 1, " is a share: give 0 to less than 1")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all sections, which check their fields when they are made.

    Raises:
        UserError: a value has the wrong type or is not allowed. The message begins with the field.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check(field.name, value, field.type)
            if value and _required(field.type) is Place:
                object.__setattr__(self, field.name, os.path.expanduser(value))

    @classmethod
    def read(cls, fields: Mapping[str, Any], *, ignore_unknown: bool = False) -> Self:
        """Makes a section from a nested dictionary; a missing field takes its default value.

        Raises:
            UserError: a value is not allowed, a field without a default is missing, or a field is unknown.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in [] if ignore_unknown else sorted(fields.keys() - known.keys()):
            raise UserError(f"{name} is not a field of the config: correct its name or remove it")
        for name, field in known.items():
            if name not in fields and field.default is field.default_factory is dataclasses.MISSING:
                raise UserError(f"{name} is missing in the config")
        return cls(**{k: _read(k, v, known[k].type, ignore_unknown) for k, v in fields.items() if k in known})

    def places(self) -> dict[str, str]:
        """Returns the files and folders that the section and its sections name, by path of the field."""
        found: dict[str, str] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Section):
                found |= {f"{field.name}.{name}": place for name, place in value.places().items()}
            elif value and _required(field.type) is Place:
                found[field.name] = value
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON: nested dictionaries, lists for tuples, without fields that are None."""
        return _without_nones(json.loads(json.dumps(dataclasses.asdict(self))))

    def updated(self, changes: Mapping[str, Any]) -> Self:
        """Returns a copy with other values at some paths, for example {"data.flip": True}.

        Raises:
            UserError: a path is unknown, or a value is not allowed.
        """
        fields = dataclasses.asdict(self)
        for path, value in changes.items():
            *sections, name = path.split(".")
            place: Any = fields
            for section in sections:
                place = place.get(section) if isinstance(place, dict) else None
            if not isinstance(place, dict) or name not in place:
                raise UserError(f"unknown config option: {path}")
            place[name] = value
        return type(self).read(fields)


def _read(name: str, value: Any, kind: Any, ignore_unknown: bool) -> Any:
    """Converts a field's value to the section's types; messages about its content begin with the field's name."""
    kind = _required(kind)
    try:
        if isinstance(kind, type) and issubclass(kind, Section) and isinstance(value, Mapping):
            return kind.read(value, ignore_unknown=ignore_unknown)
        if get_origin(kind) is Mapping and value is not None:
            if not isinstance(value, Mapping):
                raise UserError(f"{name}={value!r} is not a section of fields")
            return {key: _read(key, item, get_args(kind)[1], ignore_unknown) for key, item in value.items()}
    except UserError as error:
        raise UserError(f"{name}.{error}") from None
    return tuple(value) if isinstance(value, list) else value


def _check(name: str, value: Any, kind: Any) -> None:
    """Raises UserError unless a value has a field's type."""
    if value is None and _required(kind) is not kind:
        return
    kind = _required(kind)
    if get_origin(kind) is Annotated:
        kind, *limits = get_args(kind)
        _check(name, value, kind)
        for limit in limits:
            if not limit.holds(value):
                raise UserError(f"{name}={value}{limit.otherwise}")
    elif get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = ", ".join(choice or "nothing" for choice in get_args(kind))
            raise UserError(f"{name}={value} is unknown: choose one of {choices}")
    elif get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if not isinstance(value, tuple) or not all(_is(item, inner) for item in value):
            raise UserError(f"{name}={value}: give {KINDS[inner].removeprefix('a ')}s, as in (1,2)")
    elif kind in KINDS and not _is(value, kind):
        raise UserError(f"{name}={value!r} is not {KINDS[kind]}")
    elif isinstance(kind, type) and issubclass(kind, Section) and not isinstance(value, kind):
        raise UserError(f"{name}={value!r} is not a section of fields")


def _required(kind: Any) -> Any:
    """Returns X of `X | None`, and any other type unchanged."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not types.NoneType)
    return kind


def _is(value: Any, kind: type) -> bool:
    """Returns whether a value has a plain type. A whole number is also a number; True is neither."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int | float if kind is float else kind)


def _without_nones(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nones(item) for name, item in value.items() if item is not None}
    return value
