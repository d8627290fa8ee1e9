"""Accounts: invitations, passwords, sessions, roles, and limits on attempts."""

import hashlib
import hmac
import secrets
import threading
import time
import unicodedata
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, delete, insert, or_, select, update

from openqwen.http.errors import ApiError
from openqwen.instruct.collaborate.events import LogEvent, record
from openqwen.instruct.collaborate.tables import credentials, invitations, people, sessions

Role = Literal["annotator", "reviewer", "owner"]
ROLES: tuple[Role, ...] = ("annotator", "reviewer", "owner")  # each may do what those before may
_SHORTEST, _LONGEST = 10, 1_000  # characters of a password
_COST = {"n": 2**14, "r": 8, "p": 5}  # of scrypt, as OWASP advises: 16 MB and about 0.2 s
# Log-ins take neither all CPUs nor all memory: each thread that computes a hash keeps its 16 MB.
_HASHING = ThreadPoolExecutor(2, "scrypt")
_MOST_KEPT = 10_000  # callers that a rate limit remembers


@dataclass(frozen=True)
class Caller:
    """Who makes a request: the row of a person, and the session's secrets."""

    person: Row
    csrf: str
    session: str

    def allows(self, role: Role) -> bool:
        """Whether the caller has this role or a higher one."""
        return ROLES.index(self.person.role) >= ROLES.index(role)


class RateLimit:
    """At most `count` events in `seconds` for each caller; more are refused with status 429."""

    def __init__(self, count: int, seconds: float):
        self.count, self.seconds = count, seconds
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (tokens, when)
        self._lock = threading.Lock()

    def take(self, caller: str) -> float:
        """Count one event; returns 0, or the seconds until there may be another."""
        now = time.monotonic()
        with self._lock:
            tokens, since = self._left.pop(caller, (float(self.count), now))
            tokens = min(tokens + (now - since) * self.count / self.seconds, float(self.count))
            allowed = tokens >= 1
            self._left[caller] = (tokens - allowed, now)
            if len(self._left) > _MOST_KEPT:
                self._left.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) * self.seconds / self.count

    def check(self, caller: str) -> None:
        """Count one event. ApiError 429 where there were too many."""
        if wait := self.take(caller):
            seconds = max(round(wait + 0.5), 1)
            message = f"Too many requests. Try again in {seconds} seconds."
            raise ApiError(429, message, code="too_many", retry=seconds)


def hash_password(password: str) -> str:
    """A salted scrypt hash of a password.

    Raises:
        ApiError: the password is too short or too long.
    """
    if not _SHORTEST <= len(password) <= _LONGEST:
        message = f"A password has {_SHORTEST} to {_LONGEST} characters."
        raise ApiError(400, message, "password", "weak_password")
    salt = secrets.token_bytes(16)
    return _written(salt, _scrypt(password, salt, **_COST))


def _written(salt: bytes, hashed: bytes) -> str:
    cost = "$".join(str(_COST[name]) for name in ("n", "r", "p"))
    return f"scrypt${cost}${salt.hex()}${hashed.hex()}"


def password_is(password: str, known: str | None) -> bool:
    """Whether a password has this hash. Without a hash the answer takes as long."""
    _, n, r, p, salt, found = (known or _written(bytes(16), bytes(32))).split("$")
    made = _scrypt(password[:_LONGEST], bytes.fromhex(salt), n=int(n), r=int(r), p=int(p))
    return hmac.compare_digest(made, bytes.fromhex(found)) and known is not None


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    text = unicodedata.normalize("NFKC", password).encode("utf-8", "replace")
    cost = {"n": n, "r": r, "p": p, "maxmem": 2**27}
    return _HASHING.submit(hashlib.scrypt, text, salt=salt, dklen=32, **cost).result()


def iso(seconds: float) -> str:
    """A time in seconds since 1970 as ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def invite(
    connection: Connection, role: Role, days: float, by: str | None, person: str | None = None
) -> dict[str, Any]:
    """A new invitation: {"id", "token", "expires"}; the store keeps only the token's hash.

    person: whose password it sets again; None: it makes a new account.
    """
    token, name = secrets.token_urlsafe(32), secrets.token_hex(6)
    expires = time.time() + days * 86_400
    row = {"id": name, "hash": _digest(token), "role": role, "person": person, "by": by}
    connection.execute(insert(invitations).values(**row, expires=expires, used=False))
    new = {"id": name, "role": role, "person": person, "expires": iso(expires)}
    record(connection, LogEvent("invited", by, new=new))
    return {"id": name, "token": token, "expires": iso(expires)}


def invite_first_owner(connection: Connection) -> str | None:
    """A token for the first owner where no owner has a password yet; earlier ones end."""
    owners = select(people.c.id).where(people.c.role == "owner", people.c.active.is_(True))
    owners = owners.join(credentials, credentials.c.person == people.c.id)
    if connection.execute(owners).first():
        return None
    first = (invitations.c.by.is_(None), invitations.c.role == "owner")
    connection.execute(update(invitations).where(*first).values(used=True))
    return invite(connection, "owner", 7, None)["token"]


def revoke(connection: Connection, invitation: str, by: str) -> None:
    """End an invitation. ApiError 404 where there is none that is open."""
    here = (invitations.c.id == invitation, invitations.c.used.is_(False))
    if not connection.execute(update(invitations).where(*here).values(used=True)).rowcount:
        raise ApiError(404, "There is no such invitation.", code="not_found")
    record(connection, LogEvent("invitation_revoked", by, old={"id": invitation}))


def invitation_of(connection: Connection, token: str) -> Row:
    """The open invitation of a token. ApiError 404 where it is used, too old, or was never made."""
    here = invitations.c.hash == _digest(token)
    row = connection.execute(select(invitations).where(here)).first()
    if row is None or row.used or row.expires < time.time():
        message = "This link was used, has run out, or is incomplete. Ask for a new one."
        raise ApiError(404, message, code="invitation_used")
    return row


def accept(connection: Connection, token: str, name: str, hashed: str) -> str:
    """Use an invitation: make the account, or set its password again. Returns the person's id."""
    row = invitation_of(connection, token)
    used = update(invitations).where(invitations.c.id == row.id).values(used=True)
    connection.execute(used)
    if row.person is not None:
        set_password(connection, row.person, hashed)
        return row.person
    person = add_person(connection, name, row.role, "human")
    connection.execute(insert(credentials).values(person=person, hash=hashed))
    return person


def add_person(connection: Connection, name: str, role: str, kind: str) -> str:
    """A new account without a password; returns its id. ApiError 409 where the name is taken."""
    name = checked_name(name)
    if connection.execute(select(people.c.id).where(people.c.name == name)).first():
        raise ApiError(409, "This name is taken. Choose another one.", "name", "name_taken")
    person = secrets.token_hex(6)
    record(connection, LogEvent("joined", person, new={"name": name, "role": role, "kind": kind}))
    return person


def checked_name(name: str) -> str:
    """A name without characters that look like nothing; ApiError 400 where nothing is left."""
    name = " ".join(unicodedata.normalize("NFKC", name).split())
    hidden = any(unicodedata.category(character)[0] == "C" for character in name)
    if not 1 <= len(name) <= 60 or hidden:
        raise ApiError(400, "A name has 1 to 60 visible characters.", "name", "invalid_name")
    return name


def set_password(connection: Connection, person: str, hashed: str) -> None:
    """Replace a password; all sessions of the person end."""
    here = credentials.c.person == person
    if not connection.execute(update(credentials).where(here).values(hash=hashed)).rowcount:
        connection.execute(insert(credentials).values(person=person, hash=hashed))
    connection.execute(delete(sessions).where(sessions.c.person == person))
    record(connection, LogEvent("password_changed", person))


def find_login(connection: Connection, name: str) -> tuple[Row | None, str | None]:
    """(the active person of a name, their password's hash)."""
    name = " ".join(unicodedata.normalize("NFKC", name).split())
    here = (people.c.name == name, people.c.active.is_(True), people.c.kind == "human")
    row = connection.execute(select(people).where(*here)).first()
    if row is None:
        return None, None
    known = select(credentials.c.hash).where(credentials.c.person == row.id)
    return row, connection.execute(known).scalar()


def start_session(connection: Connection, person: str, hours: float) -> str:
    """A new session; returns the token for the cookie. The store keeps only its hash."""
    token, now = secrets.token_urlsafe(32), time.time()
    # A session that ends later than any new one was begun before the clock was set back.
    old = or_(sessions.c.expires < now, sessions.c.expires > now + 2 * 3_600 * hours)
    connection.execute(delete(sessions).where(old))
    row = {"hash": _digest(token), "person": person, "csrf": secrets.token_urlsafe(24)}
    connection.execute(insert(sessions).values(**row, expires=now + 3_600 * hours))
    record(connection, LogEvent("logged_in", person))
    return token


def find_session(connection: Connection, token: str) -> Caller | None:
    """The caller with this session token; None where it is forged, ended, or barred."""
    chosen = select(people, sessions.c.csrf, sessions.c.expires, sessions.c.hash).join(
        sessions, sessions.c.person == people.c.id
    )
    here = (sessions.c.hash == _digest(token), people.c.active.is_(True))
    row = connection.execute(chosen.where(*here)).first()
    if row is None or row.expires < time.time():
        return None
    return Caller(row, row.csrf, row.hash)


def end_session(connection: Connection, caller: Caller) -> None:
    """Log out."""
    connection.execute(delete(sessions).where(sessions.c.hash == caller.session))
    record(connection, LogEvent("logged_out", caller.person.id))


def change_person(
    connection: Connection, by: str, person: str, role: Role | None, active: bool | None
) -> Row:
    """Change a role, or bar or admit a person. ApiError 409 where the last owner would go."""
    row = find_person(connection, person)
    new = {"person": person, "role": role or row.role}
    new |= {"active": row.active if active is None else active}
    if row.kind != "human" and (new["active"] != row.active or new["role"] != row.role):
        raise ApiError(400, "Only people's accounts can be changed.", code="not_allowed")
    owners = select(people.c.id).where(people.c.role == "owner", people.c.active.is_(True))
    others = connection.execute(owners.where(people.c.id != person)).first()
    if row.role == "owner" and others is None and (new["role"] != "owner" or not new["active"]):
        raise ApiError(409, "A project keeps one owner at least.", code="last_owner")
    old = {"role": row.role, "active": row.active}
    record(connection, LogEvent("person_changed", by, old=old, new=new))
    if not new["active"]:
        connection.execute(delete(sessions).where(sessions.c.person == person))
    return find_person(connection, person)


def find_person(connection: Connection, person: str) -> Row:
    """The row of a person. ApiError 404 where there is none."""
    row = connection.execute(select(people).where(people.c.id == person)).first()
    if row is None:
        raise ApiError(404, "There is no such person.", code="not_found")
    return row


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
