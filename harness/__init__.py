"""What tests, measurements and the chaos run share: servers started for a while, waiting, asking, and load."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""
SAMPLE = ROOT / "examples" / "parcel-damaged.jpg"
"""A picture that every release answers."""
