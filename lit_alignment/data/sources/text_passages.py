"""Plain text cut into passages: at headings, then between paragraphs, and inside a paragraph only where it is too long.

Passages do not overlap: each is whole paragraphs of one section where that is possible, and its title names the
headings above it, so that what an overlap repeats is not needed to understand it.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BETWEEN = " > "  # headings in a title
# A run of more than 40 characters counts as several words; Chinese and Japanese, written without spaces, by character.
NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{NO_SPACES}]|[^\s{NO_SPACES}]{{1,40}}")
# Behind the end of a sentence: no initial or "e.g.", no usual title, and what follows is no small letter.
SENTENCE = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))(?<!\b\w\.)(?<!\b(?:Dr|Mr|Ms|St|vs|cf)\.)(?<!\bMrs\.)\s+(?=["'(\[`*]?[^\W_a-z])"""
    r"|(?<=[\u3002\uff01\uff1f])\s*"
)
LINE = re.compile(r"\n+")
HASHES = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*")  # a heading of Markdown
FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})")
UNDERLINE = re.compile(r"([!-/:-@\[-`{-~])\1+")
NO_TITLE = re.compile(
    r"\s{2}|\||^\s*([-*+]|\d+[.)])\s"
)  # rows of a table and items of a list have lines below them, too


@dataclass(frozen=True)
class TextPassage:
    """A piece of a text.

    Args:
        heading: The headings above it, the outermost first.
        text: The piece, with its line breaks.
        line: Where it begins in the text, counted from 1.
    """

    heading: str
    text: str
    line: int


@dataclass(frozen=True)
class Block:
    """A heading or a paragraph.

    Args:
        text: Its text.
        line: Its first line.
        level: Of a heading, 1 for the outermost; 0 for a paragraph.
    """

    text: str
    line: int
    level: int = 0


def split_text(lines: Iterable[str], max_words: int, markdown: bool = False) -> Iterator[TextPassage]:
    """The passages of a text; paragraphs of one section stand together as long as they fit.

    A heading with no text before the next one makes no passage; it stands in the titles of those below it.

    Args:
        lines: Of the text, read once.
        max_words: Words of a passage at most.
        markdown: Whether headings begin with `#` and code stands between fences; titles that are underlined, as in
            reStructuredText, are headings in every text.
    """
    headings: list[Block] = []
    joined: list[Block] = []  # paragraphs of the next passage
    room = max_words
    for block in _blocks(lines, markdown):
        words = 0 if block.level else num_words(block.text)
        if joined and (block.level or words > room):
            yield _passage(headings, joined)
            joined, room = [], max_words
        if block.level:
            headings = [each for each in headings if each.level < block.level] + [block]
        elif words > max_words:
            yield from (_passage(headings, [part]) for part in _parts(block, words, max_words))
        else:
            joined.append(block)
            room -= words
    if joined:
        yield _passage(headings, joined)


def num_words(text: str) -> int:
    """Number of words of a text."""
    return len(WORD.findall(text))


def _passage(headings: list[Block], paragraphs: list[Block]) -> TextPassage:
    heading = BETWEEN.join(each.text for each in headings)
    return TextPassage(heading, "\n\n".join(each.text for each in paragraphs), paragraphs[0].line)


def _parts(block: Block, words: int, max_words: int) -> Iterator[Block]:
    """A paragraph that is longer than a passage, in parts of about the same length."""
    enough = words / -(-words // max_words)
    text, count, line = "", 0, block.line
    for piece in _pieces(block.text, max_words, (SENTENCE, LINE)):
        own = num_words(piece)
        if text and (count >= enough or count + own > max_words):
            yield Block(text.rstrip(), line)
            text, count, line = "", 0, line + text.count("\n")
        text, count = text + piece, count + own
    yield Block(text.rstrip(), line)


def _pieces(text: str, max_words: int, cuts: tuple[re.Pattern[str], ...]) -> Iterator[str]:
    """What a text can be cut into: its sentences; where one is too long its lines, and where one of these is, words."""
    if not cuts:
        ends = [match.start() for match in WORD.finditer(text)][max_words::max_words]
    else:
        ends = [match.end() for match in cuts[0].finditer(text)]
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        piece = text[start:end]
        if cuts and num_words(piece) > max_words:
            yield from _pieces(piece, max_words, cuts[1:])
        elif piece:
            yield piece


def _blocks(lines: Iterable[str], markdown: bool) -> Iterator[Block]:
    """Headings and paragraphs in order."""
    kept: list[str] = []  # lines of a paragraph
    styles: list[str] = ["=", "-"] if markdown else []  # how titles are underlined, the outermost first
    fence, number = "", 0
    for number, raw in enumerate(lines, start=1):
        line = raw.rstrip()
        if markdown and (found := FENCE.match(line)):
            mark = found[1]
            closes = fence and mark.startswith(fence) and not line.strip().strip(mark[0])
            fence = "" if closes else fence or mark
            kept.append(line)
        elif fence:
            kept.append(line)
        elif not line:
            yield from _paragraph(kept, number)
            kept = []
        elif markdown and (found := HASHES.fullmatch(line)):
            yield from _paragraph(kept, number)
            yield Block(found[2], number, len(found[1]))
            kept = []
        elif style := _underlined(kept, line, markdown):
            if style not in styles:
                styles.append(style)
            yield Block(kept[-1].strip(), number - 1, styles.index(style) + 1)
            kept = []
        else:
            kept.append(line)
    yield from _paragraph(kept, number + 1)


def _paragraph(lines: list[str], end: int) -> Iterator[Block]:
    """The paragraph of some lines, before the line `end`, unless they only draw a line."""
    if any(not UNDERLINE.fullmatch(line.strip()) for line in lines):
        yield Block("\n".join(lines), end - len(lines))


def _underlined(above: list[str], line: str, markdown: bool) -> str:
    """How a title is underlined (and overlined) by a line; "" if there is no title above it."""
    if not UNDERLINE.fullmatch(line) or (markdown and line[0] not in "=-"):
        return ""
    title = above[-1].strip() if above else ""
    over = len(above) == 2 and not markdown and above[0] == line
    if not (over or len(above) == 1) or not title or UNDERLINE.fullmatch(title) or NO_TITLE.search(title):
        return ""
    if len(line) < (min(3, len(title)) if markdown else len(title)):
        return ""
    return line[0] * (2 if over else 1)
