"""The files of jobs: input images, snapshots and media, in a folder or any other place that fsspec knows."""

from __future__ import annotations

import fsspec  # type: ignore[import-untyped]

from omni_ray.errors import ConfigError


class Files:
    """``url`` is a folder, or an address such as ``s3://bucket/folder``."""

    def __init__(self, url: str) -> None:
        local = {} if "://" in url else {"auto_mkdir": True}
        try:
            self._system, self._root = fsspec.core.url_to_fs(url, **local)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"jobs.folder: {url!r} cannot be opened: {error}") from error

    def write(self, job_id: str, name: str, data: bytes) -> None:
        self._system.pipe_file(self._path(job_id, name), data)

    def read(self, job_id: str, name: str) -> bytes:
        """Raises FileNotFoundError if there is none."""
        data: bytes = self._system.cat_file(self._path(job_id, name))
        return data

    def remove(self, job_id: str, name: str | None = None) -> None:
        """Remove a file, or all files of a job; it is no error if there are none."""
        path = self._path(job_id, name) if name else f"{self._root}/{job_id}"
        if self._system.exists(path):
            self._system.rm(path, recursive=name is None)

    def _path(self, job_id: str, name: str) -> str:
        return f"{self._root}/{job_id}/{name}"
