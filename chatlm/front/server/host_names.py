"""Names and addresses in Host headers and origins: which of them can only mean this machine."""

from __future__ import annotations

import ipaddress
import re
import socket
from contextlib import suppress

IP = ipaddress.IPv4Address | ipaddress.IPv6Address


def split_address(address: str) -> tuple[str, str]:
    """(name, port) of a Host header, or of an Origin without its scheme, normalised for comparison.

    Lower case, no brackets, no trailing dot; the port is "" for 80 and 443."""
    [(name, port)] = re.findall(r"\A(.*?)(?::(\d*))?\Z", address.lower(), re.DOTALL)
    return name.strip("[]").removesuffix("."), "" if port in ("80", "443") else port


def address_of(name: str) -> IP | None:
    """The address that a name spells; None if it is no address. An IPv4 address that is written as one of
    IPv6 is itself."""
    try:
        ip = ipaddress.ip_address(name)
    except ValueError:
        return None
    if getattr(ip, "scope_id", None):  # browsers and curl send none
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


def is_loopback(name: str) -> bool:
    ip = address_of(name)
    if ip is not None:
        return ip.is_loopback
    return name == "localhost" or re.fullmatch(r"127(\.\d+){1,3}", name) is not None


def is_public_name(name: str) -> bool:
    """Whether anyone could point this name at an address of their choice. Nobody can if it is an address or
    has no dot."""
    return address_of(name) is None and "." in name


def is_own_name(name: str) -> bool:
    """Whether this machine gave itself this name or address, so that no one else can point it here.

    A page whose name resolves to this machine reaches it from here, but under its own name."""
    ip = address_of(name)
    if ip is not None:
        return ip.is_loopback or is_own_address(ip)
    return is_loopback(name) or name in own_host_names()


def own_host_names() -> set[str]:
    """The host name as the system has it, its first label, and that label as mDNS announces it."""
    whole = socket.gethostname().lower().removesuffix(".")
    label = whole.partition(".")[0]
    return {whole, label, f"{label}.local"} - {"", ".local"}


def is_own_address(ip: IP) -> bool:
    """Whether an interface of this machine has this address: then packets to it are sent from it."""
    if ip.is_unspecified:  # systems take it for loopback
        return True
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((str(ip), 9))  # sends nothing, only picks the interface
        return address_of(probe.getsockname()[0]) == ip
    return False
