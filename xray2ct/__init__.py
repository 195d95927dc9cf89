"""A CT volume from two orthogonal chest X-rays; docs/architecture.md shows the rooms of this package."""

__version__ = "0.3.0"
