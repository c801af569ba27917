"""The server of the recipes in docs/clients.rst, which the tests serve."""

import json
import time

from flask import Flask, abort, render_template, request

from flask_eventstream import EventStream, EventStreamResponse, ServerSentEvent

app = Flask(__name__)
app.config.from_prefixed_env()
eventstream = EventStream("eventstream", __name__)


def words():
    """Yield slowly what was asked for."""
    for word in request.values.get("text", "one two three").split():
        yield word
        time.sleep(0.05)


# [channel]
@app.get("/headlines")
def headlines():
    return eventstream.subscribe("headlines")


@app.get("/page/<name>")
def page(name):
    cursor = eventstream.last_event_id("headlines")
    return render_template(f"{name}.html", cursor=cursor)


# [generator]
@eventstream.stream("/words")
def spoken():
    yield from words()


# [html]
def tell(number, text):
    html = render_template("headline.html", number=number, text=text)
    eventstream.publish(html, channel="headlines")
    eventstream.publish(number, type="count", channel="headlines")


@eventstream.stream("/rows")
def rows():
    for number, word in enumerate(words(), start=1):
        yield render_template("headline.html", number=number, text=word)


# [post]
@app.post("/ask")
def ask():
    if request.headers.get("Authorization") != "Bearer secret":
        abort(401)
    question = request.get_json()["question"]
    return EventStreamResponse({"text": word} for word in question.split())


# [turbo]
def change(action, number, text=""):
    html = render_template("change.html", action=action, number=number, text=text)
    eventstream.publish(html, channel="headlines")


# [datastar]
def elements(html, **options):
    lines = [f"{name} {value}" for name, value in options.items()]
    lines += [f"elements {line}" for line in html.split("\n")]
    return ServerSentEvent("\n".join(lines), type="datastar-patch-elements")


def signals(**values):
    return ServerSentEvent(f"signals {json.dumps(values)}", type="datastar-patch-signals")


@eventstream.stream("/progress")
def progress():
    for number, word in enumerate(words(), start=1):
        html = render_template("headline.html", number=number, text=word)
        yield elements(html, selector="#headlines", mode="append")
        yield signals(count=number)


# [ai-sdk]
@eventstream.resumable("/chat/<conversation>", format="ai-sdk")
def chat(conversation):
    messages = request.get_json()["messages"]
    yield {"type": "start", "messageId": f"answer-{len(messages)}"}
    yield {"type": "text-start", "id": "1"}
    for word in messages[-1]["parts"][0]["text"].split():
        yield {"type": "text-delta", "id": "1", "delta": f"{word} "}
    yield {"type": "text-end", "id": "1"}
    yield {"type": "finish"}


# [end]
app.register_blueprint(eventstream, url_prefix="/stream")
