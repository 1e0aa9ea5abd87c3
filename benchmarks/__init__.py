"""Measurements of t2ray, outside the package; `python -m benchmarks --help` lists them."""
