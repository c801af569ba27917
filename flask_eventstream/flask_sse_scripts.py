"""The Lua of a move from Flask-SSE: what it sends is taken once, and copies are known."""

from __future__ import annotations

from .redis_scripts import APPEND, STATE

TAKE = (
    STATE
    + """
-- Publishes an event that Flask-SSE has sent, unless another process was faster.
-- KEYS[3]: the channel. KEYS[4]: what is taken of it in this round. ARGV: 1 how many events a
-- channel keeps, 2 for how many seconds, 3 the number of the event in the round, 4 its own id or
-- '', 5 its wire.
local taken = redis.call('HMGET', KEYS[4], 'taken')[1]
if (tonumber(taken or 0) or 0) >= tonumber(ARGV[3]) then
  return 0
end
if string.match(ARGV[4], '^(%x+)%-%d+$') == epoch then
  return redis.error_reply('MINTED ' .. ARGV[4])
end
-- Memory is first needed here. If it is refused, nothing has happened.
redis.call('HSET', KEYS[4], 'taken', ARGV[3])
redis.call('EXPIRE', KEYS[4], 300)
local keep, seconds, nonce, last_key = tonumber(ARGV[1]), tonumber(ARGV[2]), '', 3
local events, first = {ARGV[4], '', ARGV[5]}, 1
"""
    + APPEND
    + """
return 1
"""
)
"""Publishes an event once, whoever offers it; the comments in it say how."""

COPY = """\
-- Sends a copy right behind the note that it is one. A script is one step: nothing comes between.
-- ARGV: 1 the name of the notes, 2 the note, 3 the name of the channel, 4 the copy.
redis.call('PUBLISH', ARGV[1], ARGV[2])
return redis.call('PUBLISH', ARGV[3], ARGV[4])
"""
"""Sends a copy that no process takes for another's event."""
