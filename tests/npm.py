"""The clients from npm, and a Node that is new enough for them."""

from __future__ import annotations

from pathlib import Path

import playwright

from .servers import skip_unless_ci, system_part

CLIENTS = Path(__file__).parent / "clients"


def node() -> str:
    """Return a Node: Playwright's own, as the newest clients want a newer one than Debian has."""
    if not (CLIENTS / "node_modules").exists():
        skip_unless_ci("needs the npm clients, which 'make test' installs where it can")
    own = Path(playwright.__file__).parent / "driver" / "node"
    return str(own) if own.exists() else system_part("node")
