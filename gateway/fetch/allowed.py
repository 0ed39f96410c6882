"""Where pictures may come from: the origins that the operator lists, at addresses that are public.

Both must hold. A listed name is a promise about who answers, not about where: its owner, or whoever can change its
DNS, could point it at this network.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network

from gateway.fetch.location import Address, StoredObject, Web, parse, parse_web
from gateway.problems import Failure

Network = IPv4Network | IPv6Network

# IANA's special-purpose registries. Written down here, because what `ipaddress` calls global differs between patch
# releases of Python, and because it answers another question: it takes multicast for global.
_NOT_PUBLIC_4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # carrier-grade NAT, and Alibaba's metadata
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # Azure's host, public in name only
            "169.254.0.0/16",  # link-local, and the metadata of most clouds
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments, and Oracle's metadata
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # multicast tunnelling
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # benchmarking
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, broadcast
        ),
    )
)
# Of IPv6 only this is unicast on the internet. Outside lie loopback, unique local (and AWS's metadata in it),
# link-local, multicast, and every form that carries an IPv4 address: mapped, compatible, translated, NAT64.
_PUBLIC_6 = IPv6Network("2000::/3")
_NOT_PUBLIC_6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments: Teredo, benchmarking, ORCHID
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which carries an IPv4 address
            "3fff::/20",  # documentation
        ),
    )
)


def is_public(address: Address) -> bool:
    """Whether an address belongs to one host on the internet."""
    if address.version == 4:
        return not any(address in network for network in _NOT_PUBLIC_4)
    return address in _PUBLIC_6 and not any(address in network for network in _NOT_PUBLIC_6)


@dataclass(frozen=True)
class _Entry:
    """One line of the list; with `subdomains`, what lies below the host and not the host itself."""

    origin: Web | StoredObject
    subdomains: bool = False

    def covers(self, location: Web | StoredObject) -> bool:
        here = self.origin
        if isinstance(here, Web) and isinstance(location, Web):
            fits = location.host.endswith(f".{here.host}") if self.subdomains else location.host == here.host
            return fits and (location.scheme, location.port) == (here.scheme, here.port)
        return here.origin == location.origin


@dataclass(frozen=True)
class Allowed:
    """The origins, and the networks that are not public and may be reached all the same."""

    origins: tuple[_Entry, ...]
    networks: tuple[Network, ...]

    @classmethod
    def of(cls, hosts: str, networks: str) -> Allowed:
        """From the settings, each a list with commas.

        Raises:
            ValueError: an entry cannot be understood; the message names it.
        """
        return cls(tuple(map(_entry, _items(hosts))), tuple(map(ip_network, _items(networks))))

    def require_origin(self, location: Web | StoredObject) -> None:
        """Refuse what is not listed.

        Raises:
            Failure: url_not_allowed.
        """
        if not any(entry.covers(location) for entry in self.origins):
            raise Failure("url_not_allowed", f"{location.origin} is not on the list of this service")

    def require_address(self, location: Web, address: Address) -> None:
        """Refuse an address that is neither public nor permitted. It is not told: it would describe this network.

        Raises:
            Failure: url_not_allowed.
        """
        if not (is_public(address) or any(address in network for network in self.networks)):
            raise Failure("url_not_allowed", f"{location.origin} has an address that is not public")


def _items(text: str) -> list[str]:
    return [item for item in (part.strip() for part in text.split(",")) if item]


def _entry(text: str) -> _Entry:
    """One origin; https where it names no scheme."""
    try:
        if text.startswith(("s3://", "gs://")):
            bucket = parse(f"{text}/key")
            if bucket.origin != text:
                raise ValueError(f"{text}: a bucket, without a key")
            return _Entry(bucket)
        scheme, _, rest = text.rpartition("://")
        subdomains = rest.startswith("*.")
        origin = parse_web(f"{scheme or 'https'}://{rest.removeprefix('*.')}")
    except Failure:
        expected = "host, host:port, *.domain, http://host, s3://bucket or gs://bucket"
        raise ValueError(f"{text}: expected {expected}") from None
    if origin.target != "/" or text.endswith("/"):
        raise ValueError(f"{text}: a host, without a path")
    if subdomains and (origin.address or "." not in origin.host):
        raise ValueError(f"{text}: * stands for names below a domain of two labels or more")
    return _Entry(origin, subdomains)
