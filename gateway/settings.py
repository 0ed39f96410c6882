"""Every setting of the gateway, read from environment variables that start with GATEWAY_."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Self

from pydantic import AliasChoices, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

import contract

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=3600)]
Addresses = Annotated[
    tuple[Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$")], ...],
    NoDecode,
    BeforeValidator(lambda value: [part.strip() for part in value.split(",")] if isinstance(value, str) else value),
    Field(min_length=1),
]


_PREFIX = "GATEWAY_"
_FORMER = ("patience_s",)
"""Names that settings had, which go on working."""
_LINK = re.compile(r"(tcp|udp)://")
_SERVICE = re.compile(r"GATEWAY_(\w+_)?(SERVICE_(HOST|PORT)\w*|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)")
"""What Kubernetes sets in every container for services whose names begin with `gateway`."""


class Settings(BaseSettings):
    """Defaults are safe for one machine: loopback only, bounded sizes and times."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_ignore_empty=True,
        frozen=True,
        use_attribute_docstrings=True,
        populate_by_name=True,
    )

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 8080
    """Port to listen on."""
    published_on: str | None = None
    """Where a container's port is published, if not on the address that it listens on."""
    root_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    """Path under which a proxy in front serves the gateway, as /parcels, whether it takes that off or not."""
    cors_origins: str = Field(default="", pattern=r"^(\*|https?://[^\s/,]+( *, *https?://[^\s/,]+)*)?$")
    """Web pages that may ask from a browser: their origins, as https://desk.example.com, or *. None: no others."""
    api_keys_file: Path | None = None
    """File with API keys (`make key NAME=scanner` makes one); followed."""
    api_keys: str = ""
    """API keys beside those of the file: name:sha256, separated by commas."""
    allow_anonymous: bool = False
    """Answer everybody, where there are no API keys, on other addresses than loopback."""
    tls_certificate: Path | None = None
    """Certificate chain (PEM); with it the gateway speaks HTTPS, and nothing else."""
    tls_key: Path | None = None
    """Private key of the certificate (PEM). None: it is in the same file."""
    max_connections: int = Field(default=1000, ge=1, le=100_000)
    """Most open connections; one more ends an unused one, or is refused but for health, version and metrics."""
    headers_timeout_s: Seconds = 10.0
    """Time to receive a request's head, and for an unused connection before its first."""
    keep_alive_s: Seconds = 75.0
    """Time after which an unused connection is closed; more than proxies in front keep theirs (nginx, ALB: 60 s)."""
    send_timeout_s: Seconds = 30.0
    """Time after which a client that takes nothing of its answers is disconnected."""
    triton_urls: Addresses = ("127.0.0.1:8001",)
    """Triton's gRPC endpoints, host:port, separated by commas. A name with several addresses is as many servers."""
    pipeline: str = Field(default="defect", pattern=rf"^{contract.PIPELINE_NAME.pattern}$")
    """The pipeline that /v1/predict answers with."""
    deadline_s: Seconds = 5.0
    """Time for an answer, from when its request is there as a whole, where that names none (X-Timeout-Ms)."""
    max_deadline_s: Seconds = 30.0
    """The most that a request may ask for."""
    body_timeout_s: Seconds = 10.0
    """Time to receive a request's body; it has longer while it comes at GATEWAY_BODY_RATE."""
    body_rate: int = Field(default=4096, ge=1, le=2**30)
    """Bytes a second, over GATEWAY_BODY_TIMEOUT_S, at which a body may take as long as it likes."""
    max_body_bytes: int = Field(default=20 * 2**20, ge=1024, le=2**30)
    """Largest request body, and largest picture by location; base64 makes a picture a third larger."""
    max_held_bytes: int = Field(default=512 * 2**20, validate_default=True)
    """Most that requests hold of bodies and pictures together, from the first byte to the answer."""
    max_metadata_bytes: int = Field(default=4096, ge=2, le=2**20)
    """Largest `metadata`, written as compact JSON."""
    image_hosts: str = ""
    """Where pictures by location may come from: host, host:port, *.domain, http://host, s3://bucket. None: off."""
    image_private_networks: str = ""
    """Networks, as 10.1.0.0/16, where those hosts may be though they are not public."""
    image_timeout_s: Seconds = 3.0
    """Time to fetch a picture by its location, out of the time for the prediction."""
    image_fetches: int = Field(default=32, ge=1, le=1024)
    """Most pictures that are fetched at the same time."""
    image_nameservers: str = ""
    """Name servers to ask for those hosts, as 10.0.0.2:53. None: those of /etc/resolv.conf."""
    routing: Path = Path("routing/routing.toml")
    """File that says which release answers; followed. None there: the newest."""
    group: int = Field(default=16, ge=1, le=256)
    """Most pictures of waiting requests in one call of Triton; 1: never together."""
    group_bytes: int = Field(default=2 * 2**20, ge=1)
    """Largest sum of their files; a larger picture goes alone."""
    max_waiting: int = Field(default=256, ge=1)
    """Most pictures that wait for a release; clients share the room."""
    max_waiting_bytes: int = Field(default=256 * 2**20, ge=1)
    """Largest sum of the files that wait, of all releases."""
    outage_wait_s: float = Field(
        default=4.0, ge=0, le=60, validation_alias=AliasChoices("GATEWAY_OUTAGE_WAIT_S", "GATEWAY_PATIENCE_S")
    )
    """Without any Triton, or with none that has the release answering, requests wait so long; then they are refused."""
    max_items: int = Field(default=32, ge=1, le=1024)
    """Most pictures in one request to /v1/predict/batch."""
    mirrors: int = Field(default=2, ge=0, le=64)
    """Most requests that run once more at the same time, for comparison. 0: none."""
    mirror_max_load: int = Field(default=8, ge=0)
    """Nothing is compared while more predictions than this are in flight."""
    refresh_s: Seconds = 1.0
    """How often Triton is asked which releases it has."""
    probe_timeout_s: Seconds = 1.0
    """Time for one health or inventory question to Triton."""
    drain_s: float = Field(default=0.0, ge=0, le=3600)
    """After a signal, time in which the gateway says that it is not ready, and still takes requests."""
    grace_s: Seconds = 30.0
    """Time for requests in flight when the gateway is stopped, after draining."""
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    """Least severe log lines that are written."""
    log_format: str = Field(default="auto", pattern="^(auto|json|text)$")
    """What `make serve` shows: every line (json), or stages and news (text); auto is text on a terminal, else json."""

    @field_validator("max_held_bytes")
    @classmethod
    def _has_room_for_a_body(cls, value: int, info: ValidationInfo) -> int:
        largest = info.data.get("max_body_bytes", 0)
        if value < 2 * largest:  # as text, and decoded
            raise ValueError(f"must be at least twice GATEWAY_MAX_BODY_BYTES, {2 * largest}")
        return value

    @field_validator("image_hosts")
    @classmethod
    def _are_origins(cls, value: str) -> str:
        if value:  # imported where it is needed: rollback reads the settings, too, and has no use for a resolver
            from gateway.fetch.allowed import Allowed

            Allowed.of(value, "")
        return value

    @field_validator("image_private_networks")
    @classmethod
    def _are_networks(cls, value: str) -> str:
        if value:
            from gateway.fetch.allowed import Allowed

            Allowed.of("", value)
        return value

    @field_validator("image_nameservers")
    @classmethod
    def _are_addresses(cls, value: str) -> str:
        if value:
            from gateway.fetch.resolver import parse_nameservers

            parse_nameservers(value)
        return value

    @classmethod
    def read(cls) -> Self:
        """Read the environment.

        Raises:
            SystemExit: a variable is wrong; the message names it, its value and what is expected.
        """
        try:
            return cls()
        except ValidationError as error:
            problems = [
                f"{_PREFIX}{'_'.join(map(str, e['loc'])).upper().removeprefix(_PREFIX)}={e['input']!r}: {e['msg']}"
                for e in error.errors()
            ]
            if _LINK.match(os.environ.get("GATEWAY_PORT", "")):
                problems.append("Kubernetes sets that for a service named gateway: enableServiceLinks: false stops it")
            raise SystemExit("gateway: " + "; ".join(problems)) from None

    @classmethod
    def unknown(cls) -> dict[str, str]:
        """Variables that look like settings and are none, and what each may be meant for (empty: nobody knows)."""
        found, known = {}, {*cls.model_fields, *_FORMER}
        for variable in sorted(os.environ):
            prefix, name = variable[: len(_PREFIX)].upper(), variable[len(_PREFIX) :].lower()
            if prefix == _PREFIX and name not in known and not _SERVICE.fullmatch(variable):
                close = get_close_matches(name, cls.model_fields, n=1)
                found[variable] = f"{_PREFIX}{close[0].upper()}" if close else ""
        return found
