"""One way to fill a template of the package: what is data is escaped, what is missing is an error."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **context: Any) -> str:
    """Fill ``templates/<template>.html.j2``.

    Raises:
        jinja2.UndefinedError: The template asks for something that ``context`` lacks.
    """
    environment = Environment(
        loader=PackageLoader("stage_grpo"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{template}.html.j2").render(**context)
