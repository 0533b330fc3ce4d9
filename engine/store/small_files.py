"""zarr's store on a local disk, but that small files are read and written by the thread that is there already."""

from pathlib import Path

from zarr.abc.store import ByteRequest, RangeByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

SMALL = 2**20
"""Bytes up to which handing a file over to another thread takes longer than reading it."""


class SmallFiles(LocalStore):
    """As `LocalStore`.  Larger files keep their threads: several are read at once."""

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if self._bytes(key, byte_range) <= SMALL:
            return self.get_sync(key, prototype=prototype, byte_range=byte_range)
        return await super().get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        if len(value) <= SMALL:
            self.set_sync(key, value)
        else:
            await super().set(key, value)

    def _bytes(self, key: str, byte_range: ByteRequest | None) -> int:
        """How much is to be read, at most."""
        if isinstance(byte_range, RangeByteRequest):
            return byte_range.end - byte_range.start
        try:
            return (self.root / key).stat().st_size
        except OSError:  # what is not there is quickly read; `get` says so
            return 0
