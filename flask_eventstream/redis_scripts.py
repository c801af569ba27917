"""What is kept in Redis, and the Lua that keeps it. Any program can publish with it.

With the prefix ``eventstream:`` and the database 0, the keys are:

``eventstream:0:state``
    A hash: the ``epoch``; ``seq``, the number of the latest event; ``base``, the number at which
    the epoch began; ``run``, the ``run_id`` of the server that it belongs to. It never expires.
``eventstream:0:marks``
    A stream of some numbers with their times, from which follows how old a number is at least.
``eventstream:0:channel:<name>``
    A stream: the recent events of a channel. The id of an entry is ``<seq>-<milliseconds>``. Its
    fields are, in this order, ``nonce``, ``prev``, ``id`` (the publisher's own) and ``wire`` (the
    event without the id that it gets from its number). An empty ``wire`` ends all who read the
    channel. It expires when nothing was published for a while.
``eventstream:0:processes``, ``eventstream:0:process:<token>``
    The processes that serve subscribers, and how many of each channel. Each has a lease of its own.
``eventstream:0:revoked``
    A stream: whose rights were revoked, and when; see ``revocations``, as for
    ``eventstream:0:revoked:users``.
``eventstream:0:run:<key>``, ``eventstream:0:producer:<token>``, ``eventstream:0:owner:<digest>``
    How a run stands, the lease of a process that has runs, and the runs of an owner; see
    ``redis_runs``. The log of a run is a channel whose name no publisher can give.
``eventstream:0:ended``
    The runs that have ended, so that they have no more than a limit together; likewise.
``eventstream:0:notes``, ``eventstream:0:taken:<round>:<name>``
    During a move from Flask-SSE: messages to all processes, and how much of what Flask-SSE sends is
    taken; see ``flask_sse_bridge``.
``eventstream:0:told:<channel>``
    A sorted set: which entries of the stream are joins and leaves, of which the oldest are removed.
``eventstream:0:members:<channel>`` and others
    Who is present; see ``redis_members``.

Each event is also published as a message, under the name of its channel's key. Messages know no
databases, so the name has the number in it. A message is a line ``<epoch> <seq> <milliseconds>
<own id>``, a line ``key <key>`` if it has one, a line ``<prev> <name>`` for each of the event's
channels, with the name of the channel's key in Redis, an empty line, and the wire.

*prev* is the number of the event before in the same channel, so that a hole can be seen. If Redis
has forgotten that one, it is a negative number: no event after it can have been there.

The scripts are not for a cluster: the keys of all channels must be in one place.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

STATE = """\
-- KEYS[1]: state, KEYS[2]: marks.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') or ''
local function whole(text)
  return string.match(text or '0', '^%d+$') and #(text or '') < 16 and tonumber(text or 0) or nil
end
local state = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'base', 'run', 'marked')
-- What is no number was not written here. It may have been any.
local epoch, seq, base = state[1], whole(state[2]), whole(state[3])
local marked = math.min(whole(state[5]) or 0, now)
if not (epoch and string.match(epoch, '^%x+$') and #epoch == 8 and seq and base)
  or state[4] ~= run then
  -- A server that was flushed, restarted or replaced may lack events that were there before.
  epoch = string.sub(redis.sha1hex(run .. clock[1] .. clock[2] .. (epoch or '')), 1, 8)
  seq = seq or 0
  base, marked = seq, 0
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'seq', seq, 'base', base, 'run', run, 'marked', 0)
  redis.call('DEL', KEYS[2])
end

-- The number after which all events are younger than this many seconds.
local function seq_before(seconds)
  -- Without marks, or with something else in their place, nothing is younger for certain.
  for _, mark in ipairs(redis.pcall('XRANGE', KEYS[2], '-', '+')) do
    local number, time = string.match(mark[1], '(%d+)-(%d+)')
    if tonumber(time) > now - seconds * 1000 then
      return math.min(tonumber(number) - 1, seq)
    end
  end
  return seq
end

local function newest(key, below)
  return redis.call('XREVRANGE', key, below, '-', 'COUNT', 1)[1]
end

local function head(own_id)
  return string.format('%s %.0f %.0f %s\\n', epoch, seq, now, own_id)
end
"""

APPEND = """
-- Appends events to channels, all or none. It needs: last_key, the number of the last of the keys
-- that are channels, of which the first is the third; keep, seconds and nonce; events, a list that
-- from first on has an own id or '', a key or '' and a wire for each.
local prev = {}
for k = 3, last_key do
  local entry = newest(KEYS[k], '+')
  local number = entry and tonumber(string.match(entry[1], '%d+'))
  if number and number > seq then
    -- Of a time that the state knows nothing of any more.
    redis.call('DEL', KEYS[k])
    number = nil
  end
  prev[k] = number or -seq_before(seconds)
end

local is_due = now - marked > seconds * 1000 / 16
if is_due then
  marked = now
end
-- The first command that needs memory. If it is refused, nothing has happened.
redis.call('HSET', KEYS[1], 'seq', string.format('%.0f', seq + (#events - first + 1) / 3),
  'marked', string.format('%.0f', marked))
if is_due then
  local mark = redis.pcall('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
  if mark.err or (mark[1] and tonumber(string.match(mark[1][1], '%d+')) > seq) then
    redis.call('DEL', KEYS[2])
  end
  redis.call('XADD', KEYS[2], 'MAXLEN', 64, string.format('%.0f-%.0f', seq + 1, now), 'mark', '')
  redis.call('EXPIRE', KEYS[2], seconds * 4)
end

-- Joins and leaves take no room from others.
local beginning, presence = string.sub(KEYS[1], 1, -6), {}
for k = 3, last_key do
  local told = redis.pcall('ZCARD', beginning .. 'told:' .. string.sub(KEYS[k], #beginning + 9))
  presence[k] = type(told) == 'number' and told or 0
end

for e = first, #events, 3 do
  seq = seq + 1
  local id, message = string.format('%.0f-%.0f', seq, now), head(events[e])
  if events[e + 1] ~= '' then
    message = message .. 'key ' .. events[e + 1] .. '\\n'
  end
  for k = 3, last_key do
    message = message .. string.format('%.0f %s\\n', prev[k], KEYS[k])
  end
  message = message .. '\\n' .. events[e + 2]
  for k = 3, last_key do
    redis.call('XADD', KEYS[k], 'MAXLEN', keep + presence[k], id, 'nonce', nonce,
      'prev', string.format('%.0f', prev[k]), 'id', events[e], 'wire', events[e + 2],
      'key', events[e + 1])
    redis.call('PUBLISH', KEYS[k], message)
    prev[k] = seq
  end
end
for k = 3, last_key do
  redis.call('EXPIRE', KEYS[k], seconds)
end
"""
"""The part of a script that appends events to channels."""

PUBLISH = (
    STATE
    + """
-- Publishes events, all or none.
-- KEYS[3] and so on: the channels. ARGV: 1 how many events a channel keeps, 2 for how many seconds,
-- 3 a nonce or '', 4 a time in milliseconds after which it is too late or '', 5 '1' if it may have
-- been done already; then an own id or '', a key or '' and a wire for each event.
-- Returns the epoch, the number of the last event, and the time in milliseconds. The epoch is '' if
-- it was too late.
local keep, seconds, nonce = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]

if ARGV[5] == '1' then
  local entry = newest(KEYS[3], '+')
  while entry do
    local number = tonumber(string.match(entry[1], '%d+'))
    if entry[2][2] == nonce then
      return {epoch, number, now}
    end
    -- Entries may be large, so it is one at a time.
    entry = newest(KEYS[3], string.format('%.0f', number - 1))
  end
end

if ARGV[4] ~= '' and now > tonumber(ARGV[4]) then
  return {'', 0, now}
end

for e = 6, #ARGV, 3 do
  if string.match(ARGV[e], '^(%x+)%-%d+$') == epoch then
    return redis.error_reply('MINTED ' .. ARGV[e])
  end
end

local last_key, events, first = #KEYS, ARGV, 6
"""
    + APPEND
    + """
return {epoch, seq, now}
"""
)
"""Publishes events to some channels, all of them or none; the comments in it say how."""

SYNC = (
    STATE
    + """
-- Tells where the sequence is, and has the process at KEYS[3] told so by a message of its own. Then
-- it reads a page of the streams at KEYS[4] and so on, one stream after another.
-- ARGV: 1 for how many seconds a channel keeps events, 2 after how many entries and 3 after how
-- many bytes the page ends; then, of each stream, the id from which on it is read.
-- Returns the epoch, the number of the latest event, the time in milliseconds, the number at which
-- the epoch began, and the number after which all events are still there; then, of each stream that
-- the page has something of, 1 if that reaches to its end, and the entries. What is no stream has
-- none, but false.
redis.call('PUBLISH', KEYS[3], head('') .. '\\n')
local entries, bytes, pages = tonumber(ARGV[2] or 0), tonumber(ARGV[3] or 0), {}

local function read(key, first)
  local page, is_whole = {}, 0
  while is_whole == 0 and entries > 0 and bytes > 0 do
    -- Entries may be large, so it is a few at a time.
    local some = redis.pcall('XRANGE', key, first, '+', 'COUNT', 4)
    if some.err then
      return {1, false}
    end
    for _, entry in ipairs(some) do
      page[#page + 1], first = entry, '(' .. entry[1]
      entries = entries - 1
      for _, text in ipairs(entry[2]) do
        bytes = bytes - #text
      end
    end
    is_whole = #some < 4 and 1 or 0
  end
  return {is_whole, page}
end

for k = 4, #KEYS do
  if entries > 0 and bytes > 0 then
    pages[k - 3] = read(KEYS[k], ARGV[k])
  end
end
return {epoch, seq, now, base, seq_before(tonumber(ARGV[1])), pages}
"""
)
"""Tells where the sequence is, and reads from streams; who is subscribed to it hears the former
behind all that was before."""


_EPOCH_LENGTH = 8
_DIGITS = 17
"""One more than Lua's numbers have that are exact."""

MINTED = "MINTED"
"""The error of a script that an own id has the form of those that events get by their number."""


class Script:
    """A script, and how to call it once Redis has it.

    :param text: the Lua.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Keys:
    """The names of the keys of a prefix in a database.

    :param prefix: the prefix.
    :param database: the number of the database.
    :ivar prefix: what all names begin with: the prefix, and the number.
    """

    def __init__(self, prefix: str, database: int) -> None:
        self.prefix = f"{prefix}{database}:".encode()
        self.state = self.prefix + b"state"
        self.marks = self.prefix + b"marks"
        self.processes = self.prefix + b"processes"
        self.revoked = self.prefix + b"revoked"
        self.notes = self.prefix + b"notes"
        self.leases = self.prefix + b"leases"
        self.leaving = self.prefix + b"leaving"
        self.ended = self.prefix + b"ended"
        self._channel = self.prefix + b"channel:"

    def channel(self, name: str) -> bytes:
        """Return the key, and the name of the messages, of a channel."""
        return self._channel + name.encode()

    def process(self, token: str) -> bytes:
        """Return the key, and the name of the messages, of a process."""
        return b"%bprocess:%b" % (self.prefix, token.encode())

    def run(self, key: str) -> bytes:
        """Return the key of what is known of a run."""
        return b"%brun:%b" % (self.prefix, key.encode())

    def owner(self, owner: str) -> bytes:
        """Return the key of the runs of an owner, in which nobody can read whose they are."""
        digest = hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return b"%bowner:%b" % (self.prefix, digest.encode())

    def producer(self, token: str) -> bytes:
        """Return the key of the lease of a process that has runs."""
        return b"%bproducer:%b" % (self.prefix, token.encode())

    def taken(self, round: str, name: str) -> bytes:
        """Return the key of what was taken of a channel of Flask-SSE's in a round."""
        return b"%btaken:%b:%b" % (self.prefix, round.encode(), name.encode())

    def name_of(self, key: bytes) -> str:
        """Return the name of the channel that a key belongs to."""
        return key[len(self._channel) :].decode()


class Sync(NamedTuple):
    """Where the sequence is.

    ``epoch`` and ``seq`` are of the latest event; ``time`` is the server's, in milliseconds;
    ``base`` is the number at which the epoch began; after ``bound`` no event can have expired.
    """

    epoch: str
    seq: int
    time: int
    base: int
    bound: int

    @classmethod
    def of(cls, reply: list[Any]) -> Sync:
        """Return what :data:`SYNC` has replied, without what it has read."""
        epoch, *numbers = reply[:5]
        assert isinstance(epoch, bytes)
        return cls(epoch.decode(), *[int(number) for number in numbers])


class MalformedError(ValueError):
    """What somebody else has written under a name of ours."""


class Record(NamedTuple):
    """One event, as Redis has it in the stream of a channel.

    ``seq`` is its number, ``time`` the server's in milliseconds, ``prev`` the number of the one
    before in that channel, or minus one after which there was none; ``id`` the publisher's own, if
    any, ``wire`` the event without the id that its number gives it, empty to end all who read, and
    ``key`` what it is the newest value of, if anything.
    """

    seq: int
    time: int
    prev: int
    id: str | None
    wire: bytes
    key: str | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether somebody else has written it: it has a number, and is no event."""
        return self.prev == self.seq

    @property
    def place(self) -> tuple[int, int]:
        """The number and the time, which are its id in the stream."""
        return self.seq, self.time

    @classmethod
    def of(cls, entry: tuple[bytes, dict[bytes, bytes]]) -> Record:
        """Return what an entry of a stream says."""
        id, fields = entry
        seq, time = map(int, id.split(b"-"))
        try:
            own_id, key = (fields.get(name, b"").decode() or None for name in (b"id", b"key"))
            prev, wire = _prev_of(fields[b"prev"], seq), _checked_wire(fields[b"wire"])
        except (KeyError, ValueError):
            # What was before it may be gone, as far as anybody knows.
            return cls(seq, time, seq, None, b"")
        return cls(seq, time, prev, own_id, wire, key)


class Message(NamedTuple):
    """One event, as processes hear of it.

    ``prevs`` has each channel with the number before; ``time`` is the server's, in milliseconds.
    """

    epoch: str
    seq: int
    id: str | None
    prevs: list[tuple[str, int]]
    wire: bytes
    key: str | None = None
    time: int = 0

    @classmethod
    def of(cls, message: bytes, keys: Keys) -> Message:
        """Read a message.

        :raises MalformedError: if it is none of ours.
        """
        try:
            return cls(*cls._fields_of(message, keys))
        except ValueError as error:
            raise MalformedError from error

    @staticmethod
    def _fields_of(message: bytes, keys: Keys) -> tuple[Any, ...]:
        head, _, wire = message.partition(b"\n\n")
        line, *lines = head.split(b"\n")
        epoch, number, time, id = line.split(b" ", 3)
        seq, milliseconds = _seq_of(number), _seq_of(time)
        if len(epoch) != _EPOCH_LENGTH:
            raise MalformedError
        key = lines.pop(0)[4:].decode() if lines and lines[0].startswith(b"key ") else None
        prevs = []
        for each in lines:
            prev, _, name = each.partition(b" ")
            prevs.append((keys.name_of(name), _prev_of(prev, seq)))
        own_id, wire = id.decode() or None, _checked_wire(wire)
        return epoch.decode(), seq, own_id, prevs, wire, key, milliseconds


def _seq_of(text: bytes) -> int:
    if not (text.isdigit() and len(text) < _DIGITS):
        raise MalformedError
    return int(text)


def _prev_of(text: bytes, seq: int) -> int:
    prev = _seq_of(text.removeprefix(b"-"))
    # Nothing comes before itself.
    if prev >= seq:
        raise MalformedError
    return -prev if text.startswith(b"-") else prev


def _checked_wire(wire: bytes) -> bytes:
    # Half an event would swallow the next one.
    if wire and not wire.endswith(b"\n\n"):
        raise MalformedError
    return wire
