"""The tool `fetch_page`: reads a page of the public web, and nothing else."""

from services.tool.builtin.fetch.tool import make_fetch_page

__all__ = ["make_fetch_page"]
