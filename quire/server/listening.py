"""Taking the port: early, so that health answers while the model loads, and with a clear word when it cannot be had."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from quire.errors import ConfigError
from quire.server.options import ServerOptions


def listen(options: ServerOptions) -> socket.socket:
    """A bound socket for these options, or ConfigError."""
    return _listen_unix(options.uds) if options.uds is not None else _listen_tcp(options.host, options.port)


def address(options: ServerOptions, listening: socket.socket) -> str:
    """The URL under which this machine reaches the server."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    port = listening.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(options.host, options.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{'https' if options.ssl_certfile else 'http'}://{host}:{port}{options.root_path}"


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"host {host!r} is not an address of this machine: {error.strerror}.") from None
    family, _, _, _, target = found[0]
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(target)
        made.listen(2048)
    except OSError as error:
        made.close()
        raise ConfigError(_why(error, host, port)) from None
    made.setblocking(False)
    return made


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by another process. Choose another with --port, or 0 for any free one."
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges that this user does not have. Choose one above 1023 with --port."
    return f"cannot listen on {host}:{port}: {error.strerror}."


def _listen_unix(path: str) -> socket.socket:
    place = Path(path)
    if place.is_socket():
        with socket.socket(socket.AF_UNIX) as trial, contextlib.suppress(OSError):
            trial.connect(path)
            raise ConfigError(f"the socket {path!r} is in use by another process.")
        place.unlink()
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # only the owner may connect
    try:
        made.bind(path)
        made.listen(2048)
    except OSError as error:
        made.close()
        raise ConfigError(f"cannot listen on the socket {path!r}: {error.strerror}.") from None
    finally:
        os.umask(mask)
    made.setblocking(False)
    return made
