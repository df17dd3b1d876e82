"""Writes docs/config.md from the models of raymoe/config.py: `python docs/make_config.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raymoe.config import DeploymentConfig

TARGET = Path(__file__).with_name("config.md")
HEAD = """# Settings

Made from `raymoe/config.py` by `python docs/make_config.py`; a test keeps it true. A YAML or JSON
file with these fields goes to `raymoe serve --config FILE`; flags win over the file. Unknown names
are refused. `_s` are seconds, `_bytes` bytes.
"""


def render() -> str:
    """The page."""
    return HEAD + "".join(_section(DeploymentConfig, "", "The deployment"))


def _section(model: type[BaseModel], path: str, title: str) -> list[str]:
    lines = [f"\n## {title}\n\n{(model.__doc__ or '').strip()}\n"]
    lines.append("\n| setting | type | default | what it is |\n|---|---|---|---|\n")
    nested: list[tuple[type[BaseModel], str]] = []
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None:
            nested.append((inner, name))
        what = field.description or (f"see [{name}](#{name})" if inner else "")
        lines.append(f"| `{path}{name}` | {_type(field)} | {_default(field)} | {what} |\n")
    for inner, name in nested:
        lines += _section(inner, f"{path}{name}.", name)
    return lines


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _type(field: FieldInfo) -> str:
    if _model_in(field.annotation):
        return "list or number" if get_args(field.annotation) else "mapping"
    annotation = field.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if not isinstance(annotation, type) and "Literal" in text:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    text = text.replace("typing.", "").replace(" | None", ", optional")
    return text.replace("|", "or")


def _default(field: FieldInfo) -> str:
    if _model_in(field.annotation):
        return ""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**required**"
    return "" if value is None else f"`{value}`"


if __name__ == "__main__":
    TARGET.write_text(render())
