"""The records of jobs in a database: SQLite, PostgreSQL, or another one that SQLAlchemy speaks.

Every record has an owner, the router that runs it, and a lease that the owner renews. A job that is not over and whose
lease has run out belongs to whoever adopts it first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import sqlalchemy as sql
from sqlalchemy.engine.interfaces import DBAPIConnection

from omni_ray.errors import ConfigError
from omni_ray.store.stored import Kind, StoredJob

LEASE_S = 4.0
BUSY_TIMEOUT_S = 10
"""How long SQLite waits for another process that writes."""

_table = sql.Table(
    "omni_ray_jobs",
    sql.MetaData(),
    sql.Column("id", sql.String(100), primary_key=True),
    sql.Column("kind", sql.String(20), nullable=False),
    sql.Column("user", sql.String(100), nullable=False),
    sql.Column("group", sql.String(200), nullable=False),
    sql.Column("is_over", sql.Boolean, nullable=False),
    sql.Column("created_at", sql.Float, nullable=False),
    sql.Column("expires_at", sql.Float, nullable=False),
    sql.Column("num_bytes", sql.BigInteger, nullable=False),
    sql.Column("owner", sql.String(100), nullable=False),
    sql.Column("lease", sql.Float, nullable=False),
    sql.Column("record", sql.Text, nullable=False),
    sql.Index("omni_ray_jobs_newest", "kind", "created_at"),
)
_c = _table.c


class Records:
    """``url`` is SQLAlchemy's address of the database. The methods block: call them in a thread."""

    def __init__(self, url: str) -> None:
        try:
            self._engine = sql.create_engine(url)
            if self._engine.dialect.name == "sqlite":
                sql.event.listen(self._engine, "connect", _for_many_processes)
            _table.metadata.create_all(self._engine)
        except (sql.exc.SQLAlchemyError, ImportError) as error:
            raise ConfigError(f"jobs.database: {url!r} cannot be opened: {error}") from error

    def create(self, stored: StoredJob, owner: str) -> bool:
        """Add a record; False, and nothing is changed, if there is one of this id."""
        values = _values(stored) | {"id": stored.id, "owner": owner, "lease": time.time() + LEASE_S}
        try:
            with self._engine.begin() as connection:
                connection.execute(sql.insert(_table).values(values))
        except sql.exc.IntegrityError:
            return False
        return True

    def save(self, stored: StoredJob, owner: str | None) -> bool:
        """Write a record of one's own, or anybody's if ``owner`` is None; False, and nothing is changed, if it is gone,
        over, or another owner's."""
        mine = (_c.id == stored.id) & ~_c.is_over
        if owner is not None:
            mine &= _c.owner == owner
        with self._engine.begin() as connection:
            return connection.execute(sql.update(_table).where(mine).values(_values(stored))).rowcount > 0

    def get(self, job_id: str) -> StoredJob | None:
        with self._engine.connect() as connection:
            found = connection.execute(sql.select(_c.record).where(_c.id == job_id)).scalar()
        return StoredJob.from_json(found) if found else None

    def page(
        self, kinds: Sequence[Kind], user: str | None, limit: int, after: str | None, *, newest_first: bool
    ) -> list[StoredJob]:
        """Up to ``limit`` records by their time, those behind the record ``after`` if it is given.

        ``user`` None means everybody's.
        """
        order, later = (sql.desc, _before) if newest_first else (sql.asc, _behind)
        query = sql.select(_c.record).where(_c.kind.in_(kinds), _c.expires_at > time.time())
        if user is not None:
            query = query.where(_c.user == user)
        with self._engine.connect() as connection:
            if after is not None:
                cursor = connection.execute(sql.select(_c.created_at).where(_c.id == after)).scalar()
                query = query.where(later(cursor if cursor is not None else 0.0, after))
            rows = connection.execute(query.order_by(order(_c.created_at), order(_c.id)).limit(limit)).scalars()
            return [StoredJob.from_json(each) for each in rows]

    def delete(self, job_id: str) -> None:
        with self._engine.begin() as connection:
            connection.execute(sql.delete(_table).where(_c.id == job_id))

    def renew(self, owner: str) -> None:
        """Renew the lease of all records of ``owner`` that are not over."""
        with self._engine.begin() as connection:
            mine = (_c.owner == owner) & ~_c.is_over
            connection.execute(sql.update(_table).where(mine).values(lease=time.time() + LEASE_S))

    def adopt(self, owner: str, groups: Sequence[str]) -> list[StoredJob]:
        """Take over the jobs of ``groups`` whose owner no longer renews their lease, oldest first."""
        lost = ~_c.is_over & (_c.lease < time.time()) & _c.group.in_(groups)
        with self._engine.begin() as connection:
            ids = connection.execute(sql.select(_c.id).where(lost).order_by(_c.created_at)).scalars().all()
            taken = [
                each
                for each in ids
                if connection.execute(
                    sql.update(_table).where(lost, _c.id == each).values(owner=owner, lease=time.time() + LEASE_S)
                ).rowcount
            ]
            rows = connection.execute(sql.select(_c.id, _c.record).where(_c.id.in_(taken))).all()
        records = {row.id: StoredJob.from_json(row.record) for row in rows}
        return [records[each] for each in taken]

    def expired(self, max_bytes: int) -> list[str]:
        """Jobs that are over and have to go: those past their time, and the oldest beyond ``max_bytes`` in all."""
        with self._engine.connect() as connection:
            rows = connection.execute(
                sql.select(_c.id, _c.expires_at, _c.num_bytes).where(_c.is_over).order_by(sql.desc(_c.created_at))
            ).all()
        kept, gone = 0, []
        for row in rows:
            kept += row.num_bytes
            if row.expires_at < time.time() or kept > max_bytes:
                gone.append(row.id)
                kept -= row.num_bytes
        return gone


def _values(stored: StoredJob) -> dict[str, object]:
    return {
        "kind": stored.kind,
        "user": stored.user,
        "group": stored.job.group,
        "is_over": stored.is_over,
        "created_at": stored.created_at,
        "expires_at": stored.expires_at,
        "num_bytes": sum(each.num_bytes for each in stored.media),
        "record": stored.to_json().decode(),
    }


def _before(created_at: float, job_id: str) -> sql.ColumnElement[bool]:
    return sql.tuple_(_c.created_at, _c.id) < sql.tuple_(sql.literal(created_at), sql.literal(job_id))


def _behind(created_at: float, job_id: str) -> sql.ColumnElement[bool]:
    return sql.tuple_(_c.created_at, _c.id) > sql.tuple_(sql.literal(created_at), sql.literal(job_id))


def _for_many_processes(connection: DBAPIConnection, _: object) -> None:
    """SQLite's write-ahead log: those who read need not wait for the one who writes."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
    cursor.close()
