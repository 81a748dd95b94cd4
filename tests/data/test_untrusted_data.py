"""Data from strangers: archives under other names, pictures that grow when they are decoded, links."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from layerwise.data.load import check_source, load_data
from layerwise.data.spec import DataSpec
from layerwise.errors import BadInput

INNER = b"text,label\nthe fox leaps,0\n" * 40


def _zip():
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("../../escaped.csv", INNER)
    return held.getvalue()


def _tar(mode="w"):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode=mode) as archive:
        entry = tarfile.TarInfo("../../escaped.csv")
        entry.size = len(INNER)
        archive.addfile(entry, io.BytesIO(INNER))
    return held.getvalue()


ARCHIVES = {
    "zip": _zip(), "tar": _tar(), "gzip": gzip.compress(INNER), "gzip tar": _tar("w:gz"), "bzip2": bz2.compress(INNER), "xz": lzma.compress(INNER),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(20), "7z": b"7z\xbc\xaf\x27\x1c" + bytes(20), "rar": b"Rar!\x1a\x07" + bytes(20),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt", ".parquet", ".tsv", ".json"])
@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_under_another_name_is_not_unpacked(tmp_path, kind, suffix):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = folder / f"train{suffix}"
    path.write_bytes(ARCHIVES[kind])
    before = sorted(tmp_path.rglob("*"))
    for source in (path, folder):
        for read in (check_source, load_data):
            with pytest.raises(BadInput, match=rf"train{suffix} is an archive or a compressed file \({kind.split()[0]}\)"):
                read(DataSpec(source=f"path:{source}"))
    assert sorted(tmp_path.rglob("*")) == before


def _pictures(folder, names=("a", "b")):
    for label in names:
        (folder / label).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), 10 * i, dtype=np.uint8)).save(folder / label / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", ["more.zip", "notes", "metadata.csv"])
def test_an_archive_among_pictures_is_not_unpacked(tmp_path, name):
    folder = _pictures(tmp_path / "pictures")
    load_data(DataSpec(source=f"path:{folder}"))
    (folder / name).write_bytes(ARCHIVES["zip"])
    with pytest.raises(BadInput, match=rf"{name} is an archive"):
        load_data(DataSpec(source=f"path:{folder}"))


def _bomb(side):
    """A PNG of a few kilobytes that says it is `side` pixels wide and high."""

    def chunk(name, content):
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    size = side.to_bytes(4, "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + size + b"\x08\x00\x00\x00\x00")
        + chunk(b"IDAT", zlib.compress(bytes(9000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 14_000, 60_000, 2**31 - 1])
def test_a_picture_that_grows_without_end_is_not_decoded(tmp_path, side):
    folder = _pictures(tmp_path / "pictures")
    (folder / "a" / "9.png").write_bytes(_bomb(side))
    with pytest.raises(BadInput, match=r"image \d+ cannot be decoded"):
        load_data(DataSpec(source=f"path:{folder}"))


def test_pictures_that_are_too_many_for_the_memory_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    folder = _pictures(tmp_path / "pictures")
    monkeypatch.setattr("layerwise.memory.memory", lambda: 6 * 64 * 7)
    with pytest.raises(BadInput, match=r"decoding its first 8 images would take 0\.0 GB; this machine has"):
        load_data(DataSpec(source=f"path:{folder}"))


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(30), b"BM" + bytes(60), b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(20), bytes(99)]
)
def test_what_is_no_picture_is_named(tmp_path, content):
    folder = _pictures(tmp_path / "pictures")
    (folder / "a" / "9.png").write_bytes(content)
    with pytest.raises(BadInput, match=r"image \d+ cannot be decoded"):
        load_data(DataSpec(source=f"path:{folder}"))


def test_links_to_data_elsewhere_are_followed(tmp_path):
    """The Hub's own cache consists of such links; data is only read, so nothing is written through one."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "set").mkdir()
    for i in range(4):
        (tmp_path / "blobs" / str(i)).write_text(f"the fox leaps {i} times over the wall. " * 40)
        (tmp_path / "set" / f"{i}.txt").symlink_to(tmp_path / "blobs" / str(i))
    assert len(load_data(DataSpec(source=f"path:{tmp_path / 'set'}", length=16)).train) > 3
