"""Numbered migrations of the schema `session`, applied with `migrate(url, PATH, schema=SCHEMA)`."""

from pathlib import Path

PATH = Path(__file__).parent
SCHEMA = "session"
