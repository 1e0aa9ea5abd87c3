"""Measuring: accuracy with intervals, reports, and the load on an endpoint."""
