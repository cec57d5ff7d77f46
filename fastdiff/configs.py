"""Strict conversion of configs to plain dictionaries (JSON) and back.

Unknown keys, missing keys and values of the wrong type raise a ValueError that names the field, as
in ``unet.channel_mult[2]: expected int, got 'two'``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs
from cattrs.strategies import configure_union_passthrough

Config = TypeVar("Config")
LATER = {"later": True}
"""Metadata for a field added after files with this config had been written: `to_dict` omits it when
it has its default value, so that the hash of an old config does not change."""


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config dataclass into dictionaries, lists, strings, numbers, booleans and None.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Size:
    ...     width: int = 3
    >>> to_dict(Size())
    {'width': 3}
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"expected a config dataclass, got {type(config).__name__}")
    return _converter().unstructure(config)


def from_dict(cls: type[Config], data: Any) -> Config:
    """Build ``cls`` from the output of :func:`to_dict`.

    Raises:
        ValueError: a value is unknown, missing or of the wrong type. The message is one line and
            contains the path of the field.
    """
    try:
        return _converter().structure(data, cls)
    except Exception as error:
        raise ValueError(f"{_name(cls)}: " + "; ".join(_describe(error))) from error


@functools.cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(
        forbid_extra_keys=True, unstruct_collection_overrides={Sequence: list, tuple: list}
    )
    for kind, accepted in {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.items():
        converter.register_structure_hook(kind, _strict(kind, accepted))
    converter.register_structure_hook_factory(lambda cls: get_origin(cls) is tuple, _strict_tuple)
    converter.register_structure_hook_factory(
        lambda cls: get_origin(cls) is Literal, _strict_literal
    )
    converter.register_structure_hook_factory(_is_dataclass, _strict_dataclass)
    converter.register_unstructure_hook_factory(_has_later_fields, _without_later_defaults)
    configure_union_passthrough(str | bool | int | float | None, converter)
    return converter


def _has_later_fields(cls: Any) -> bool:
    kind = get_origin(cls) or cls
    return dataclasses.is_dataclass(kind) and any(
        "later" in field.metadata for field in dataclasses.fields(kind)
    )


def _without_later_defaults(cls: Any, converter: cattrs.Converter) -> Callable[[Any], Any]:
    kind = get_origin(cls) or cls
    later = {field.name for field in dataclasses.fields(kind) if "later" in field.metadata}
    overrides: Any = {name: cattrs.gen.override(omit_if_default=True) for name in later}
    unstructure: Callable[[Any], Any] = cattrs.gen.make_dict_unstructure_fn(
        cls, converter, **overrides
    )
    return unstructure


def _strict(kind: type, accepted: tuple[type, ...]) -> Callable[[Any, Any], Any]:
    """Reject other types: by default cattrs would accept ``int("3")`` and ``bool("no")``."""

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"expected {kind.__name__}, got {_short(value)}")
        return kind(value)

    return structure


def _strict_tuple(cls: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Reject strings: by default cattrs would take their letters as the items of a tuple."""
    kinds = get_args(cls)
    variadic = len(kinds) == 2 and kinds[1] is Ellipsis

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"expected a list, got {_short(value)}")
        if not variadic and len(value) != len(kinds):
            raise ValueError(f"expected {len(kinds)} values, got {len(value)}: {_short(value)}")
        items = []
        for index, (item, kind) in enumerate(
            zip(value, kinds[:1] * len(value) if variadic else kinds, strict=True)
        ):
            try:
                items.append(converter.structure(item, kind))
            except Exception as error:
                raise _ItemError(index) from error
        return tuple(items)

    return structure


class _ItemError(ValueError):
    """Position of a tuple item that failed to convert; ``__cause__`` is the failure."""

    def __init__(self, index: int) -> None:
        super().__init__(f"item {index}")
        self.index = index


def _strict_literal(cls: Any, _: cattrs.Converter) -> Callable[[Any, Any], Any]:
    choices = get_args(cls)

    def structure(value: Any, _: Any) -> Any:
        # True == 1, so compare the types too.
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise ValueError(
                f"expected one of {', '.join(map(repr, choices))}, got {_short(value)}"
            )
        return value

    return structure


def _is_dataclass(cls: Any) -> bool:
    """Whether ``cls`` is a dataclass, or a parametrised generic one such as ``Run[Size]``."""
    return dataclasses.is_dataclass(get_origin(cls) or cls)


def _strict_dataclass(cls: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    inner = cattrs.gen.make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True)

    def structure(value: Any, kind: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(
                f"expected an object with the fields of {_name(cls)}, got {_short(value)}"
            )
        return inner(value, kind)

    return structure


def _describe(error: BaseException, path: str = "") -> list[str]:
    """Format each leaf of cattrs' tree of errors as ``path: what is wrong``."""
    if isinstance(error, cattrs.ClassValidationError):
        noted, other = error.group_exceptions()
        lines = [line for inner, note in noted for line in _describe(inner, _join(path, note.name))]
        return lines + [line for inner in other for line in _describe(inner, path)]
    if isinstance(error, _ItemError):
        assert error.__cause__ is not None
        return _describe(error.__cause__, f"{path}[{error.index}]")
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = ", ".join(field.name for field in dataclasses.fields(error.cl))
        return [
            f"{_join(path, name)}: unknown field (known: {known})"
            for name in sorted(error.extra_fields)
        ]
    if isinstance(error, KeyError):
        return [f"{path}: missing"]
    message = " ".join(str(error).split()) or type(error).__name__
    return [f"{path}: {message}" if path else message]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _name(cls: Any) -> str:
    """The name of a class without its parameters: ``Run`` for ``Run[Size]``."""
    return (get_origin(cls) or cls).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
