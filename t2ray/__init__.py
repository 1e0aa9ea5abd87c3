"""t2ray: Transformer-squared (arXiv 2501.06252) as a distributed system on Ray."""

__version__ = "0.1.0"
