"""The rule of the listening address: one that other machines can reach needs API keys."""

from __future__ import annotations

import ipaddress

from t2ray.api.keys import Keys
from t2ray.config.serve import ApiConfig
from t2ray.core import ConfigError


def check_host(host: str, config: ApiConfig) -> None:
    """Checks that an endpoint on `host` is open to this machine alone or has API keys.

    Raises:
        ConfigError: other machines can reach `host`, and no key is configured; or the keys cannot be read.
    """
    if not is_loopback(host) and not len(Keys.load(config)):
        raise ConfigError(
            f"host {host} lets other machines ask, and there are no API keys; make one by `t2ray keys NAME` and name "
            f"it in {config.keys_env} or api.keys_file, or stay on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
