"""Tables of the reference pages, generated from the OpenAPI document, settings.py and the Prometheus rules."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from inspect import getsource
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from model.tables import markdown

RULES = Path(__file__).parents[1] / "monitoring/prometheus/rules"
Schema = dict[str, Any]


@cache
def _document() -> Schema:
    """``/docs.json`` of a service that requires API keys: the complete document."""
    from service import Classifier
    from serving.openapi import describe

    service: Any = Classifier  # BentoML's decorator replaces the class
    document: Schema = json.loads(json.dumps(describe(str(service.openapi_spec.info.version), asks_for_keys=True)))
    return document


def openapi() -> str:
    return json.dumps(_document(), indent=1)


def api() -> str:
    """Every endpoint, the probes, and the schemas that they share, as Markdown."""
    from serving.openapi import INFRASTRUCTURE

    operations = [
        (path, method, operation)
        for path, methods in _document()["paths"].items()
        for method, operation in methods.items()
        if path not in INFRASTRUCTURE
    ]
    probes = markdown(("request", "reply"), ((f"`GET {path}`", text) for path, text in INFRASTRUCTURE.items()))
    return "\n\n".join([*(_operation(*one) for one in operations), "## Probes and metrics", probes, _schemas()])


def _operation(path: str, method: str, operation: Schema) -> str:
    parts = [f"## {method.upper()} {path}", operation["description"].replace("``", "`")]
    if "requestBody" in operation:
        bodies = operation["requestBody"]["content"].items()
        parts += [
            "Body, one of:",
            markdown(("content type", "content"), ((f"`{m}`", _type(b["schema"])) for m, b in bodies)),
        ]
    if "parameters" in operation:
        parts += [markdown(("parameter", "type", "description"), map(_parameter, operation["parameters"]))]
    parts += [
        markdown(("status", "meaning", "content", "headers"), map(_reply, sorted(operation["responses"].items())))
    ]
    return "\n\n".join(parts)


def _parameter(parameter: Schema) -> tuple[str, ...]:
    return f"`{parameter['name']}`", _type(parameter["schema"]), parameter["description"]


def _reply(reply: tuple[str, Schema]) -> tuple[str, ...]:
    status, about = reply
    content = "; ".join(f"`{media}`: {_type(body['schema'])}" for media, body in about.get("content", {}).items())
    return status, about["description"], content, ", ".join(f"`{name}`" for name in about.get("headers", {}))


def _schemas() -> str:
    parts = ["## Schemas"]
    for name, schema in _document()["components"]["schemas"].items():
        required = schema.get("required", [])
        rows = (
            (f"`{field}`", _type(about), "" if field in required else "yes", about.get("description", ""))
            for field, about in schema["properties"].items()
        )
        parts += [f"### {name}", markdown(("field", "type", "optional", "description"), rows)]
    return "\n\n".join(parts)


def _type(schema: Schema) -> str:
    """A schema in a few words."""
    match schema:
        case {"$ref": reference}:
            name = reference.rpartition("/")[2]
            return f"[{name}](#{name.lower()})"
        case {"anyOf": choices}:
            return " or ".join(map(_type, choices))
        case {"enum": values}:
            return "one of " + ", ".join(f"`{value}`" for value in values)
        case {"const": value}:
            return f"`{value}`"
        case {"format": "binary"}:
            return "file"
        case {"format": "path"}:
            return "path"
        case {"title": name} if name in _document_schemas():
            return f"[{name}](#{name.lower()})"
        case {"type": "array", "items": items}:
            return f"list of {_type(items)}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"object of {_type(values)}"
        case {"type": "object", "properties": properties}:
            return "{" + ", ".join(f"`{name}`: {_type(about)}" for name, about in properties.items()) + "}"
        case {"description": text, "type": "string"} if "Base64" in text:
            return "base64 or data URL"
    return _bounded(schema)


def _document_schemas() -> set[str]:
    return set(_document()["components"]["schemas"])


def _bounded(schema: Schema) -> str:
    """A scalar type with its bounds: ``1 ≤ integer``, ``0 < number < 1``."""
    kind = str(schema["type"])
    low = next(
        (f"{schema[key]:,} {sign} " for key, sign in (("minimum", "≤"), ("exclusiveMinimum", "<")) if key in schema), ""
    )
    high = next(
        (f" {sign} {schema[key]:,}" for key, sign in (("maximum", "≤"), ("exclusiveMaximum", "<")) if key in schema), ""
    )
    return low + kind + high


def settings() -> str:
    """Every setting with its type, its default and its docstring."""
    from settings import Settings

    explained = dict(_docstrings(getsource(Settings)))
    rows = (
        (f"`{name.upper()}`", _setting(about), _default(about.get("default")), explained.get(name, ""))
        for name, about in Settings.model_json_schema()["properties"].items()
    )
    return markdown(("variable", "type", "default", "description"), rows)


def _setting(schema: Schema) -> str:
    """The type of a setting, without null: its default shows that it is optional."""
    choices = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    return _type({**choices[0]} if len(choices) == 1 else {"anyOf": choices})


def _default(value: Any) -> str:
    return "none" if value is None else f"`{json.dumps(value) if isinstance(value, bool) else value}`"


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    """The docstring after each field of a class, as one line of Markdown."""
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]  # the one class
    for field, after in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            text = " ".join(ast.literal_eval(after.value).split())
            yield ast.unparse(field.target), text.replace("``", "`")


def _rules() -> Iterator[Schema]:
    for path in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def alerts() -> str:
    """Every alert with its severity, component, summary and runbook, the most severe first."""
    order = ("critical", "warning", "info", "none")
    found = sorted(
        (rule for rule in _rules() if "alert" in rule), key=lambda rule: order.index(rule["labels"]["severity"])
    )
    rows = ((_runbook(rule), rule["labels"]["severity"], rule["labels"]["component"], _plain(rule)) for rule in found)
    return markdown(("alert", "severity", "component", "summary"), rows)


def _runbook(rule: Schema) -> str:
    return f"[{rule['alert']}](../runbooks/{Path(rule['annotations']['runbook_url']).name})"


def _plain(rule: Schema) -> str:
    """The summary with its template expressions replaced by ``…``."""
    return re.sub(r"\{\{.*?\}\}", "…", str(rule["annotations"]["summary"]))


def objectives() -> str:
    """The share of bad requests that each objective allows, read from the rules."""
    shares = {
        rule["labels"]["slo"]: float(rule["expr"].removeprefix("vector(").removesuffix(")"))
        for rule in _rules()
        if rule.get("record") == "classifier:slo_budget:ratio"
    }
    rows = ((f"`{name}`", f"{1 - share:.1%}", f"{share:.1%}") for name, share in shares.items())
    return markdown(("objective", "target", "error budget"), rows)
