"""What is text is read, whatever else is refused by name."""

import bz2
import gzip
import lzma
import random

import pytest

from sparse_prune.recipes.base.plain_text import read_text

TEXT = "déjà vu\nüber 字\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_marked_and_compressed_text_is_read(tmp_path, encoding, compress):
    file = tmp_path / "file.txt"
    file.write_bytes(compress(TEXT.replace("\n", "\r\n").encode(encoding)))
    assert read_text(file, "text") == TEXT


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "déjà vu".encode("latin-1"),
            r"not text in UTF-8 \(byte 1\)\. Convert it if it is text, say by `iconv -f LATIN1 -t UTF-8 ",
        ),
        (TEXT.encode("utf-16-le"), "zero bytes, as UTF-8 text does not. Remove it, or save it as"),
        (TEXT.encode("utf-16")[:-1], r"not text in UTF-16-.E \(byte"),
        (b"%PDF-1.7\nobj", "a PDF. Extract its text"),
        (b"\x89PNG\r\n\x1a\n", "an image. Remove it, or name the text files alone"),
        (b"PK\x03\x04", "an archive"),
        (bz2.compress(TEXT.encode()), "an archive, .*Unpack it"),
        (lzma.compress(TEXT.encode()), "an archive, .*Unpack it"),
        (b"PAR1", "a Parquet table. Give it by itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS. Run `git lfs pull`"),
        (gzip.compress(b"%PDF", mtime=0), "a PDF"),
        (gzip.compress(TEXT.encode() * 99, mtime=0)[:-9], "whose compression is broken"),
        (b"\x1f\x8b\x08\x00rubbish", "whose compression is broken"),
        (random.Random(0).randbytes(9000), "zero bytes"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, content, told):
    (tmp_path / "file.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"`data` must hold text, got '.*/file.txt', (which is |which holds )?{told}"):
        read_text(tmp_path / "file.txt", "data")
