"""A hook of mkdocs: a file outside of docs/ that a page links to is shown on a page of the site.

`[slurm.sh](../../examples/slurm.sh)` thus leads somewhere on GitHub and on the site.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?P<up>(?:\.\./)+)(?P<path>(?:examples|src|scripts|tests|benchmarks)/[^)#]+)\)")
LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file that is linked, or the file itself where it is no code."""
    linked = {found["path"] for page in files.documentation_pages() for found in LINK.finditer(page.content_string)}
    for path in sorted(linked):
        if language := LANGUAGES.get(PurePosixPath(path).suffix):
            content = f"# {path}\n\n````{language}\n{(ROOT / path).read_text()}````\n"
            made = File.generated(config, f"{path}.md", content=content, inclusion=InclusionLevel.NOT_IN_NAV)
        else:
            made = File.generated(config, path, abs_src_path=str(ROOT / path))
        files.append(made)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links there: what lies beside docs/ lies within it here, a step less up."""

    def inside(link: re.Match[str]) -> str:
        suffix = ".md" if PurePosixPath(link["path"]).suffix in LANGUAGES else ""
        return f"]({link['up'].removeprefix('../')}{link['path']}{suffix})"

    return LINK.sub(inside, markdown)
