"""Links from a page to files of the repository that are no pages.

In the sources they are ordinary links, which work where the repository is browsed. MyST offers a linked file for
download, as suits result files, but takes a ``.md`` file for a page and warns of a folder. Here the former becomes a
download too, and the latter its name: built pages don't know where the repository is published.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:)([^)#\s]+)\)")


def rewrite(text: str, folder: Path, pages: Path) -> str:
    """A page's text.

    Args:
        text: of the page.
        folder: that it lies in.
        pages: the folder of all pages.
    """

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        path = (folder / target).resolve()
        if path.is_dir():
            return f"`{label.strip('`')}`"
        if path.suffix == ".md" and path.is_file() and not path.is_relative_to(pages):
            return f"{{download}}`{label} <{target}>`"
        return match.group()

    return _LINK.sub(link, text)


def setup(app: Sphinx) -> dict[str, bool]:
    def on_read(app: Sphinx, name: str, source: list[str]) -> None:
        pages = Path(app.srcdir)
        source[0] = rewrite(source[0], Path(app.env.doc2path(name)).parent, pages)

    app.connect("source-read", on_read)
    return {"parallel_read_safe": True}
