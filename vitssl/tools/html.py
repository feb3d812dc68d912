"""Small pieces of a self-contained HTML page: nothing on it is from elsewhere."""

import html
import json

_STYLE = """
:root { color-scheme: light dark; --ink: #22252e; --soft: #646978; --line: #dfe1e8;
  --paper: #fff; --tile: #f6f7fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ee; --soft: #9aa0b0;
  --line: #363a46; --paper: #16181d; --tile: #1f222a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 1160px; margin: 0 auto;
  padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 30px 0 10px; }
section { scroll-margin-top: 44px; }
p.note, figcaption, summary small { color: var(--soft); font-size: 13px; }
p.verdict { font-size: 18px; border-left: 4px solid var(--soft); margin: 18px 0;
  padding: 2px 0 2px 14px; max-width: 900px; }
p.learned { border-color: #009e73; } p.collapsed, p.not { border-color: #d55e00; }
nav { position: sticky; top: 0; background: var(--paper); z-index: 1; padding: 8px 0;
  border-bottom: 1px solid var(--line); font-size: 13.5px; }
nav a { margin-right: 16px; color: inherit; text-decoration: none; }
nav a:hover { text-decoration: underline; }
.tiles { display: grid; gap: 10px; margin: 16px 0;
  grid-template-columns: repeat(auto-fit, minmax(125px, 1fr)); }
.tile { background: var(--tile); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 21px; font-weight: 600; }
.tile span { color: var(--soft); font-size: 13px; line-height: 1.35;
  display: block; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr));
  gap: 14px; align-items: start; }
.pictures { display: flex; flex-wrap: wrap; gap: 22px; align-items: flex-start; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: right; padding: 4px 12px; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td b { color: #009e73; }
figure { margin: 0; max-width: 100%; } figcaption { padding-top: 4px; }
figure img { max-width: 100%; background: #fff; border-radius: 6px; display: block; }
svg.chart { width: 100%; height: auto; cursor: crosshair; touch-action: pan-y; }
svg text { fill: var(--soft); font-size: 11px; user-select: none; }
svg .title { fill: var(--ink); font-size: 13px; } svg .level { font-size: 10px; }
svg .rule { stroke: var(--line); }
.plot { overflow: hidden; } .plot path { fill: none; stroke-width: 1.8;
  vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.plot .raw { opacity: .3; stroke-width: 1; } .plot .off { display: none; }
.plot .dot { stroke-width: 7; stroke-linecap: round; }
.plot .dashed { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 4; }
svg .cross { stroke: var(--soft); stroke-width: .7; pointer-events: none; }
svg .mark { fill: #56b4e9; opacity: .25; pointer-events: none; }
.tip { display: none; position: absolute; z-index: 2; pointer-events: none;
  background: var(--tile); border: 1px solid var(--line); border-radius: 6px;
  padding: 4px 9px; font-size: 12.5px; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 2px 0 8px;
  font-size: 13px; }
.legend span { cursor: pointer; } .legend .off { opacity: .35; }
.legend i { display: inline-block; width: 18px; height: 4px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; }
details { margin: 6px 0; } summary { cursor: pointer; }
pre { background: var(--tile); border-radius: 8px; padding: 12px 16px; overflow-x: auto;
  font-size: 13px; }
"""


class Safe(str):
    """Text that is HTML already."""


def escape(value) -> Safe:
    """Return text as HTML; `Safe` text stays as it is."""
    return value if isinstance(value, Safe) else Safe(html.escape(str(value)))


def element(tag: str, *content, **attributes) -> Safe:
    """Return <tag attributes>content</tag>; an attribute `class_` is `class`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Safe(f"<{tag}{given}>{''.join(map(escape, content))}</{tag}>")


def document(title: str, body, script: str = "") -> str:
    """Return a whole page; a script runs once all of it is there."""
    body = [*body, *([Safe(f"<script>{script}</script>")] if script else [])]
    head = f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    width = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{width}{head}'
        '<link rel="icon" href="data:,"></head>\n<body>\n'
        + "\n".join(map(escape, body))
        + "\n</body></html>\n"
    )


def section(title: str, *content) -> Safe:
    """Return a section with a heading that links can name."""
    return element("section", element("h2", title), *content, id=_anchor(title))


def _anchor(title) -> str:
    return title.lower().replace(" ", "-").replace(",", "")


def navigation(titles) -> Safe:
    """Return links to the sections of these headings."""
    links = [element("a", title, href=f"#{_anchor(title)}") for title in titles]
    return element("nav", *links)


def table(headings, rows) -> Safe:
    """Return a table, scrolled sideways where it is wider than the page."""
    if not rows:
        return element("p", "Nothing.", class_="note")
    head = element("tr", *(element("th", h) for h in headings))
    lines = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    inner = element("table", element("thead", head), element("tbody", *lines))
    return element("div", inner, class_="scroll")


def tiles(pairs) -> Safe:
    """Return big numbers: [(value, what it is)]."""
    each = [
        element("div", element("b", value), element("span", name), class_="tile")
        for value, name in pairs
    ]
    return element("div", *each, class_="tiles")


def grid(before, items) -> Safe:
    """Return items side by side, as many as fit, below what comes `before`."""
    return Safe("".join(map(escape, before)) + element("div", *items, class_="grid"))


def folded(title: str, *content, note: str = "", opened: bool = False) -> Safe:
    """Return content that opens on a click."""
    extra = [Safe(" "), element("small", note)] if note else []
    inner = element("summary", title, *extra), *content
    block = element("details", *inner)
    return Safe(block.replace("<details>", "<details open>", 1)) if opened else block


def code(value) -> Safe:
    """Return a value as indented JSON."""
    return element("pre", json.dumps(value, indent=2))
