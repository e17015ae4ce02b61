"""What mkdocs needs beside the pages: files of the repository that they link to, and nothing from elsewhere."""

import math
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

# Where mermaid would be fetched to draw this, it is drawn here: centres of the boxes, in columns and rows.
DIAGRAM = re.compile(r"```mermaid\nstateDiagram-v2\n(.*?)```", re.DOTALL)
PLACES = {
    "DORMANT": (0, 0), "GERMINATED": (1, 0), "TRAINING": (2, 0), "BLENDING": (3, 0), "HOLDING": (4, 0),
    "FOSSILIZED": (5, 0), "RESETTING": (0, 1), "EMBARGOED": (1, 1), "PRUNED": (2.5, 1),
}  # fmt: skip
COLUMN, ROW, WIDTH, HEIGHT = 150, 110, 106, 34
FILLED = 'fill="currentColor" stroke="none"'
TIP = 'markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto"'


def diagram(moves):
    """The stages and the moves between them, "DORMANT --> GERMINATED" in each line, as a picture."""
    arrows = re.findall(r"^ *([A-Z]+) --> ([A-Z]+)$", moves, flags=re.MULTILINE)
    both_ways = {pair for pair in arrows if pair[::-1] in arrows}
    parts = [
        f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" marker-end="url(#tip)"/>'
        for x1, y1, x2, y2 in (arrow(*pair, aside=8 * (pair in both_ways)) for pair in arrows)
    ]
    for name in dict.fromkeys(name for pair in arrows for name in pair):
        x, y = centre(name)
        box = f'x="{x - WIDTH / 2}" y="{y - HEIGHT / 2}" width="{WIDTH}" height="{HEIGHT}" rx="6"'
        parts.append(f'<rect {box}/><text x="{x}" y="{y + 4}" {FILLED} text-anchor="middle">{name}</text>')
    tip = f'<marker id="tip" {TIP}><path d="M0,0 L7,3 L0,6 z" {FILLED}/></marker>'
    style = "stroke:currentColor;fill:none;font:12px sans-serif;max-width:100%;height:auto"
    head = f'<svg viewBox="0 0 {6 * COLUMN} {ROW + 90}" role="img" aria-label="Stages and moves" style="{style}">'
    return f"<div>{head}<defs>{tip}</defs>{''.join(parts)}</svg></div>\n"


def centre(name):
    """Where the box of a stage is."""
    column, row = PLACES[name]
    return COLUMN * (column + 0.5), 40 + ROW * row


def arrow(source, target, aside):
    """From the edge of one box to the edge of another; ``aside`` of the line between their centres."""
    (x1, y1), (x2, y2) = centre(source), centre(target)
    dx, dy = x2 - x1, y2 - y1
    reach = min(WIDTH / 2 / abs(dx) if dx else math.inf, HEIGHT / 2 / abs(dy) if dy else math.inf)
    away = math.copysign(aside, dx)
    return x1 + dx * reach, y1 + dy * reach + away, x2 - dx * reach, y2 - dy * reach + away


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
    markdown = DIAGRAM.sub(lambda found: diagram(found[1]), markdown)
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
