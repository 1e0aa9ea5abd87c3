"""Who may reach the port: an address beyond this machine needs API keys. Called by `t2ray serve` and the ingress."""

from __future__ import annotations

import ipaddress

from t2ray.api.keys import Keys
from t2ray.config.serve import ApiConfig
from t2ray.core import ConfigError


def check_host(host: str, config: ApiConfig) -> None:
    """Refuses an address that others can reach while no key is configured.

    Raises:
        ConfigError: with the remedy.
    """
    if not is_loopback(host) and not len(Keys.load(config)):
        raise ConfigError(
            f"host {host} lets other machines ask, and there are no API keys; make one by `t2ray keys NAME` and name "
            f"it in {config.keys_env} or api.keys_file, or stay on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
