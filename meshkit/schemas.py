"""A service's schema under another name, for databases that are shared with others.

The SQL of a service names its schema before everything (`session.run`), so that no search_path decides what
it means: a pooler need not keep one. Under another name the same text is used with that put in.
"""

from __future__ import annotations

import re
from functools import cache


@cache
def in_schema(sql: str, schema: str, name: str) -> str:
    """Returns SQL whose `schema.` is `name.`."""
    if name == schema:
        return sql
    return re.sub(rf"\b{schema}\.(?=[a-z_%'])", f"{name}.", sql)
