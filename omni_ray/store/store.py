"""The store of jobs, for asyncio: records and files, which any process of the cluster that knows the spec can open."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from omni_ray.config.spec import JobStore
from omni_ray.messages import Job, Media
from omni_ray.store.files import Files
from omni_ray.store.records import Records
from omni_ray.store.stored import MASK_FILE, Kind, StoredJob, StoredMedia, input_file, output_file, snapshot_file


class Store:
    """Opens the store at the first call, so that a process that never asks needs no database."""

    def __init__(self, spec: JobStore) -> None:
        self._spec = spec
        self._opened: tuple[Records, Files] | None = None
        self._lock = asyncio.Lock()

    async def _open(self) -> tuple[Records, Files]:
        async with self._lock:
            if self._opened is None:
                self._opened = await asyncio.to_thread(self._connect)
            return self._opened

    def _connect(self) -> tuple[Records, Files]:
        folder, database = self._spec.folder, self._spec.database
        if "://" not in folder:
            path = Path(folder).expanduser().resolve()
            path.mkdir(parents=True, exist_ok=True)
            folder = str(path)
            database = database or f"sqlite:///{path}/jobs.db"
        assert database is not None  # the spec asks for one beside a folder that is an address
        return Records(database), Files(folder)

    async def create(self, stored: StoredJob, images: Sequence[bytes], mask: bytes | None, owner: str) -> bool:
        """Store a job with its input images; False if there is one of this id, which then stays as it is."""
        records, files = await self._open()
        if mask is not None:
            await asyncio.to_thread(files.write, stored.id, MASK_FILE, mask)
        for index, image in enumerate(images):
            await asyncio.to_thread(files.write, stored.id, input_file(index), image)
        return await asyncio.to_thread(records.create, stored, owner)

    async def save(self, stored: StoredJob, owner: str | None) -> bool:
        """See :meth:`Records.save`."""
        records, _ = await self._open()
        return await asyncio.to_thread(records.save, stored, owner)

    async def get(self, job_id: str) -> StoredJob | None:
        records, _ = await self._open()
        return await asyncio.to_thread(records.get, job_id)

    async def page(
        self, kinds: Sequence[Kind], user: str | None, limit: int, after: str | None, *, newest_first: bool
    ) -> list[StoredJob]:
        """See :meth:`Records.page`."""
        records, _ = await self._open()
        return await asyncio.to_thread(records.page, kinds, user, limit, after, newest_first=newest_first)

    async def delete(self, job_id: str) -> None:
        """Remove a job, whatever its state, and its files."""
        records, files = await self._open()
        await asyncio.to_thread(records.delete, job_id)
        await asyncio.to_thread(files.remove, job_id)

    async def add_media(self, stored: StoredJob, media: Media) -> StoredJob:
        """``stored`` with one more output, whose file is written; the record is not saved yet."""
        _, files = await self._open()
        file = output_file(media.index, media.format)
        await asyncio.to_thread(files.write, stored.id, file, media.data)
        output = StoredMedia(
            file=file,
            format=media.format,
            width=media.width,
            height=media.height,
            num_frames=media.num_frames,
            num_bytes=len(media.data),
        )
        others = tuple(each for each in stored.media if each.file != file)
        return dataclasses.replace(stored, media=(*others, output))

    async def add_snapshot(self, stored: StoredJob, step: int, data: bytes) -> StoredJob:
        """``stored`` with a snapshot, whose file is written; the record is not saved yet."""
        _, files = await self._open()
        await asyncio.to_thread(files.write, stored.id, snapshot_file(step), data)
        return dataclasses.replace(stored, resume_step=step)

    async def drop_snapshot(self, job_id: str, step: int) -> None:
        _, files = await self._open()
        if step:
            await asyncio.to_thread(files.remove, job_id, snapshot_file(step))

    async def read(self, job_id: str, file: str) -> bytes:
        """A file of a job; FileNotFoundError if there is none."""
        _, files = await self._open()
        return await asyncio.to_thread(files.read, job_id, file)

    async def whole_job(self, stored: StoredJob) -> Job:
        """The job to run: with its input images, and with the last snapshot if there is one."""
        images = [await self.read(stored.id, input_file(i)) for i in range(stored.num_images)]
        mask = await self.read(stored.id, MASK_FILE) if stored.has_mask else None
        resume = await self.read(stored.id, snapshot_file(stored.resume_step)) if stored.resume_step else None
        return dataclasses.replace(stored.job, images=tuple(images), mask=mask, resume=resume)

    async def renew_and_adopt(self, owner: str, groups: Sequence[str]) -> list[StoredJob]:
        """Keep one's own jobs, and take over those that have no owner any more."""
        records, _ = await self._open()
        await asyncio.to_thread(records.renew, owner)
        return await asyncio.to_thread(records.adopt, owner, groups)

    async def expire(self) -> None:
        """Remove what is past its time, and the oldest of what is beyond the size limit."""
        records, _ = await self._open()
        for job_id in await asyncio.to_thread(records.expired, int(self._spec.max_gib * 2**30)):
            await self.delete(job_id)
