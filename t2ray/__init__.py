"""t2ray: Transformer-squared (arXiv 2501.06252) as a distributed system on Ray."""

from t2ray.core import __version__

__all__ = ["__version__"]
