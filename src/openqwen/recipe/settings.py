"""Read a recipe's YAML into typed settings; errors name the file, the line and the key."""

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

import openqwen
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.settings import validate

Settings = TypeVar("Settings", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads 1e-3 as a number (YAML 1.1: a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in seen:
            what = f"the key '{key.value}' is given twice"
            raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
        seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def find_recipe(name: str) -> Path:
    """Return a recipe's path: a file, or a name in `./recipes/` or in the package's recipes."""
    path = Path(name)
    if path.is_file():
        return path
    recipes: dict[str, Path] = {}
    for folder in (Path(str(openqwen.__file__)).parent / "recipes", Path("recipes")):
        recipes |= {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if name in recipes:
        return recipes[name]
    do = f"name a YAML file, or one of: {', '.join(sorted(recipes))}"
    what = f"There is no recipe '{name}'.{suggestion(path.stem, recipes)}"
    raise OpenQwenError(what, where=path, do=do)


def load_settings(path: Path, settings: type[Settings]) -> Settings:
    """Read a YAML file into a settings class; raises OpenQwenError with file, line and key."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        what = f"This is not valid YAML: {error.problem or error.context}."
        raise OpenQwenError(what, where=where) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = f"This is not valid YAML: {' '.join(str(error).split())}"
        raise OpenQwenError(what, where=path) from None
    if not isinstance(data, dict):
        raise OpenQwenError("A recipe must be a mapping of keys to values.", where=path)
    lines: dict[str, int] = {}
    if node is not None:
        _find_lines(node, "", lines)
    return validate(settings, data, path, lines)


def _find_lines(node: yaml.Node, prefix: str, lines: dict[str, int]) -> None:
    """Add dotted key -> line in the file for every key below this node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            lines[dotted] = key.start_mark.line + 1
            _find_lines(value, f"{dotted}.", lines)
