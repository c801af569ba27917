"""``flask eventstream``: publishing, reading and looking at an app's streams from a shell."""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import closing, suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import click
from flask import current_app
from flask.cli import AppGroup, ScriptInfo

from . import access, doctor
from .errors import EventStreamError
from .follow import follow, from_broker, from_url, shown
from .gunicorn_settings import SettingsError, read_settings
from .memory_broker import MemoryBroker
from .probe import check_stream
from .state import current_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .doctor import Finding
    from .event import ServerSentEvent
    from .follow import Read
    from .state import State

    Command = Callable[..., Any]

_OWN_PROCESS = (
    "EVENTSTREAM_BROKER_URL='memory://' is a broker for one process, and this command is a process "
    "of its own, in which {}. Set EVENTSTREAM_BROKER_URL='redis://…', or {}."
)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class _Group(AppGroup):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EventStreamError as error:
            raise click.ClickException(shown(str(error))) from error


@click.group("eventstream", cls=_Group)
def commands() -> None:
    """Server-Sent Events: publish, listen, and find out what is wrong."""


def _headers(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> Any:
    headers = {}
    for header in given:
        name, colon, value = header.partition(":")
        if not (colon and _HEADER_NAME.fullmatch(name) and value.isascii() and value.isprintable()):
            raise click.BadParameter(f"{header!r} is no header, such as 'Cookie: session=abc'")
        headers[name] = value.strip()
    return headers


def _of_requests(command: Command) -> Command:
    told = "Send it with each request; may be given more than once."
    header = click.option(
        "--header", "headers", multiple=True, callback=_headers, metavar="'NAME: VALUE'", help=told
    )
    return click.option("--token", metavar="TOKEN", help="Send it as a bearer token.")(
        header(command)
    )


@commands.command()
@click.argument("channel")
@click.argument("data")
@click.option("--type", help="The event type; 'message' by default.")
@click.option("--id", help="An id of your own instead of the broker's.")
@click.option("--retry", type=int, help="The reconnection time in milliseconds.")
@click.option("--key", help="What the event is the newest value of.")
@click.option("--json", "is_json", is_flag=True, help="DATA is JSON, and is checked.")
def publish(channel: str, data: str, is_json: bool, **fields: Any) -> None:
    """Send an event with DATA to a CHANNEL, and print its id. DATA may be '-', for stdin."""
    advice = "have a view of the running app publish, and send it a request"
    state = _shared_state("nobody is subscribed", advice)
    if data == "-":
        # What is no UTF-8 is refused as any other data that is not.
        stdin = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
        data = stdin.removesuffix("\n")
    event = _parsed(data) if is_json else data
    click.echo(state.blueprints[0].publish(event, channel=channel, **fields))


def _parsed(data: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise click.BadParameter(f"DATA is no JSON: {error}") from error


@commands.command(with_appcontext=False)
@click.argument("sources", nargs=-1, required=True, metavar="URL|CHANNEL...")
@click.option("--raw", is_flag=True, help="Print the bytes as they come.")
@_of_requests
@click.option("--last-event-id", default="", help="The id to continue after.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many events.")
@click.pass_context
def listen(
    context: click.Context,
    sources: tuple[str, ...],
    raw: bool,
    headers: dict[str, str],
    token: str | None,
    last_event_id: str,
    count: int | None,
) -> None:
    """Print the events of a URL, or of channels of the app, until Ctrl-C.

    A connection that is lost is made again, and continues.
    """
    read = _source(context, sources, _with_token(headers, token))
    with suppress(KeyboardInterrupt), closing(follow(read, last_event_id, _complain)) as chunks:
        for wire, events in chunks:
            some = events[:count]
            if raw:
                _write(wire)
            else:
                click.echo("".join(map(_line, some)), nl=False)
            count = count and count - len(some)
            if count == 0:
                return


def _source(context: click.Context, sources: tuple[str, ...], headers: dict[str, str]) -> Read:
    urls = [source for source in sources if "://" in source]
    if urls:
        if len(sources) > 1:
            raise click.UsageError("Give one URL, or some channels.")
        return from_url(urls[0], headers)
    # Only channels need the app.
    context.with_resource(context.ensure_object(ScriptInfo).load_app().app_context())
    state = _shared_state("nothing is published", "give the URL of the stream")
    return from_broker(state.broker, sources)


def _with_token(headers: dict[str, str], token: str | None) -> dict[str, str]:
    return headers if token is None else {"Authorization": f"Bearer {token}", **headers}


def _complain(text: str) -> None:
    click.echo(shown(text), err=True)


def _write(wire: bytes) -> None:
    sys.stdout.buffer.write(wire)
    sys.stdout.buffer.flush()


def _line(event: ServerSentEvent) -> str:
    data = "\n    ".join(map(shown, event.data.split("\n")))
    now = time.strftime("%H:%M:%S")
    return f"{now}  {shown(event.type)}  {shown(event.id or '-')}  {data}\n"


@commands.command()
def channels() -> None:
    """Print the channels that have subscribers, and how many, in all processes."""
    state = _shared_state("nobody is subscribed", "ask subscriber_count() in the app")
    for name, count in sorted(state.broker.channels().items()):
        click.echo(f"{shown(name)}\t{count}")


@commands.command()
@click.argument("channels", nargs=-1, required=True, metavar="CHANNEL...")
@click.option("--max-age", type=float, help="How long it is valid, in seconds.")
@click.option("--user", help="Whom it is for.")
@click.option("--claim", "claims", multiple=True, metavar="KEY=VALUE", help="What else it says.")
def token(
    channels: tuple[str, ...], max_age: float | None, user: str | None, claims: tuple[str, ...]
) -> None:
    """Print a token that gives the right to read CHANNELs."""
    options: dict[str, Any] = {} if max_age is None else {"max_age": max_age}
    for claim in claims:
        key, equals, value = claim.partition("=")
        if not (key.isidentifier() and equals) or key in ("self", "max_age", "user"):
            raise click.BadParameter(f"--claim {claim!r} is not of the form key=value")
        options[key] = value
    click.echo(current_state().blueprints[0].token(*channels, user=user, **options))


@commands.command("doctor")
@click.argument("url", required=False)
@click.option("--gunicorn", metavar="COMMAND", help="The command that starts it.")
@click.option("--idle", type=float, help="How long to stay connected to URL, in seconds.")
@_of_requests
@click.pass_context
def examine(
    context: click.Context,
    url: str | None,
    gunicorn: str | None,
    idle: float | None,
    headers: dict[str, str],
    token: str | None,
) -> None:
    """Look at what usually breaks streams; with the URL of one, at the proxies before it.

    The exit status is 1 if something is found that fails.
    """
    has_failed = False
    state = current_state()
    found = _findings(state, gunicorn)
    if url is not None:
        asked = _with_token(headers, token)
        found = chain(found, check_stream(url, asked, state.config.heartbeat, idle))
    for finding in found:
        click.echo(shown(f"{finding.level:4}  {finding.what}"))
        if finding.cure:
            click.echo(f"      → {finding.cure}")
        has_failed |= finding.level == "fail"
    context.exit(int(has_failed))


def _findings(state: State, gunicorn: str | None) -> Iterator[Finding]:
    config, settings = state.config, None
    yield from doctor.check_broker(state.broker, config)
    try:
        settings = read_settings(gunicorn)
        yield from doctor.check_server(settings, config)
    except SettingsError as error:
        cure = "look at --gunicorn, GUNICORN_CMD_ARGS and gunicorn.conf.py"
        yield doctor.Finding("warn", f"the settings of gunicorn cannot be read: {error}", cure)
    yield from doctor.check_greenlets(settings, config)
    limit, room = doctor.descriptor_limit(), access.default_max_subscribers()
    yield from doctor.check_descriptors(config, limit, room)
    yield from doctor.check_app(config, bool(current_app.secret_key))


def _shared_state(what: str, advice: str) -> State:
    state = current_state()
    if isinstance(state.broker, MemoryBroker):
        raise click.ClickException(_OWN_PROCESS.format(what, advice))
    return state
