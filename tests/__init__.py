"""The tests: ``python -m tests`` runs them, and its docstring says how."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
