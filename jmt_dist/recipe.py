"""YAML files and `key=value` words to validated options; a mistake gives one line with the nearest right name.

Layers are merged in order, later wins: a recipe's `base:` file, the recipe, then words.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from jmt_dist.config import Recipe, Site
from jmt_dist.errors import UsageError

M = TypeVar("M", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML whose scalars mean what they look like: 3e-4 is a number, 12:30:00 a string, `no` a word."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", "n~\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
# a float in the YAML 1.1 constructor may not hold an exponent without a dot; Python's float() does
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value.replace(".inf", "inf").replace(".nan", "nan")))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 10))


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if key in seen:
            raise UsageError(f"key `{key}` is written twice in {key_node.start_mark.name}, line {key_node.start_mark.line + 1}")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


@dataclass(frozen=True)
class Layer:
    """One source of values: `origin` is how an error message calls it."""

    origin: str
    values: Mapping[str, Any]


def _parse(text: str, name: str) -> Any:
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def read_layers(path: Path | str) -> list[Layer]:
    """A YAML file as layers: first those of the file its `base` key names (relative to it), then its own.

    Raises UsageError where the file is missing, is not a mapping, or names itself as its base.
    """
    layers: list[Layer] = []
    seen: set[Path] = set()
    current: Path | None = Path(path)
    while current is not None:
        if current.resolve() in seen:
            raise UsageError(f"{current} is its own base")
        seen.add(current.resolve())
        if not current.is_file():
            raise UsageError(f"there is no file {current}", _nearest_file(current))
        values = _parse(current.read_text(encoding="utf-8"), str(current)) or {}
        if not isinstance(values, dict):
            raise UsageError(f"{current} is not a list of `key: value` lines")
        base = values.pop("base", None)
        layers.insert(0, Layer(str(current), values))
        current = current.parent / str(base) if base else None
    return layers


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either."
    names = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"Did you mean `{path.parent / names[0]}`?" if names else f"Look into {path.parent}."


def parse_word(word: str) -> tuple[str, Any]:
    """`a.b=value` to ("a.b", value); values are YAML, so lists and numbers are written as there."""
    key, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.\-]*", key):
        raise UsageError(f"`{word}` is not of the form key=value")
    return key, _parse(text, f"the word `{word}`")


def word_layer(word: str) -> Layer:
    """The layer that one `key=value` word makes."""
    key, value = parse_word(word)
    values: Any = value
    for part in reversed(key.split(".")):
        values = {part: values}
    return Layer(f"word `{word}`", values)


def field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a model, groups included."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += field_names(kind, f"{prefix}{name}.")
    return names


def nearest(key: str, names: Sequence[str]) -> str:
    """`Did you mean …?` for an unknown key, or the keys there are."""
    found = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if not found:
        last = key.rsplit(".", 1)[-1]
        found = [n for n in names if n.rsplit(".", 1)[-1] == last] or [
            n for n in names if difflib.SequenceMatcher(None, n.rsplit(".", 1)[-1], last).ratio() > 0.8
        ]
    if found:
        return f"Did you mean `{found[0]}`?"
    return "Keys are: " + ", ".join(n for n in names if "." not in n) + "."


def _has(values: Any, path: Sequence[Any]) -> bool:
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def _origin(layers: Sequence[Layer], path: Sequence[Any]) -> str:
    for length in range(len(path), 0, -1):
        for layer in reversed(layers):
            if _has(layer.values, path[:length]):
                return layer.origin
    return layers[-1].origin if layers else "the words"


def _explain(error: ValidationError, layers: Sequence[Layer], model: type[BaseModel], prefix: str) -> UsageError:
    first = error.errors()[0]
    path = [part for part in first["loc"]]
    key = prefix + ".".join(str(part) for part in path)
    origin = _origin(layers, path)
    if first["type"] == "extra_forbidden":
        names = field_names(model, prefix)
        return UsageError(f"unknown key `{key}` ({origin})", nearest(key, names))
    if first["type"] == "missing":
        return UsageError(f"`{key}` is missing", f"Write {key}=….")
    if first["type"] == "value_error" and not path:
        return UsageError(f"{first['msg'].removeprefix('Value error, ')} ({layers[-1].origin if layers else 'defaults'})")
    message = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return UsageError(f"`{key}` should be {message}, not {first['input']!r} ({origin})")


def build(model: type[M], layers: Sequence[Layer], prefix: str = "") -> M:
    """Merge layers (later wins) and validate them. Raises UsageError, one line, on anything wrong."""
    try:
        merged = OmegaConf.merge({}, *(OmegaConf.create(dict(layer.values)) for layer in layers))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"the values of {', '.join(layer.origin for layer in layers)} do not merge: {str(error).splitlines()[0]}") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _explain(error, layers, model, prefix) from None


def load_recipe(path: Path | str | None, words: Sequence[str] = ()) -> Recipe:
    """A recipe from its file and `key=value` words."""
    return build(Recipe, [*(read_layers(path) if path else []), *map(word_layer, words)])


def load_site(path: Path | str | None, words: Sequence[str] = ()) -> Site:
    """A site from its file and `site.key=value` words (given here without `site.`)."""
    return build(Site, [*(read_layers(path) if path else []), *map(word_layer, words)], prefix="site." if words else "")


def split_words(words: Sequence[str], own: type[BaseModel]) -> tuple[list[str], list[str], list[str]]:
    """Words of a program that takes a recipe and a site: its own, the site's (`site.` removed), the recipe's.

    A key that none of the three knows raises UsageError naming the nearest key of all three.
    """
    names = [*field_names(own), *field_names(Recipe), *field_names(Site, "site.")]
    mine: list[str] = []
    site: list[str] = []
    recipe: list[str] = []
    for word in words:
        key, _ = parse_word(word)
        root = key.split(".")[0]
        if key in field_names(own):
            mine.append(word)
        elif root == "site" and "." in key:
            site.append(word.removeprefix("site."))
        elif root in Recipe.model_fields:  # before `own`: `folds=[…]` may be the program's while `folds.seed=1` is the recipe's
            recipe.append(word)
        elif root in own.model_fields:
            mine.append(word)
        else:
            raise UsageError(f"unknown key `{key}` (word `{word}`)", nearest(key, names))
    return mine, site, recipe


def dump(options: BaseModel, path: Path) -> None:
    """Write options as YAML, every key, in the order of their definition."""
    path.write_text(yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8")
