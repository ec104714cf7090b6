"""Domains of the demonstration pool besides prose: code, licences, tables, and four kinds of damage that crawls hold.

A document is (source name, text) of some 500 to 3,000 characters. Generators are endless unless their text runs out,
and a function of the random generator they are given.
"""

from __future__ import annotations

import base64
import calendar
import html.entities
import math
import random
import unicodedata
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Sequence

Document = tuple[str, str]
SHORTEST, LONGEST = 500, 3000
LICENCE_PASSES = 4  # licences recur in a crawl, each time cut elsewhere


def document_length(generator: random.Random) -> int:
    """Characters of the next document."""
    return generator.randint(SHORTEST, LONGEST)


def prose(folders: dict[str, list[Document]], generator: random.Random) -> list[Document]:
    """Paragraphs of one folder joined to documents; the rest of a folder that is too short is left out."""
    documents = []
    for paragraphs in folders.values():
        source, parts, size, target = "", [], 0, document_length(generator)
        for name, paragraph in paragraphs:
            source = source or name
            parts.append(paragraph)
            size += len(paragraph)
            if size >= target:
                documents.append((source, "\n\n".join(parts)))
                source, parts, size, target = "", [], 0, document_length(generator)
        if size >= SHORTEST:
            documents.append((source, "\n\n".join(parts)))
    return documents


def pieces(texts: Sequence[Document], generator: random.Random) -> Iterator[Document]:
    """Texts cut at line ends into documents; short ones of different sources are not joined but passed over."""
    for name, text in texts:
        lines, size, target = [], 0, document_length(generator)
        for line in text.split("\n"):
            lines.append(line[:LONGEST])
            size += len(lines[-1]) + 1
            if size >= target:
                yield name, "\n".join(lines).strip("\n")
                lines, size, target = [], 0, document_length(generator)
        if size >= SHORTEST // 2:
            yield name, "\n".join(lines).strip("\n")


def code(texts: Sequence[Document], generator: random.Random) -> Iterator[Document]:
    """Python source, its documentation taken out."""
    return pieces(generator.sample(texts, len(texts)), generator)


def licences(texts: Sequence[Document], generator: random.Random) -> Iterator[Document]:
    """Licence texts, and clauses found in headers, several passes over."""
    clauses = [text for _, text in texts if len(text) < SHORTEST // 2]
    joined = ("collected clauses", "\n\n".join(clauses))
    for _ in range(LICENCE_PASSES):
        yield from pieces(generator.sample([*texts, joined], len(texts) + 1), generator)


def tables(generator: random.Random) -> Iterator[Document]:
    """Rows of numbers and codes: character tables, functions, readings, calendars."""
    while True:
        name = generator.choice(list(TABLES))
        rows, target = TABLES[name](generator), document_length(generator)
        lines, size = [], 0
        while size < target:
            lines.append(next(rows))
            size += len(lines[-1]) + 1
        yield f"tables/{name}", "\n".join(lines)


def _characters(generator: random.Random) -> Iterator[str]:
    point = generator.randrange(0x20, 0x1F000)
    while True:
        point = (point + 1) % 0x1F000
        name = unicodedata.name(chr(point), "")
        if name:
            properties = unicodedata.category(chr(point)), unicodedata.bidirectional(chr(point))
            yield f"{point:04X};{name};{';'.join(properties)};{unicodedata.combining(chr(point))};;;;N;;;;;"


def _functions(generator: random.Random) -> Iterator[str]:
    x, step, mark = (
        generator.uniform(0.1, 50),
        generator.choice([0.001, 0.01, 0.1]),
        generator.choice(["\t", ",", " | "]),
    )
    yield mark.join(["x", "sin", "cos", "log", "sqrt", "exp(-x)"])
    while True:
        x += step
        values = math.sin(x), math.cos(x), math.log(x), math.sqrt(x), math.exp(-x)
        yield mark.join([f"{x:.3f}", *(f"{value:.6f}" for value in values)])


def _readings(generator: random.Random) -> Iterator[str]:
    yield "station,date,time,temperature,pressure,humidity,status"
    day = generator.randrange(20_000)
    while True:
        day += 1
        date = f"{1970 + day // 365}-{day // 31 % 12 + 1:02d}-{day % 28 + 1:02d}"
        values = generator.gauss(12, 8), generator.gauss(1013, 9), generator.randrange(20, 100)
        yield (
            f"ST{generator.randrange(999):03d},{date},{generator.randrange(24):02d}:{generator.randrange(60):02d},"
            f"{values[0]:.1f},{values[1]:.1f},{values[2]},{generator.choice(['OK', 'OK', 'NA', 'E7'])}"
        )


def _entities(generator: random.Random) -> Iterator[str]:
    names = sorted(html.entities.html5)
    position = generator.randrange(len(names))
    while True:
        position = (position + 1) % len(names)
        text = html.entities.html5[names[position]]
        yield f"&{names[position]}\t{' '.join(f'U+{ord(character):05X}' for character in text)}\t{text}"


def _calendars(generator: random.Random) -> Iterator[str]:
    month = generator.randrange(1900 * 12, 2100 * 12)
    while True:
        month += 1
        yield calendar.month(month // 12, month % 12 + 1)


def _prices(generator: random.Random) -> Iterator[str]:
    yield "| SKU | qty | unit | total | tax |"
    while True:
        count, price = generator.randrange(1, 500), generator.randrange(99, 99_999) / 100
        code_name = f"{generator.choice('ABCDEFGH')}{generator.randrange(10_000, 99_999)}-{generator.randrange(99):02d}"
        yield f"| {code_name} | {count} | {price:.2f} | {count * price:.2f} | {count * price * 0.19:.2f} |"


TABLES: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "characters": _characters,
    "functions": _functions,
    "readings": _readings,
    "entities": _entities,
    "calendars": _calendars,
    "prices": _prices,
}

SECTIONS = (
    "Home", "About us", "Contact", "News", "Blog", "Products", "Services", "Support", "Careers", "Press", "Shop", "FAQ",
    "Events", "Gallery", "Downloads", "Partners", "Investors", "Locations", "Newsletter", "My account", "Wish list",
    "Gift cards", "Store finder", "Returns", "Shipping", "Track your order", "Privacy", "Terms of use", "Imprint",
    "Accessibility", "Site map", "Log in", "Register", "Forum", "Community", "Archive", "Categories", "Tags", "Reviews",
)  # fmt: skip
NOTICES = (
    "We use cookies to improve your experience. By continuing to browse {site} you agree to our use of cookies.",
    "This website uses cookies. Accept all | Reject all | Cookie settings",
    "Sign up for the {site} newsletter and get {n}% off your first order!",
    "Please enable JavaScript to view the comments. {n} comments",
    "Share this: Facebook Twitter Pinterest LinkedIn WhatsApp Email Print",
    "You must be logged in to post a comment. Log in with Facebook or Google.",
    "Copyright (c) {year} {site}. All rights reserved. Powered by WordPress. Theme by {site}.",
    "Skip to main content Skip to navigation Skip to footer",
    "Page {n} of {m} << First < Previous Next > Last >>",
    "Your browser is out of date. Update it to view {site} correctly.",
    "Add to cart Add to wish list Compare | In stock | Ships within {n} days | Free shipping over ${m}",
    "Rated {n} out of 5 based on {m} customer reviews. Write a review. Report abuse.",
    "Posted by admin on {year}-0{d}-1{d} in Uncategorized | Leave a comment | Permalink",
    "Related posts: Older posts Newer posts | Filed under: News | Tagged: {site}, update",
    "Subscribe to our RSS feed. Follow us on Twitter @{site}. Like us on Facebook. {n},{m} followers",
    "404 Not Found. The page you requested could not be found. Return to the home page or use the search box.",
    "Opening hours: Mon-Fri 0{d}:00-1{d}:00, Sat 10:00-1{d}:00, Sun closed. Tel: (555) {m}-{year}",
)
SITES = (
    "example",
    "acme",
    "northwind",
    "contoso",
    "widgets",
    "shoponline",
    "dailyfeed",
    "mysite",
    "bestdeals",
    "cityguide",
)


def boilerplate(generator: random.Random) -> Iterator[Document]:
    """Navigation, cookie notices, footers: the same lines over and over, with small variations."""
    while True:
        site = f"{generator.choice(SITES)}{generator.randrange(100)}"
        menu = generator.choice([" | ", " > ", "\n", "  ", " · "]).join(
            generator.sample(SECTIONS, generator.randint(8, 20))
        )
        lines, target = [menu], document_length(generator)
        while sum(map(len, lines)) < target:
            notice = generator.choice(NOTICES) if generator.random() < 0.8 else menu
            lines.append(notice.replace("{site}", site).format_map(_numbers(generator)))
        yield f"{site}.example/", "\n".join(lines)


def _numbers(generator: random.Random) -> dict[str, int]:
    ranges = {"n": (1, 50), "m": (50, 999), "d": (1, 9), "year": (2001, 2024)}
    return {name: generator.randint(*bounds) for name, bounds in ranges.items()}


def encoded(texts: Sequence[Document], generator: random.Random) -> Iterator[Document]:
    """Compressed bytes as base64, hexadecimal, base85 or percent codes, as mails and data URIs leave them."""
    while True:
        name, text = generator.choice(texts)
        start = generator.randrange(max(1, len(text) - 8000))
        data = zlib.compress(text[start : start + 8000].encode("utf-8"), 9)
        yield f"encoded/{name}", ENCODERS[generator.choice(list(ENCODERS))](data)[: document_length(generator)]


def _lines(text: str, width: int) -> str:
    return "\n".join(text[start : start + width] for start in range(0, len(text), width))


def _hex_dump(data: bytes) -> str:
    rows = (data[start : start + 16] for start in range(0, len(data), 16))
    return "\n".join(f"{row * 16:08x}: {chunk.hex(' ', 2)}" for row, chunk in enumerate(rows))


ENCODERS: dict[str, Callable[[bytes], str]] = {
    "base64": lambda data: _lines(base64.b64encode(data).decode(), 76),
    "data-uri": lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
    "hex": lambda data: _lines(data.hex(), 64),
    "hex-dump": _hex_dump,
    "base85": lambda data: _lines(base64.b85encode(data).decode(), 80),
    "percent": lambda data: urllib.parse.quote_from_bytes(data),
}


def shuffled(documents: Sequence[Document], generator: random.Random) -> Iterator[Document]:
    """Prose whose words are in random order."""
    for name, text in documents:
        words = text.split()
        generator.shuffle(words)
        yield name, " ".join(words)


def mojibake(documents: Sequence[Document], generator: random.Random) -> Iterator[Document]:
    """Prose read back with the wrong encoding, once or several times."""
    for name, text in documents:
        yield name, MISREADINGS[generator.choice(list(MISREADINGS))](text, generator)


def _accents(text: str, generator: random.Random) -> str:
    """Typographic quotes and dashes, and accents on many vowels, as other languages have them."""
    table = {
        "a": "áàâäã",
        "e": "éèêë",
        "i": "íìîï",
        "o": "óòôöõ",
        "u": "úùûü",
        "n": "ñ",
        "c": "ç",
        "s": "š",
        "'": "’",
        '"': "”",
    }
    return "".join(
        generator.choice(table[character]) if character in table and generator.random() < 0.5 else character
        for character in text
    )


def _repeatedly_misread(text: str, generator: random.Random) -> str:
    text = _accents(text, generator)
    for _ in range(generator.randint(1, 3)):
        text = text.encode("utf-8").decode(generator.choice(["latin-1", "cp437", "mac_roman"]))
    return text


def _as_utf16(text: str, generator: random.Random) -> str:
    data = text.encode("latin-1", errors="replace")
    return (data + b" " * (len(data) % 2)).decode(generator.choice(["utf-16-le", "utf-16-be"]), errors="replace")


MISREADINGS: dict[str, Callable[[str, random.Random], str]] = {
    "utf-8 as one byte per character": _repeatedly_misread,
    "one byte per character as utf-16": _as_utf16,
    "ebcdic as latin-1": lambda text, generator: text.encode("cp500", errors="replace").decode("latin-1"),
    "latin-1 as koi8, high bit set": lambda text, generator: bytes(
        byte | 0x80 if byte > 0x40 else byte for byte in text.encode("latin-1", errors="replace")
    ).decode(generator.choice(["koi8_r", "cp1251", "mac_greek"]), errors="replace"),
}
