"""The tests. Helpers are imported from this package by name; docs/testing.md says what is where."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
