"""Numbers of bytes, as people read them."""

from __future__ import annotations


def shown_bytes(count: float) -> str:
    """2.41 GB, 31.4 MB, 0.2 MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
