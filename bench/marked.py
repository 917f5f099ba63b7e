"""What is made anew in a page: all between the lines ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations

import re
from collections.abc import Callable

_MARKED = re.compile(r"(<!-- ([\w:-]+) -->\n).*?(<!-- /\2 -->)", re.S)


def replaced(page: str, text_of: Callable[[str], str | None]) -> str:
    """The page with ``text_of(name)`` between the lines of each name, as it is for None."""

    def with_text(found: re.Match[str]) -> str:
        text = text_of(found[2])
        return found[0] if text is None else f"{found[1]}{text}\n{found[3]}"

    return _MARKED.sub(with_text, page)
