"""What mkdocs needs beside the pages: files of the repository that they link to, and nothing from elsewhere."""

import pathlib
import re
import sys

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import messages  # noqa: E402 - the folder has to be known first

# Where the list of all messages goes: too long to be kept in the repository, where each change of one would change it.
ERRORS = "<!-- errors: every message in the code, written when the site is built -->"
# A link out of docs/, "../examples/raw_loop.py" say: right in the repository, and in the site a copy of the file.
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)\)")
# What a browser would fetch on its own; links that a reader may follow are not among it.
FETCHED = re.compile(r"""<(?:(?:script|img|iframe|source)\b[^>]*\bsrc|link\b[^>]*\bhref)=["']?(?:https?:)?//[^"'> ]*""")


def on_files(files, config):
    """Add what the pages link to outside of docs/."""
    pages = [page.content_string for page in files.documentation_pages()]
    for path in sorted({path for page in pages for path in OUTSIDE.findall(page)}):
        if not (ROOT / path).is_file():
            raise PluginError(f"a page links to ../{path}, which is no file")
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point those links into the site, and write what the code says into its place."""
    markdown = markdown.replace(ERRORS, messages.as_markdown())
    return OUTSIDE.sub(r"](\1)", markdown)


def on_post_build(config):
    """Refuse a page that would fetch something from another place."""
    found = {
        hit
        for path in pathlib.Path(config.site_dir).glob("**/*.html")
        for hit in FETCHED.findall(path.read_text(encoding="utf-8"))
    }
    if found:
        raise PluginError(f"the site fetches from elsewhere: {sorted(found)}")
