"""The server's options, frozen and checked. Names and defaults are vLLM's where it has the same option.

Differences, each for a reason: the default host is this machine only, CORS is off, and shutdown waits for running requests.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from quire import envs
from quire.errors import ConfigError
from quire.service.adapters import AdapterOptions, Module
from quire.service.limits import Limits

MIB = 1 << 20
UNKNOWN_FIELDS = ("error", "warn", "ignore")


@dataclass(frozen=True)
class ServerOptions:
    """One server's wishes."""

    host: str = "127.0.0.1"
    """Address to listen on. One that others can reach needs an API key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    uds: str | None = None
    """Path of a Unix domain socket instead of host and port; only the owner may connect."""
    api_key: tuple[str, ...] = ()
    """Accepted keys (`Authorization: Bearer KEY`); none means no authentication."""
    insecure: bool = False
    """Listen on a public address without a key."""
    served_model_name: tuple[str, ...] = ()
    """Names of the model in the API; answers carry the first."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins that may call this server from a browser; `*` is any."""
    root_path: str = ""
    """Path prefix that a proxy in front strips."""
    ssl_keyfile: str | None = None
    """Private key for TLS."""
    ssl_certfile: str | None = None
    """Certificate chain for TLS."""
    max_num_queued_reqs: int | None = Limits.max_num_queued_reqs
    """Samples (n x prompts) waiting and running together; beyond that 503."""
    max_num_queued_tokens: int | None = Limits.max_num_queued_tokens
    """Prompt tokens waiting to be computed; beyond that 503."""
    max_requests_per_key: int | None = None
    """Requests of one API key at the same time; beyond that 429."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests get to finish after SIGTERM."""
    drain_grace: float = 0.0
    """Seconds after SIGTERM in which new requests are still taken, for load balancers that lag."""
    unknown_fields: str = "error"
    """What an unknown top-level field of a request does: error (400), warn or ignore."""
    enable_prompt_tokens_details: bool = False
    """Report cached tokens in `usage.prompt_tokens_details`."""
    enable_force_include_usage: bool = False
    """End every stream with its usage, asked for or not."""
    return_tokens_as_token_ids: bool = False
    """Write tokens in logprobs as `token_id:N`."""
    response_role: str = "assistant"
    """Role of generated messages."""
    lora_modules: tuple[str, ...] = ()
    """Adapters to serve from the start: name=path, or {"name": ..., "path": ..., "base_model_name": ...}."""
    lora_dir: str | None = None
    """Folder of adapters, watched: each folder in it is served under its name. Uploads are kept there."""
    allowed_lora_path: tuple[str, ...] = ()
    """Folder below which /v1/load_lora_adapter may name a lora_path, beside --lora-dir."""
    max_adapter_bytes: int = 2048 * MIB
    """Largest adapter that may be uploaded."""
    enable_fine_tuning: bool = False
    """Take files and fine-tuning jobs (/v1/files, /v1/fine_tuning/jobs) and train on the served weights between steps."""
    data_dir: str | None = None
    """Folder of files, jobs and trained adapters, of one server at a time; naming one enables fine-tuning. If not given,
    QUIRE_DATA or ~/.local/share/quire."""
    training_latency_budget: float = 50.0
    """Milliseconds that training may add to a step in which requests run; 0: train only when there are none."""
    max_training_jobs: int = 1
    """Jobs that train at the same time; the others wait in order."""
    max_queued_jobs: int = 10
    """Unfinished jobs of one API key; beyond that 429."""
    max_upload_bytes: int = 512 * MIB
    """Largest file that may be uploaded at once."""
    max_parts_bytes: int = 8192 * MIB
    """Largest file that may be uploaded in parts (/v1/uploads)."""
    max_body_bytes: int = 8 * MIB
    """Longest request body."""
    max_header_bytes: int = 64 << 10
    """Longest request head."""
    max_headers: int = 100
    """Most header lines."""
    header_timeout: float = 10.0
    """Seconds for a request's head to arrive."""
    body_idle_timeout: float = 10.0
    """Seconds between two parts of a body."""
    body_timeout: float = 60.0
    """Seconds for a whole body."""
    stream_buffer_bytes: int = MIB
    """Unread bytes of a stream at which its request is aborted."""
    stream_stall_timeout: float = 30.0
    """Seconds that a stream may stay unread before its request is aborted."""
    keep_alive_interval: float = 15.0
    """Seconds of silence after which a stream gets a comment, so that proxies keep it open."""
    stall_timeout: float = 60.0
    """Seconds without a finished step, while requests run, after which the server is not ready."""

    def __post_init__(self) -> None:
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {self.port!r}.")
        if self.unknown_fields not in UNKNOWN_FIELDS:
            raise ConfigError(f"unknown_fields must be one of {', '.join(UNKNOWN_FIELDS)}, got {self.unknown_fields!r}.")
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path must begin with a slash, got {self.root_path!r}.")
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be greater than zero, got {getattr(self, name)!r}.")
        for name in ("shutdown_timeout", "drain_grace", "training_latency_budget"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)!r}.")
        for name in ("api_key", "served_model_name", "allowed_origins", "lora_modules", "allowed_lora_path"):
            if isinstance(getattr(self, name), str) or not all(isinstance(x, str) and x for x in getattr(self, name)):
                raise ConfigError(f"{name} must be a list of strings that are not empty.")
        _ = self.adapters
        self._check_tls()
        self._check_address()

    def _check_tls(self) -> None:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile must be given together.")
        for name in ("ssl_keyfile", "ssl_certfile"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name} must be a file, got {path!r}.")

    def _check_address(self) -> None:
        if self.uds is None and not self.api_key and not self.insecure and not is_local(self.host):
            raise ConfigError(
                f"refusing to listen on {self.host or 'every address'} without a key: anyone who can reach this machine "
                "could use the model. Give --api-key KEY, or --host 127.0.0.1, or --insecure if the network is trusted."
            )

    @property
    def data_folder(self) -> Path | None:
        """Where files and jobs are kept; None if the server takes none."""
        if self.data_dir is not None:
            return Path(self.data_dir).expanduser()
        return envs.data_dir() if self.enable_fine_tuning else None

    @property
    def adapters(self) -> AdapterOptions:
        """The part that adapters obey."""
        return AdapterOptions(
            modules=tuple(Module.parse(text) for text in self.lora_modules),
            directory=Path(self.lora_dir).expanduser().resolve() if self.lora_dir else None,
            allowed=tuple(Path(path).expanduser() for path in self.allowed_lora_path),
            any_path=envs.allow_runtime_lora_updating(),
            max_bytes=self.max_adapter_bytes,
        )

    @property
    def limits(self) -> Limits:
        """The part that the application keeps."""
        return Limits(
            max_num_queued_reqs=self.max_num_queued_reqs,
            max_num_queued_tokens=self.max_num_queued_tokens,
            max_requests_per_key=self.max_requests_per_key,
            stall_seconds=self.stall_timeout,
        )


_WHOLE = ("max_num_queued_reqs", "max_num_queued_tokens", "max_requests_per_key", "max_training_jobs", "max_queued_jobs")
_POSITIVE = (
    "max_adapter_bytes",
    "max_upload_bytes",
    "max_parts_bytes",
    "max_body_bytes",
    "max_header_bytes",
    "max_headers",
    "header_timeout",
    "body_idle_timeout",
    "body_timeout",
    "stream_buffer_bytes",
    "stream_stall_timeout",
    "keep_alive_interval",
    "stall_timeout",
)


def is_local(host: str) -> bool:
    """True for addresses that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
