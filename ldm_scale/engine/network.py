"""The host's network as far as the ranks need it: which interface leads to rank 0, whether it is up, how far it is."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from pathlib import Path

_SIOCGIFFLAGS, _SIOCGIFADDR = 0x8913, 0x8915  # linux/sockios.h
_UP, _RUNNING = 0x1, 0x40  # net/if.h: switched on by the administrator, and with a carrier
_NAME_BYTES = 16
CONNECT_S = 1.0  # a link that takes longer for one exchange is as good as broken


def resolve(host: str, port: int) -> str:
    """The address of a host by its name, IPv4 where it has one, and not the host's way to itself where it has another.

    Raises: OSError if the name is not known.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    return min(addresses, key=lambda address: (":" in address, address.startswith("127.")))


def address_towards(address: str) -> str:
    """This host's own address on the way to `address`.

    Raises: OSError if no route leads there.
    """
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # only chooses the route: no packet is sent
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The interface that has this address; None if none has it."""
    return next((name for _, name in socket.if_nameindex() if address in addresses_of(name)), None)


def interfaces() -> list[str]:
    """Names of this host's interfaces."""
    return [name for _, name in socket.if_nameindex()]


def addresses_of(interface: str) -> list[str]:
    """Addresses of an interface: the first IPv4 one, and all IPv6 ones."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        try:
            reply = fcntl.ioctl(query, _SIOCGIFADDR, _request(interface))
            found.append(socket.inet_ntoa(reply[20:24]))
        except OSError:
            pass  # it has none
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.is_file() else ():
        digits, *_, name = line.split()
        if name == interface:
            found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found


def is_up(interface: str) -> bool:
    """Whether the interface is switched on and has a carrier."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        try:
            reply = fcntl.ioctl(query, _SIOCGIFFLAGS, _request(interface))
        except OSError:
            return False
    flags = struct.unpack_from("H", reply, _NAME_BYTES)[0]
    return bool(flags & _UP and flags & _RUNNING)


def round_trip_s(address: str, port: int, timeout_s: float = CONNECT_S) -> float | None:
    """Seconds until a port that listens has accepted a connection; None if it did not, or not in time.

    The kernels do that between them, however busy the processes are: one round trip.
    """
    started = time.perf_counter()
    try:
        socket.create_connection((address, port), timeout_s).close()
    except OSError:
        return None
    return time.perf_counter() - started


def trouble(interface: str, address: str, port: int) -> str:
    """What is wrong with the way to a port: "eth0 is down", or that the address is not reached; "" if nothing is."""
    if interface in interfaces() and not is_up(interface):
        return f"{interface} is down"
    try:
        socket.create_connection((address, port), CONNECT_S).close()
    except ConnectionRefusedError:
        return ""  # the host answers, and nobody listens there any more
    except OSError as error:
        return f"{address} is not reached ({error.strerror or error})"
    return ""


def listen(address: str, port: int) -> int:
    """A listening socket's file descriptor, bound to that address alone.

    Raises: OSError if the port is taken or the address is none of this host's.
    """
    with socket.socket(_family(address), socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port stays taken for a minute after use
        bound.bind((address, port))
        bound.listen(socket.SOMAXCONN)
        return bound.detach()


def host_name() -> str:
    """This node's name: Slurm's, or else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _request(interface: str) -> bytes:
    return struct.pack("256s", interface.encode()[: _NAME_BYTES - 1])
