#!/bin/sh
# Runs a command with a Redis of its own, which REDIS_URL names, and which ends with it. What else
# its processes have to share is SECRET_KEY, which is a new one unless there is one.
set -u
command -v redis-server >/dev/null || { echo "This needs redis-server." >&2; exit 1; }
folder=$(mktemp -d)
socket="$folder/redis.sock"
# In a session of its own, or Ctrl-C would end it before the command has ended.
setsid redis-server --port 0 --unixsocket "$socket" --save "" --dir "$folder" >"$folder/log" &
redis=$!
trap 'kill "$redis"; wait "$redis" 2>/dev/null; rm -rf "$folder"' EXIT
trap : INT
tries=0
until [ -S "$socket" ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || { cat "$folder/log" >&2; exit 1; }
    sleep 0.05
done
export REDIS_URL="unix://$socket"
SECRET_KEY=${SECRET_KEY:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
export SECRET_KEY
"$@" &
command=$!
trap 'kill "$command"' TERM
wait "$command"
status=$?
# A signal ends the wait, and not yet the command.
while kill -0 "$command" 2>/dev/null; do
    wait "$command"
    status=$?
done
exit "$status"
