"""HTML that is safe by construction, and the charts drawn with it.

Whatever is not `Html` already is escaped where it enters a tag. The page has no script, no inline style and no
address of anything outside itself, and its policy allows none.
"""

import base64
import hashlib
import html
from collections.abc import Sequence

STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--page:#fff;--card:#f6f8fa;--line:#d1d9e0;--s0:#0969da;
--s1:#bf8700;--s2:#1a7f37;--s3:#8250df;--s4:#bc4c00;--s5:#8c959f;--bad:#cf222e}
@media(prefers-color-scheme:dark){:root{--ink:#f0f6fc;--soft:#9198a1;--page:#0d1117;--card:#151b23;--line:#3d444d;
--s0:#4493f8;--s1:#d29922;--s2:#3fb950;--s3:#ab7df8;--s4:#f0883e;--s5:#7d8590;--bad:#f85149}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:66rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.5rem;margin:.5rem 0 0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.2rem 0 .5rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
p{margin:.35rem 0}
.soft,figcaption,th{color:var(--soft)}
.bad{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0}
.card,.thumb{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.5rem .7rem}
.card b{display:block;font-size:1.25rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.2rem .7rem .2rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:500;white-space:nowrap}
td{overflow-wrap:anywhere;min-width:6rem}
td.n,th.n{text-align:right;white-space:nowrap;min-width:0}
td.wide{min-width:6rem;width:45%}
.bars{display:block;width:100%;height:1.1rem}
figure{margin:.5rem 0}
.plot{display:block;width:100%;height:11rem;border-bottom:1px solid var(--soft);border-left:1px solid var(--soft)}
.axis{display:flex;justify-content:space-between;color:var(--soft);font-size:.85rem}
.grid{stroke:var(--line);stroke-width:1;vector-effect:non-scaling-stroke}
.line{fill:none;stroke:var(--s0);stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.area{fill:var(--s0);opacity:.15}
.s0{fill:var(--s0)}.s1{fill:var(--s1)}.s2{fill:var(--s2)}.s3{fill:var(--s3)}.s4{fill:var(--s4)}.s5{fill:var(--s5)}
.track{fill:var(--card)}
.key{display:inline-block;margin-right:1rem;white-space:nowrap}
.key svg{width:.8rem;height:.8rem;margin-right:.35rem}
.thumbs{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:.6rem}
.thumb{font-size:.8rem;line-height:1.35;overflow-wrap:anywhere;margin:0}
.thumb img,.none{display:block;width:100%;aspect-ratio:1;object-fit:contain;border-radius:4px;margin-bottom:.35rem}
.none{background:var(--line)}
.picture{display:block;width:100%;border-radius:6px}
a{color:var(--s0)}
.word{white-space:nowrap}
summary{cursor:pointer;margin:.6rem 0}
@media(max-width:34rem){th,td{padding-right:.4rem;font-size:.85rem}td,td.wide{min-width:4rem}}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'"
MAX_TEXT = 300
"""Characters of a text from outside: its middle is left out."""


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element; a trailing underscore and inner ones of an attribute's name go or become hyphens."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"' for key, value in attributes.items() if value != ""
    )
    return Html(f"<{name}{given}>{joined(content)}</{name}>")


def void(name: str, **attributes: object) -> Html:
    """An element without content."""
    return Html(tag(name, **attributes).removesuffix(f"</{name}>"))


def joined(content: Sequence[object]) -> Html:
    return Html("".join(escaped(item) for item in content))


def escaped(value: object) -> Html:
    if isinstance(value, Html):
        return value
    # Controls and lone surrogates have no place in HTML, and marks of direction would turn what follows around.
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return Html(html.escape(text))


def foreign(value: object) -> Html:
    """A text from outside, shortened and kept from mixing with its surroundings."""
    text = str(value)
    half = MAX_TEXT // 2
    return tag("bdi", text if len(text) <= MAX_TEXT else f"{text[:half]} … {text[-half:]}")


def document(title: str, *content: object) -> str:
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    head = tag(
        "head",
        void("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(digest)}">'),
        void("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        void("link", rel="icon", href="data:,"),
        tag("title", title),
        Html(f"<style>{STYLE}</style>"),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', *content), lang='en')}\n"


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: str = "") -> Html:
    """`numbers` has an n for each column of numbers, and anything else for the others."""
    kinds = [{"class_": "n"} if kind == "n" else {"class_": "wide"} if kind == "w" else {} for kind in numbers]
    kinds += [{}] * (len(titles) - len(kinds))
    head = [tag("th", title, **kind) for title, kind in zip(titles, kinds, strict=True)]
    body = [tag("tr", *(tag("td", cell, **kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows]
    whole = tag("table", tag("thead", tag("tr", *head)) if any(titles) else "", tag("tbody", *body))
    return tag("div", whole, class_="scroll")


def bars(shares: Sequence[tuple[str, float]], title: str) -> Html:
    """Shares of a whole, side by side; each with its class of colour."""
    boxes, x = [], 0.0
    for kind, share in shares:
        boxes.append(void_box(kind, x, 0, share, 1))
        x += share
    track = void_box("track", 0, 0, 1, 1)
    return tag("svg", tag("title", title), track, *boxes, class_="bars", viewBox="0 0 1 1", preserveAspectRatio="none")


def void_box(kind: str, x: float, y: float, width: float, height: float) -> Html:
    return tag("rect", class_=kind, x=f"{x:.4f}", y=f"{y:.4f}", width=f"{width:.4f}", height=f"{height:.4f}")


def legend(kinds: dict[str, str]) -> Html:
    keys = (
        tag("span", tag("svg", void_box(kind, 0, 0, 1, 1), viewBox="0 0 1 1"), name, class_="key")
        for kind, name in kinds.items()
    )
    return tag("p", *keys)


def plot(values: Sequence[float], *, top: str, left: str, right: str, title: str, as_line: bool) -> Html:
    """Equal steps from left to right, from zero to their largest value: as a line, or as columns."""
    largest = max(values, default=0.0) or 1.0
    heights = [value / largest * 0.95 for value in values]
    step = 1 / max(len(values), 1)
    if as_line:
        points = [f"{(i + end) * step:.4f},{1 - h:.4f}" for i, h in enumerate(heights) for end in (0, 1)]
        shapes = [
            tag("polygon", class_="area", points=" ".join(["0,1", *points, "1,1"])),
            tag("polyline", class_="line", points=" ".join(points)),
        ]
    else:
        shapes = [void_box("s0", (i + 0.06) * step, 1 - h, 0.88 * step, h) for i, h in enumerate(heights)]
    lines = [tag("line", class_="grid", x1=0, x2=1, y1=y, y2=y) for y in (0.05, 0.525)]
    picture = tag(
        "svg", tag("title", title), *lines, *shapes, class_="plot", viewBox="0 0 1 1", preserveAspectRatio="none"
    )
    return tag(
        "figure",
        tag("div", tag("span", top), class_="axis"),
        picture,
        tag("div", tag("span", left), tag("span", right), class_="axis"),
    )
