"""The few pages for browsers: the interactive documents, and what a problem's `type` leads to.

Their links are relative, so that they hold under whatever path a proxy serves them. Each comes with the
Content-Security-Policy that lets it do what it does, and no more.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from html import escape

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse

from gateway.problems import PROBLEMS, ProblemType

_STATIC = "static-offline-docs"
"""Where `FastAPIOffline` serves Swagger UI from its package."""
_STYLE = (
    "body{font:1rem/1.5 sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}td,th{padding:.2rem 1rem .2rem 0;"
)
_STYLE += "text-align:left;vertical-align:top}"


def wants_html(request: Request) -> bool:
    """Whether the client would rather have HTML than JSON: what a browser's Accept says, and no program's default."""
    return _quality(request, "text/html") > _quality(request, "application/json")


def _quality(request: Request, media_type: str) -> float:
    """What Accept says of a type that it names, from 0 to 1."""
    for entry in ",".join(request.headers.getlist("Accept")).split(","):
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        if name == media_type:
            weights = [re.fullmatch(r"q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)", parameter) for parameter in parameters]
            return next((float(weight[1]) for weight in weights if weight), 1.0)
    return 0.0


def docs(title: str) -> HTMLResponse:
    """Swagger UI, from our own address alone."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=title,
        swagger_js_url=f"{_STATIC}/swagger-ui-bundle.js",
        swagger_css_url=f"{_STATIC}/swagger-ui.css",
        swagger_favicon_url=f"{_STATIC}/favicon.png",
    )
    scripts = [_hash(script) for script in re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)]
    # Swagger UI writes style attributes, and carries its icons as data.
    page.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'self' {' '.join(scripts)}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"
    )
    return page


def error(code: str) -> HTMLResponse:
    """One row of the table."""
    kind = PROBLEMS[code]
    rows = {"Status": str(kind.status), "What to do": kind.advice, "Who has to act": kind.fault, "Step": kind.step}
    rows["Again"] = again(kind)
    table = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
    return _page(code, f"<p>{escape(kind.title)}.</p><table>{table}</table><p><a href='../errors'>All errors</a></p>")


def errors() -> HTMLResponse:
    """The whole table."""
    head = ("status", "code", "what", "again", "who has to act", "step")
    rows = [
        (
            str(kind.status),
            f"<a href='errors/{code}'>{code}</a>",
            escape(kind.title),
            again(kind),
            kind.fault,
            kind.step,
        )
        for code, kind in PROBLEMS.items()
    ]
    table = _row("th", head) + "".join(_row("td", row) for row in rows)
    return _page("Errors", f"<table>{table}</table>")


def again(kind: ProblemType) -> str:
    """Whether the same request may be sent again, in words."""
    if not kind.retryable:
        return "no"
    return f"after {kind.retry_after} s, or what Retry-After says" if kind.retry_after else "at once"


def _row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _page(title: str, body: str) -> HTMLResponse:
    head = f"<meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
    policy = f"default-src 'none'; style-src {_hash(_STYLE.encode())}; frame-ancestors 'none'"
    return HTMLResponse(
        f"<!doctype html><html lang='en'><head>{head}</head><body><h1>{title}</h1>{body}</body></html>",
        headers={"Content-Security-Policy": policy, "Vary": "Accept"},
    )


def _hash(source: bytes) -> str:
    """How a policy names an inline script or style that it lets through."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source).digest()).decode()}'"
