"""What clients of an old OpenAPI document could not live with in a new one.

Of a request, nothing that was accepted may be refused; of a response, nothing that was promised may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

_UPPER, _LOWER = ("maxLength", "maximum", "maxItems", "maxProperties"), ("minLength", "minimum", "minItems")


def incompatibilities(old: Schema, new: Schema) -> list[str]:
    """Every way in which `new` breaks a client of `old`, with the place."""
    found = []
    for path, operations in old["paths"].items():
        for method, operation in operations.items():
            place = f"{method.upper()} {path}"
            present = new["paths"].get(path, {}).get(method)
            found += [f"{place}: removed"] if present is None else list(_operation(place, old, operation, new, present))
    return found


def _operation(place: str, old: Schema, before: Schema, new: Schema, after: Schema) -> Iterator[str]:
    for kind, content in before.get("requestBody", {}).get("content", {}).items():
        present = after.get("requestBody", {}).get("content", {}).get(kind)
        if present is None:
            yield f"{place} {kind}: no longer accepted"
        else:
            yield from _accepts(f"{place} {kind}", old, content["schema"], new, present["schema"])
    for status, response in before["responses"].items():
        for kind, content in response.get("content", {}).items():
            present = after["responses"].get(status, {}).get("content", {}).get(kind)
            if present is None:
                yield f"{place} {status} {kind}: no longer answered"
                continue
            yield from _promises(f"{place} {status}", old, content["schema"], new, present["schema"])
            for code in set(content.get("examples", {})) - set(present.get("examples", {})):
                yield f"{place} {status}: the code {code} is gone, or has another status"


def _resolve(document: Schema, schema: Schema) -> Schema:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _kinds(document: Schema, schema: Schema) -> set[str]:
    """The JSON types that a schema allows."""
    schema = _resolve(document, schema)
    if "anyOf" in schema:
        return set().union(*(_kinds(document, option) for option in schema["anyOf"]))
    kind = schema.get("type", "any")
    return {kind} if isinstance(kind, str) else set(kind)


def _accepts(place: str, old: Schema, before: Schema, new: Schema, after: Schema) -> Iterator[str]:
    kinds = _kinds(new, after)
    if missing := _kinds(old, before) - kinds - ({"integer"} if "number" in kinds else set()):
        yield f"{place}: {', '.join(sorted(missing))} is no longer accepted"
    before, after = _resolve(old, before), _resolve(new, after)
    for name in _UPPER:
        if after.get(name, float("inf")) < before.get(name, float("inf")):
            yield f"{place}: {name} was lowered"
    for name in _LOWER:
        if after.get(name, float("-inf")) > before.get(name, float("-inf")):
            yield f"{place}: {name} was raised"
    if set(before.get("enum", [])) - set(after.get("enum", before.get("enum", []))):
        yield f"{place}: a value is no longer accepted"
    for name in set(after.get("required", [])) - set(before.get("required", [])):
        yield f"{place}.{name}: became required"
    for name, schema in before.get("properties", {}).items():
        if name in after.get("properties", {}):
            yield from _accepts(f"{place}.{name}", old, schema, new, after["properties"][name])
        else:
            yield f"{place}.{name}: no longer accepted"
    for key in ("additionalProperties", "items"):
        if isinstance(before.get(key), dict):
            if isinstance(after.get(key), dict):
                yield from _accepts(f"{place}.*", old, before[key], new, after[key])
            elif after.get(key) is False:
                yield f"{place}.*: no longer accepted"


def _promises(place: str, old: Schema, before: Schema, new: Schema, after: Schema) -> Iterator[str]:
    kinds = _kinds(old, before)
    if "any" not in kinds and (extra := _kinds(new, after) - kinds - ({"integer"} if "number" in kinds else set())):
        yield f"{place}: may now be {', '.join(sorted(extra))}"
    before, after = _resolve(old, before), _resolve(new, after)
    for name in set(before.get("required", [])) - set(after.get("required", [])):
        yield f"{place}.{name}: no longer promised"
    for name, schema in before.get("properties", {}).items():
        if name in after.get("properties", {}):
            yield from _promises(f"{place}.{name}", old, schema, new, after["properties"][name])
        else:
            yield f"{place}.{name}: removed"
    if isinstance(before.get("items"), dict) and isinstance(after.get("items"), dict):
        yield from _promises(f"{place}[]", old, before["items"], new, after["items"])
