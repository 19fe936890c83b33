"""Reads text files, and refuses files of any other kind by name."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from pathlib import Path

GZIP = b"\x1f\x8b"
_MARKS = {  # the longer first: UTF-32 begins as UTF-16 does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_IMAGE = "an image. Remove it, or name the text files alone"
_ARCHIVE = "an archive, or a document of an office program. Unpack it, or save it as plain text"
_FOREIGN = {
    b"%PDF": "a PDF. Extract its text, say with `pdftotext`",
    b"%!PS": "PostScript. Extract its text, say with `ps2ascii`",
    b"{\\rtf": "rich text. Save it as plain text",
    b"version https://git-lfs": "a pointer of Git LFS. Run `git lfs pull`",
    b"PAR1": "a Parquet table. Give it by itself, not among text",
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), _IMAGE),
    **dict.fromkeys((b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!"), _ARCHIVE),
}
"""First bytes of files of other kinds -> what they are, and the remedy."""


def read_text(file: Path, argument: str) -> str:
    """Read a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, compressed by gzip or not.

    Raises:
        ValueError: If the file is not text, or has another encoding; the message names it.
    """
    content = file.read_bytes()
    try:
        if content.startswith(GZIP):
            content = gzip.decompress(content)
        encoding = encoding_of(content)
        problem = next((what for start, what in _FOREIGN.items() if content.startswith(start)), None)
        if problem is None and encoding.startswith("utf-8") and b"\0" in content:
            problem = "which holds zero bytes, as UTF-8 text does not. Remove it, or save it as UTF-8 text"
        if problem is None:
            # As `open` reads it: all ends of lines are "\n".
            return io.TextIOWrapper(io.BytesIO(content), encoding=encoding).read()
    except UnicodeDecodeError as error:
        encoding, place = error.encoding.upper(), error.start
        problem = f"which is not text in {encoding} (byte {place}). {conversion(file)}, or remove it"
    except (EOFError, OSError, zlib.error) as error:
        problem = f"whose compression is broken ({error}). Copy it again"
    raise ValueError(f"`{argument}` must hold text, got {str(file)!r}, {problem}.")


def encoding_of(start: bytes) -> str:
    """Return the encoding of a file's byte order mark, or UTF-8 without one."""
    return next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), "utf-8")


def conversion(file: Path) -> str:
    """Tell how to convert a file of an older encoding to UTF-8."""
    return f"Convert it if it is text, say by `iconv -f LATIN1 -t UTF-8 {file.name}`"
