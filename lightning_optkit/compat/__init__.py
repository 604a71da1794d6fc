"""Interfaces of other curvature libraries, on this package's engine."""
