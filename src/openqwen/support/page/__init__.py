"""Self-contained HTML pages in the house's style: the parts that all reports share."""

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from openqwen.support.page.text import (
    count,
    duration,
    number,
    percent,
    shortened,
    signed,
    size,
    visible,
    yaml_text,
)


def environment(package: str) -> Environment:
    """Return a Jinja environment that makes invisible characters visible and escapes values.

    package: its folder `templates` is searched before the shared templates.
    """
    shared = PackageLoader(__name__)
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), shared]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = shared.get_source(environment, "style.css")[0]
    environment.globals["style"] = Markup(style)
    environment.filters |= {
        "count": count,
        "duration": duration,
        "number": number,
        "percent": percent,
        "px": "{:.1f}".format,
        "shortened": shortened,
        "signed": signed,
        "size": size,
        "yaml": yaml_text,
    }
    return environment


def _finalize(value: Any) -> Any:
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return visible(value)
