"""Small pieces of HTML, everything in them escaped; and the little Markdown that findings have."""

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any


def text(value: Any) -> str:
    """Any value as text that is safe in HTML; control characters become visible signs."""
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    visible = re.sub(r"[\0-\x08\x0b-\x1f\x7f]", lambda m: chr(0x2400 + min(ord(m[0]), 33)), plain)
    return html.escape(visible)


def note(what: str) -> str:
    """A paragraph of small print."""
    return f'<p class="note">{text(what)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already, the first of each row its heading; it scrolls where
    it is wider than the page. Empty where there are no rows."""
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    top = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>" if head else ""
    opened = f'<div class="scroll" tabindex="0"><table class="{kind}">'
    return f"{opened}{top}<tbody>{body}</tbody></table></div>" if body else ""


def details(summary: str, body: str) -> str:
    """A part that is folded; empty where its body is."""
    return f"<details><summary>{summary}</summary>{body}</details>" if body else ""


def tiles(figures: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """Main numbers: label, value and notes of each."""
    cells = ""
    for label, value, notes in figures:
        small = "".join(f"<span>{text(line)}</span>" for line in notes)
        cells += f"<div><span>{text(label)}</span><b>{text(value)}</b>{small}</div>"
    return f'<div class="grid tiles">{cells}</div>'


def markdown(source: str) -> str:
    """Headings, paragraphs, lists and tables, and of inline marks **bold**, *italics* and `code`.

    A heading is one level lower than it says, since the page has its own. Images are left out, of
    links the words stay; all else is text.
    """
    blocks: list[tuple[str, list[str]]] = [("blank", [])]
    for line in source.splitlines():
        kind, lines = _kind(line), blocks[-1][1]
        if kind == "more" and lines:
            lines[-1] += f" {line.strip()}"
        elif kind == blocks[-1][0] != "heading":
            lines.append(line.strip())
        else:
            blocks.append((kind, [line.strip()]))
    return "\n".join(_block(kind, lines) for kind, lines in blocks if kind != "blank")


def _kind(line: str) -> str:
    """What a line of Markdown belongs to; `more` goes on with what is before it."""
    kinds = {
        r"\s*$": "blank",
        "#{1,6} ": "heading",
        r"\s*\|": "table",
        "[-*] ": "ul",
        r"\d+\. ": "ol",
    }
    found = (kind for pattern, kind in kinds.items() if re.match(pattern, line))
    return next(found, "more" if line.startswith("  ") else "p")


def _block(kind: str, lines: list[str]) -> str:
    if kind == "heading":
        marks, _, words = lines[0].partition(" ")
        level = min(len(marks) + 1, 4)
        return f"<h{level}>{_inline(words)}</h{level}>"
    if kind in ("ul", "ol"):
        items = filter(None, (_inline(line.split(" ", 1)[1]) for line in lines))
        return f'<{kind} class="list">{"".join(f"<li>{item}</li>" for item in items)}</{kind}>'
    if kind != "table":
        return f"<p>{_inline(' '.join(lines))}</p>"
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines]
    rows = [[_inline(cell.strip().replace("\\|", "|")) for cell in row] for row in cells]
    ruled = len(rows) > 1 and all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in cells[1])
    return table(rows[0], rows[2:]) if ruled else table([], rows)


def _inline(source: str) -> str:
    """Escaped first, so that nothing but these marks becomes a tag."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"!\[[^\]]*\]\([^)]*\)", "", source))
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", text(words))
    marked = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)
    return re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])", r"<em>\1</em>", marked)
