"""The only place that touches private torch names: each with the reason and the versions it was tried on."""

from __future__ import annotations

__all__: list[str] = []
