"""Files packed by Zstandard, such as the Pile's .jsonl.zst, as `gzip.open` opens those of gzip.

The library's own reader ends after the first frame, or at the end of a file that was cut off, without a word.
"""

import io
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 1 << 17
WINDOW_BYTES = 1 << 31
"""The most that `zstd --long` asks for."""


class ZstDamage(Exception):
    """The file is cut off, garbled, or not packed by Zstandard."""


def open_zst(file: str | Path | IO[bytes], mode: str = "rb") -> IO[bytes]:
    """The bytes that a packed file holds, frame after frame; reading goes forward only.

    Frames without a checksum can be garbled without anybody knowing; the zstd command writes one.

    Raises:
        ZstDamage: when read."""
    assert mode == "rb", mode
    packed = Path(file).open("rb") if isinstance(file, str | Path) else file  # noqa: SIM115
    return io.BufferedReader(_Unpacked(packed), CHUNK_BYTES)


class _Unpacked(io.RawIOBase):
    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._frame: Any = None
        self._rest, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        import zstandard

        while not self._ready:
            chunk = self._rest or self._packed.read(CHUNK_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise ZstDamage("it ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj()
            try:
                self._ready, self._rest = memoryview(self._frame.decompress(chunk)), b""
            except zstandard.ZstdError as error:
                raise ZstDamage(str(error)) from error
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()
