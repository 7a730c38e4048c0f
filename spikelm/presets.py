"""Presets: a YAML file fills a nested dataclass, the command line overrides fields, annotations decide the types."""

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from spikelm.errors import SpikelmError
from spikelm.limits import check_bounded

Config = typing.TypeVar("Config")


class CommandLineText(str):
    """A value still as typed on the command line: only the field's annotation says what it means."""


def load_config(config_class: type[Config], preset: str, overrides: Sequence[str], directory: str | Path) -> Config:
    """Build the dataclass `config_class`, nested ones included, from directory/<preset>.yaml and "a.b=value" overrides.

    A preset may say `inherits: other`; its own fields win. Fields may be bool, int, float (finite), str, Literal,
    list[...], tuple[...], dataclasses and unions of these with None (written null or none). A list is written [a, b].
    Raises SpikelmError for an unknown preset or field (naming the nearest known one), a wrong type, a missing field.
    """
    values = read_preset(preset, Path(directory))
    given: set[str] = set()
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or not name:
            raise SpikelmError(f"{override!r} is no override: field=value is accepted, as in seed=1")
        if name in given:
            raise SpikelmError(f"{name} is given twice on the command line")
        given.add(name)
        _set_field(values, name, text)
    return from_dict(config_class, values)


def from_dict(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The dataclass from nested dicts, as to_dict gives them; the errors of load_config."""
    return typing.cast(Config, _build(config_class, values, "", list(field_names(config_class))))


def config_from_command_line(
    config_class: type[Config],
    directory: str | Path,
    *,
    description: str,
    default_preset: str,
    arguments: Sequence[str] | None = None,
) -> Config:
    """Read `--preset NAME field=value ...` (sys.argv when `arguments` is None); --help lists presets and fields."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="fields: " + ", ".join(field_names(config_class)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(preset_names(Path(directory)))
    parser.add_argument("--preset", default=default_preset, help=f"one of {names} (default: {default_preset})")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="fields that differ from the preset's")
    parsed = parser.parse_intermixed_args(arguments)
    return load_config(config_class, parsed.preset, parsed.overrides, directory)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain dicts and lists, equal to itself after a round trip through JSON."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def preset_names(directory: Path) -> list[str]:
    """Sorted names of the presets in `directory`."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def read_preset(preset: str, directory: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of directory/<preset>.yaml laid over those of the preset it inherits from, untyped."""
    import yaml

    known = preset_names(directory)
    if preset not in known:
        asked_by = f" (inherited by {seen[-1]!r})" if seen else ""
        raise SpikelmError(f"unknown preset {preset!r}{asked_by}: accepted are {', '.join(known) or 'none'}")
    if preset in seen:
        raise SpikelmError(f"presets inherit in a circle: {' -> '.join([*seen, preset])}")
    path = directory / f"{preset}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        check_bounded(values)
    except OSError as error:
        raise SpikelmError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # PyYAML's own, and whatever its constructors of numbers and dates let through
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SpikelmError(f"{path.name} is no valid YAML: {reason}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise SpikelmError(f"{path.name} must hold a mapping of field names to values")
    parent = values.pop("inherits", None)
    if parent is None:
        return values
    return _merge(read_preset(str(parent), directory, (*seen, preset)), values)


def field_names(config_class: type[Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields, those of nested dataclasses after their parent's name."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        yield prefix + field.name
        for arm in _arms(hints[field.name]):
            if dataclasses.is_dataclass(arm):
                yield from field_names(typing.cast(type[Any], arm), f"{prefix}{field.name}.")


def _set_field(values: dict[str, Any], name: str, text: str) -> None:
    """Put one command line value at its dotted place."""
    *parents, last = name.split(".")
    for parent in parents:
        # A nested configuration that the preset leaves out, or sets to null, starts from its defaults.
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise SpikelmError(f"{name}={text}: {parent} is a single value, it has no fields")
    values[last] = CommandLineText(text)


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in own.items():
        both_nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both_nested else value
    return merged


def _build(config_class: type[Any], values: Mapping[str, Any], prefix: str, known: Sequence[str]) -> Any:
    """One dataclass from a mapping; `prefix` is its dotted place and `known` are all dotted names."""
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    for name in values:
        if name not in fields:
            raise SpikelmError(f"unknown field {prefix + name!r}: {_suggest(prefix + name, known)}")
    converted = {}
    for name, field in fields.items():
        if name in values:
            value = values[name]
            nested = [arm for arm in _arms(hints[name]) if dataclasses.is_dataclass(arm)]
            if isinstance(value, Mapping) and [type(field.default)] == nested:
                # What is not given is the field's own default, which may differ from that of its class.
                value = _merge(to_dict(field.default), dict(value))
            converted[name] = _convert(hints[name], value, prefix + name, known)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SpikelmError(f"field {prefix + name!r} has no value: set it in the preset or as {prefix + name}=...")
    return config_class(**converted)


def _suggest(name: str, known: Sequence[str]) -> str:
    """The known name with the same last part, or the nearest by whole name or last part; else all of them."""
    by_last = {full.rpartition(".")[2]: full for full in reversed(known)}
    last = name.rpartition(".")[2]
    if last in by_last:
        return f"did you mean {by_last[last]!r}?"
    close = difflib.get_close_matches(name, known, n=1)
    if not close:
        close = [by_last[near] for near in difflib.get_close_matches(last, by_last, n=1)]
    return f"did you mean {close[0]!r}?" if close else f"accepted are {', '.join(known)}"


def _arms(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _convert(annotation: Any, value: Any, name: str, known: Sequence[str]) -> Any:
    """`value` as `annotation`; SpikelmError naming the field, the value and what is accepted."""
    arms = _arms(annotation)
    if len(arms) > 1:
        return _convert_union(arms, value, name, known)
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, Mapping):
            raise SpikelmError(f"{name}={value}: it has fields of its own, set these as {name}.field=value")
        return _build(typing.cast(type[Any], annotation), value, f"{name}.", known)
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return _convert_literal(typing.get_args(annotation), value, name)
    if origin in (list, tuple):
        return _convert_sequence(annotation, value, name, known)
    accepted = {bool: "true or false", int: "an integer", float: "a finite number", str: "text", types.NoneType: "null"}
    if annotation not in accepted:
        raise TypeError(f"{name}: fields of type {annotation} are not supported")
    converted, fits = _convert_scalar(annotation, value)
    if not fits:
        raise SpikelmError(f"{name}={value!s}: {accepted[annotation]} is accepted, {type_name(value)} was given")
    return converted


def type_name(value: Any) -> str:
    """How an error message calls what was given."""
    return "text" if isinstance(value, str) else type(value).__name__


def _convert_scalar(kind: type, value: Any) -> tuple[Any, bool]:
    """(value as `kind`, whether it fits)."""
    typed_in = isinstance(value, CommandLineText)
    if kind is str:
        return str(value), isinstance(value, str)
    if kind is types.NoneType:
        return None, value is None or (typed_in and value.lower() in ("null", "none"))
    if kind is bool:
        if typed_in:
            return value.lower() == "true", value.lower() in ("true", "false")
        return value, isinstance(value, bool)
    if isinstance(value, bool):
        return None, False
    # YAML 1.1 reads 1e-3 as text, so text that is a number is a number where a float is wanted.
    readable = (int, float, str) if kind is float else (int, CommandLineText)
    if not isinstance(value, readable):
        return None, False
    try:
        number = kind(value)
        return number, math.isfinite(number)
    except (ValueError, OverflowError):  # the second also of integers that no float holds
        return None, False


def _convert_union(arms: Sequence[Any], value: Any, name: str, known: Sequence[str]) -> Any:
    # Text fits everything that is typed in, so the narrower kinds are asked first.
    problem = None
    for arm in sorted(arms, key=lambda arm: (arm is str, arm is not types.NoneType)):
        try:
            return _convert(arm, value, name, known)
        except SpikelmError as error:
            if arm is not types.NoneType and (problem is None or dataclasses.is_dataclass(arm)):
                problem = error
    if types.NoneType in arms and not isinstance(value, Mapping):
        raise SpikelmError(f"{problem} (null is accepted too)")
    raise problem or SpikelmError(f"{name}={value}: null is accepted")


def _convert_literal(choices: Sequence[Any], value: Any, name: str) -> Any:
    for choice in choices:
        same = type(choice) is type(value) and choice == value
        if same or (isinstance(value, CommandLineText) and str(choice).lower() == value.lower()):
            return choice
    raise SpikelmError(f"{name}={value}: accepted are {', '.join(map(str, choices))}")


def _convert_sequence(annotation: Any, value: Any, name: str, known: Sequence[str]) -> Any:
    kind = typing.get_origin(annotation)
    kinds = typing.get_args(annotation)
    if isinstance(value, CommandLineText):
        inside = value.strip()
        if not (inside.startswith("[") and inside.endswith("]")):
            raise SpikelmError(f"{name}={value}: a list such as [a, b] is accepted")
        parts = inside[1:-1].split(",") if inside[1:-1].strip() else []
        value = [CommandLineText(part.strip()) for part in parts]
    if not isinstance(value, list):
        raise SpikelmError(f"{name}={value}: a list is accepted, {type_name(value)} was given")
    if kind is list or kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise SpikelmError(f"{name}: {len(kinds)} values are accepted, {len(value)} were given")
    return kind(
        _convert(each, part, f"{name}[{i}]", known) for i, (each, part) in enumerate(zip(kinds, value, strict=True))
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
