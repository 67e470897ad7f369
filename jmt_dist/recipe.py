"""YAML files and `key=value` words to validated options; a mistake gives one line with the nearest right name.

Layers are merged in order, later wins: a recipe's `base:` file, the recipe, then words.
"""

from __future__ import annotations

import difflib
import re
import textwrap
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
    """YAML whose scalars mean what they look like: 3e-4 is a number; 12:30:00, 007, `no` and nothing at all are words."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|~", "nN~"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
# a float in the YAML 1.1 constructor may not hold an exponent without a dot; Python's float() does
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value.replace(".inf", "inf").replace(".nan", "nan")))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 10))


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        where = f"{key_node.start_mark.name}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UsageError(f"a key in {where} is not a word")
        if key_node.value in seen:
            raise UsageError(f"key `{key_node.value}` is written twice in {where}")
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads back unchanged: what looks like a number to either grammar is quoted."""


_Dumper.yaml_implicit_resolvers = {key: [*found] for key, found in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _key, _found in _Loader.yaml_implicit_resolvers.items():
    _Dumper.yaml_implicit_resolvers.setdefault(_key, []).extend(_found)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """A string, with `${` escaped: it was resolved when it was read, and is not to be resolved again."""
    escaped = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)
    style = None if escaped.isprintable() else '"'  # other styles lose some line separators
    return dumper.represent_scalar("tag:yaml.org,2002:str", escaped, style=style)


_Dumper.add_representer(str, _represent_text)


@dataclass(frozen=True)
class Layer:
    """One source of values: `origin` is how an error message calls it."""

    origin: str
    values: Mapping[str, Any]


def _parse(text: str, name: str) -> Any:
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1} of " if mark is not None and "\n" in text.strip() else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        raise UsageError(f"{line}{name} is not YAML: {problem}") from None


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
        try:
            text = current.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            raise UsageError(f"{current} cannot be read as text") from None
        values = _parse(text, str(current)) or {}
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
    """`a.b=value` to ("a.b", value); values are YAML, so lists and numbers are written as there; no value is an empty text."""
    key, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w\-]*(\.[\w\-]+)*", key):
        remedy = f"Write `{word.lstrip('-')}`." if re.match(r"-+[A-Za-z_][\w.\-]*=", word) else "`--help` lists the keys."
        raise UsageError(f"`{word}` is not of the form key=value", remedy)
    return key, _parse(text, f"the word `{word}`") if text.strip() else ""


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
    last = key.rsplit(".", 1)[-1]
    found = [name for name in names if "." not in key and name.endswith(f".{key}")]  # only its group is missing: lr, max_steps
    found = found or difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    found = found or [name for name in names if difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], last).ratio() > 0.8][:1]
    if found:
        return f"Did you mean {' or '.join(f'`{name}`' for name in found)}?"
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
    # a misspelt required key is both unknown and missing: the unknown one has the better remedy
    first = min(error.errors(), key=lambda found: found["type"] == "missing")
    path = [part for part in first["loc"]]
    key = prefix + ".".join(str(part) for part in path)
    origin = _origin(layers, path)
    if first["type"] == "extra_forbidden":
        names = field_names(model, prefix)
        return UsageError(f"unknown key `{key}` ({origin})", nearest(key, names))
    if first["type"] == "missing":
        return UsageError(f"`{key}` is missing", f"Write {key}=….")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # from a validator of ours: it says all there is to say
        return UsageError(f"{message} ({origin})")
    if not message.startswith("Input should be "):
        return UsageError(f"`{key}`: {message} ({origin})")
    given = textwrap.shorten(repr(first["input"]), 80)
    return UsageError(f"`{key}` should be {message.removeprefix('Input should be ')}, not {given} ({origin})")


def _checked(layer: Layer, model: type[BaseModel], prefix: str) -> dict[str, Any]:
    """A layer's values without its empty groups; raises UsageError where a group of keys is given as a value.

    Merging would let a later layer's group replace such a value in silence.
    """
    values: dict[str, Any] = {}
    for key, value in layer.values.items():
        if not isinstance(key, str):
            raise UsageError(f"unknown key `{prefix}{key}` ({layer.origin})")
        if value == "???":  # OmegaConf's mark of a missing value, which would leave the layer before in force
            raise UsageError(f"`{prefix}{key}` has no value ({layer.origin})", "`???` stands for a value to be filled in.")
        field = model.model_fields.get(key)
        kind = field.annotation if field else None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if value in (None, ""):  # `fusion:` with every line under it commented out
                continue
            if not isinstance(value, Mapping):
                example = f"{prefix}{key}.{next(iter(kind.model_fields))}=…"
                raise UsageError(f"`{prefix}{key}` is a group of keys, not {value!r} ({layer.origin})", f"Write {example}.")
            value = _checked(Layer(layer.origin, value), kind, f"{prefix}{key}.")
        values[key] = value
    return values


def build(model: type[M], layers: Sequence[Layer], prefix: str = "") -> M:
    """Merge layers (later wins) and validate them. Raises UsageError, one line, on anything wrong.

    `${key}` and `${oc.env:NAME}` in values are resolved by OmegaConf; `\\${` stands for itself.
    """
    # the defaults go first, and whole: `audio.optimizer.lr=…` alone must keep audio's adam, not take OptimizerOptions' sgd
    merged: Any = OmegaConf.create(_defaults(model))
    for layer in layers:
        checked = _checked(layer, model, prefix)
        try:
            merged.merge_with(OmegaConf.create(checked))  # in place: OmegaConf.merge would copy all of it for every word
        except (OmegaConfBaseException, RecursionError) as error:
            raise _unresolved(error, layer.origin) from None
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        origin = _origin(layers, re.split(r"[.\[]", key))
        raise _unresolved(error, f"`{prefix}{key}` ({origin})") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _explain(error, layers, model, prefix) from None


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Default values of a model, of its groups too, without those that must be given."""
    fields = {name: field.get_default(call_default_factory=True) for name, field in model.model_fields.items() if not field.is_required()}
    return {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in fields.items()}


def _unresolved(error: Exception, where: str) -> UsageError:
    reason = "it contains itself" if isinstance(error, RecursionError) else str(error).splitlines()[0]
    return UsageError(f"a value of {where} cannot be resolved: {reason}", r"A `${` that is to stand for itself is written `\${`.")


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
    """Write options as YAML, every key, in the order of their definition; `read_layers` and `build` give them back."""
    text = yaml.dump(options.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
