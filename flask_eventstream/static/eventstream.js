/**
 * EventStream: what the browser's EventSource does, and what it lacks.
 *
 * Three parts. A `Connection` asks the server, and asks again. A `Share` has one tab of an origin do
 * that for all of them. An `EventStream` is what a page has; behind it is one of the two, and it
 * hears of everything as a report: its state, and maybe an event or an error.
 *
 * Times are in milliseconds, as everywhere in browsers.
 *
 * @typedef {{type: string, data: string, lastEventId: string, origin: string}} StreamEvent
 * @typedef {{readyState?: number, error?: {status?: number, message: string}, event?: StreamEvent}} Report
 * @typedef {object} Options
 * @property {boolean|string} [shared] One connection for all tabs of a user, whose key it is; `true`
 *   for a stream that is the same for everybody, and is asked for without cookies.
 * @property {string} [method] GET, or POST if there is a body.
 * @property {HeadersInit|(() => HeadersInit|Promise<HeadersInit>)} [headers] Asked for each time.
 * @property {BodyInit} [body] Sent each time, so it must not be a stream.
 * @property {() => string|Promise<string>} [token] Returns what is sent as `Bearer`.
 * @property {string} [lastEventId] The cursor to begin with.
 * @property {number} [silence] Without a byte for so long, the connection is made anew; 0: never.
 * @property {boolean} [withCredentials] As EventSource has it: send cookies to other origins, too.
 * @property {RequestCredentials} [credentials] The same, as fetch has it.
 */
import { createParser } from "./eventsource-parser.js";

const CONNECTING = 0;
const OPEN = 1;
const CLOSED = 2;

const RETRY = 3_000;
const SHORTEST_PAUSE = 100;
const LONGEST_PAUSE = 30_000;
const SILENCE = 45_000; // Three heartbeats of the server's default.
const LONGEST_TIMER = 2 ** 31 - 1; // Timers take more for 0, and would fire at once.

// The last event of a finished stream. Its id tells it from an event that an app gives this type:
// `end`, or for a run its own id, a dot and a number.
const LAST_TYPES = new Set(["end", "stream-error", "cancelled", "lost"]);
const LAST_ID = /^(end|[\w-]{12}\.\d+)$/;

class Failure extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, isFinal?: boolean, retryAfter?: number}} [facts]
   */
  constructor(message, { status, isFinal = false, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.isFinal = isFinal;
    this.retryAfter = retryAfter;
  }
}

/** The connection to the server: one request after another, from one cursor to the next. */
class Connection {
  #url; #options; #method; #cursor; #tell; #wasSent;
  #attempt = null; // The request that is on its way or being read; null between two of them.
  #timer;
  #heard = 0; // When the last byte came.
  #notBefore = 0;
  #retry = RETRY;
  #failures = 0;
  #token;
  #isTokenNew = false;

  /**
   * @param {string} url
   * @param {Options} options
   * @param {string} cursor The id to go on from.
   * @param {boolean} isBegun Whether the server was asked before, by somebody else.
   * @param {(report: Report) => void} tell
   */
  constructor(url, options, cursor, isBegun, tell) {
    this.#url = url;
    this.#options = options;
    this.#method = (options.method ?? (options.body == null ? "GET" : "POST")).toUpperCase();
    this.#cursor = cursor;
    this.#wasSent = isBegun;
    this.#tell = tell;
  }

  start() {
    if (this.#mayAsk) this.#connect();
    else this.#giveUp(new Failure("There is no cursor, and to ask again would do it twice."));
  }

  /** Leave the server, and keep what is needed to start again. */
  suspend() {
    clearTimeout(this.#timer);
    this.#attempt?.abort();
    this.#attempt = null;
  }

  close() { this.suspend(); }

  /** Timers stand still while a page is hidden or its machine sleeps: look what they have missed. */
  wake() {
    if (this.#attempt) this.#watch();
    else if (Date.now() >= this.#notBefore) this.start();
  }

  // A POST that is repeated runs the view twice, and with it the model, unless it says from where.
  get #mayAsk() {
    return this.#method === "GET" || this.#cursor !== "" || !this.#wasSent;
  }

  #connect() {
    this.suspend();
    this.#attempt = new AbortController();
    this.#heard = Date.now();
    this.#watch();
    this.#run(this.#attempt.signal);
  }

  async #run(signal) {
    try {
      await this.#read(await this.#ask(signal), signal);
    } catch (error) {
      // What was given up may still fail, later, and means nothing any more.
      if (!signal.aborted) this.#failed(error);
    }
  }

  async #ask(signal) {
    const { token, headers: own, body, withCredentials, credentials } = this.#options;
    await undefined; // The page has the stream in hand when its functions are called.
    const known = this.#token ?? (await token?.());
    const headers = new Headers(typeof own === "function" ? await own() : own);
    signal.throwIfAborted();
    this.#token = known;
    if (known) headers.set("Authorization", `Bearer ${known}`);
    if (!headers.has("Accept")) headers.set("Accept", "text/event-stream");
    const url = this.#withCursor(headers);
    this.#wasSent = true;
    return fetch(url, {
      method: this.#method, headers, body, signal, cache: "no-store",
      credentials: credentials ?? (withCredentials ? "include" : "same-origin"),
    });
  }

  #withCursor(headers) {
    const url = new URL(this.#url);
    if (this.#cursor && url.origin === globalThis.origin) {
      // fetch takes bytes, and the standard sends the id as UTF-8.
      const bytes = new TextEncoder().encode(this.#cursor);
      headers.set("Last-Event-ID", Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
    } else if (this.#cursor) {
      // For the header, another origin would be asked for its permission first.
      url.searchParams.set("lastEventId", this.#cursor);
    }
    return url;
  }

  async #read(response, signal) {
    check(response);
    this.#failures = 0;
    this.#isTokenNew = false;
    this.#tell({ readyState: OPEN });
    const { origin } = new URL(response.url);
    const parser = createParser({
      // A page that closes the stream at one event gets none of those that came along with it.
      onEvent: (event) => signal.aborted || this.#take(event, origin),
      onRetry: (retry) => { this.#retry = retry; },
    });
    const decoder = new TextDecoder();
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) throw new Failure("The stream has ended.");
      this.#heard = Date.now();
      parser.feed(decoder.decode(value, { stream: true }));
    }
  }

  #take({ id = this.#cursor, event: type = "message", data }, origin) {
    this.#cursor = id;
    const isLast = LAST_TYPES.has(type) && LAST_ID.test(id);
    if (isLast) this.close();
    const event = { type, data, lastEventId: id, origin };
    this.#tell({ event, readyState: isLast ? CLOSED : OPEN });
  }

  #watch() {
    clearTimeout(this.#timer);
    const silence = this.#options.silence ?? SILENCE;
    const left = silence ? this.#heard + silence - Date.now() : LONGEST_TIMER;
    if (left <= 0) this.#failed(new Failure(`There was not a byte for ${silence} ms.`));
    else this.#timer = setTimeout(() => this.#watch(), Math.min(left, LONGEST_TIMER));
  }

  #failed(failure) {
    const { status, message, isFinal, retryAfter = 0 } = failure;
    this.suspend();
    if ((status === 401 || status === 403) && this.#options.token && !this.#isTokenNew) {
      this.#isTokenNew = true;
      this.#token = undefined;
      this.#connect();
    } else if (isFinal || !this.#mayAsk) {
      this.#giveUp(failure);
    } else {
      this.#isTokenNew = false;
      this.#wait(retryAfter);
      this.#tell({ readyState: CONNECTING, error: { status, message } });
    }
  }

  #wait(retryAfter) {
    const retry = Math.max(this.#retry, SHORTEST_PAUSE);
    const doubled = Math.min(retry * 2 ** this.#failures++, LONGEST_PAUSE);
    // Those who were disconnected at the same moment must not come back at the same moment.
    const pause = Math.max(retry, doubled) * (0.8 + 0.4 * Math.random());
    const asked = retryAfter * (1 + 0.2 * Math.random());
    this.#notBefore = Date.now() + asked;
    this.#timer = setTimeout(() => this.#connect(), Math.min(Math.max(pause, asked), LONGEST_TIMER));
  }

  #giveUp({ status, message }) {
    this.close();
    this.#tell({ readyState: CLOSED, error: { status, message } });
  }
}

/** Throw what is wrong with an answer, and whether it is of any use to ask again. */
function check(response) {
  const { status, statusText, headers } = response;
  const type = headers.get("Content-Type");
  if (status === 204) {
    throw new Failure("There is nothing more to come: 204.", { status, isFinal: true });
  }
  if (status !== 200) {
    const isFinal = status < 500 && status !== 429;
    const retryAfter = milliseconds(headers.get("Retry-After"));
    throw new Failure(`The answer is ${status} ${statusText}.`, { status, isFinal, retryAfter });
  }
  if (!/^text\/event-stream\s*(;|$)/i.test(type)) {
    throw new Failure(`The answer is ${type}, and no event stream.`, { status, isFinal: true });
  }
}

/** A `Retry-After`, seconds or a date, in milliseconds from now. */
function milliseconds(retryAfter) {
  return Math.max(0, Number(retryAfter) * 1_000 || Date.parse(retryAfter) - Date.now() || 0);
}

const MAX_EVENTS = 256;
const MAX_CHARACTERS = 2 ** 20;
const MINTED = /^([0-9a-f]{8})-(\d+)$/;

/** Whether both ids are the server's own, of one sequence, and the first one is not the later. */
function isUpTo(id, other) {
  const [, epoch, number] = MINTED.exec(id) ?? [];
  const [, otherEpoch, otherNumber] = MINTED.exec(other) ?? [];
  return epoch !== undefined && epoch === otherEpoch && Number(number) <= Number(otherNumber);
}

/**
 * The events since a connection began, numbered, as far as they are kept. Each tab has the same
 * log. Its numbers mean something only to those who have it from the same beginning.
 */
class Log {
  beginning = Math.random();
  before = ""; // The cursor before the first event that is kept,
  dropped = 0; // the number of the event that it comes from,
  isWhole = true; // and whether the connection began there.
  events = [];

  constructor(fields) { Object.assign(this, fields); }

  get last() { return this.dropped + this.events.length; }
  get cursor() { return this.cursorAt(this.last); }

  event(number) { return this.events[number - this.dropped - 1]; }

  cursorAt(number) {
    return number === this.dropped ? this.before : this.event(number)?.lastEventId;
  }

  after(number) { return this.events.slice(number - this.dropped); }

  append(event) {
    // What came before a reset is of no use to those who come after it.
    if (event.type === "reset") this.#drop(this.events.length);
    this.isWhole ||= event.type === "reset";
    this.events.push(event);
    let characters = 0;
    const kept = this.events.findLastIndex(({ data }) => (characters += data.length) > MAX_CHARACTERS);
    this.#drop(Math.max(kept + 1, this.events.length - MAX_EVENTS));
  }

  #drop(count) {
    if (count <= 0) return;
    [this.before, this.dropped] = [this.cursorAt(this.dropped + count), this.dropped + count];
    this.isWhole = false;
    this.events.splice(0, count);
  }

  /** Forget an event and all that came after it. */
  cut(number) { this.events.length = number - this.dropped - 1; }

  /** The number of the last event that a newcomer with this cursor has; null if none can tell. */
  find(cursor) {
    if (cursor === "") return this.isWhole ? this.dropped : null;
    const cursors = [this.before, ...this.events.map((event) => event.lastEventId)];
    const found = cursors.indexOf(cursor);
    if (found >= 0) return this.dropped + found;
    // A cursor of a page is a place in the sequence of all events, and often of none in the log.
    const earlier = cursors.findLastIndex((id) => isUpTo(id, cursor));
    const isNext = earlier + 1 === cursors.length || isUpTo(cursor, cursors[earlier + 1]);
    return earlier >= 0 && isNext ? this.dropped + earlier : null;
  }
}

const JOINING = 300; // So long it is waited for an answer of other tabs,
const LINGERING = 1_000; // and so long the end of all is told.

/**
 * One connection for all tabs. Who holds a lock has the connection, and tells the others, whom the
 * browser lets have the lock in turn: when the tab is closed, when it crashes. No tab has to say
 * goodbye. The next one connects with the cursor of what it has heard so far.
 *
 * What the one with the lock posts has its `term`, so that what comes late from a predecessor is
 * told from what is new, and the place in the log where all are then (`beginning`, `number`,
 * `cursor`). A tab that is not there (it has just come, it was frozen) asks for the whole log.
 */
class Share {
  #name; #naming; #newConnection; #report;
  #cursor; // What the page has had already, up to the next reset: its own, or a predecessor's.
  #id = Math.random();
  #begun = Date.now();
  #ended = 0;
  #log = null; // There is none until it is known where the others are.
  #term = 0;
  #askedIn = -1;
  #state = CONNECTING; // What the one with the lock tells the others,
  #error; // and why.
  #connection = null;
  #channel = null;
  #leaving = null;
  #joined = () => {};

  /**
   * @param {Promise<string>} name What those have in common who share.
   * @param {string} cursor The id to begin with, if this is the first tab.
   * @param {(cursor: string, isBegun: boolean, tell: (report: Report) => void) => Connection} newConnection
   * @param {(report: Report) => void} report
   */
  constructor(name, cursor, newConnection, report) {
    this.#naming = name;
    this.#cursor = cursor;
    this.#newConnection = newConnection;
    this.#report = report;
  }

  async start() {
    const { signal } = this.#leaving = new AbortController();
    this.#name = `eventstream ${await this.#naming}`;
    if (signal.aborted) return;
    this.#channel = new BroadcastChannel(this.#name);
    this.#channel.onmessage = ({ data }) => this.#hear(data);
    this.#askOnce();
    navigator.locks.request(this.#name, { signal }, () => this.#lead(signal)).catch(({ name }) => {
      // In a sandboxed frame there are no locks, and nobody to share with.
      if (name === "SecurityError") this.#lead(signal);
    });
  }

  suspend() {
    this.#connection?.close();
    this.#connection = null;
    this.#channel?.close();
    this.#channel = null;
    this.#leaving?.abort();
    this.#askedIn = -1;
  }

  close() {
    // Who gets the lock before he hears of the end would ask the server once more.
    if (this.#connection && this.#state === CLOSED) setTimeout(() => this.suspend(), LINGERING);
    else this.suspend();
  }

  wake() {
    if (this.#connection) this.#connection.wake();
    else if (this.#channel) this.#ask();
  }

  // With the lock

  async #lead(signal) {
    if (!this.#log && !signal.aborted) await this.#join();
    if (signal.aborted) return;
    const isBegun = this.#log !== null;
    this.#log ??= new Log({ before: this.#cursor });
    this.#term = Math.max(Date.now(), this.#term + 1);
    this.#state = CONNECTING;
    this.#error = undefined;
    this.#connection = this.#newConnection(this.#log.cursor, isBegun, (report) => this.#tell(report));
    this.#post();
    this.#report({ readyState: CONNECTING });
    this.#connection?.start();
    await new Promise((leave) => signal.addEventListener("abort", leave));
  }

  /** Who has come last may be the next with the lock, and have to ask those behind it for the log. */
  async #join() {
    const { pending } = await navigator.locks.query().catch(() => ({ pending: [] }));
    if (!pending.some(({ name }) => name === this.#name) || this.#log) return;
    const joined = new Promise((resolve) => { this.#joined = () => resolve(null); });
    this.#ask({ isHeir: true });
    await Promise.race([joined, new Promise((resolve) => setTimeout(resolve, JOINING))]);
  }

  #tell(report) {
    this.#state = report.readyState;
    this.#error = report.error;
    if (this.#state === CLOSED) this.#ended = Date.now();
    if (report.event) this.#log.append(report.event);
    this.#post({ event: report.event });
    this.#deliver(report);
  }

  // Among the tabs

  #post(message = {}) {
    const { beginning, last: number, cursor } = this.#log;
    const told = { term: this.#term, readyState: this.#state, error: this.#error };
    this.#channel?.postMessage({ ...told, beginning, number, cursor, ...message });
  }

  #ask(question = {}) {
    this.#askedIn = this.#term;
    const { beginning, last: number, cursor } = this.#log ?? {};
    const who = { from: this.#id, begun: this.#begun, term: this.#term };
    this.#channel?.postMessage({ ...who, beginning, number, cursor, ...question });
  }

  #askOnce() {
    // Who has the lock answers each question, so one is enough until another has it.
    if (this.#askedIn !== this.#term) this.#ask();
  }

  #answer({ from, begun, isHeir, term, ...place }) {
    // Who comes after the end wants to begin anew.
    const isLate = this.#state === CLOSED && begun > this.#ended;
    if (isLate || !(this.#connection || (isHeir && this.#log))) return;
    // Clocks that were put back: nobody would heed what is told in an earlier term.
    if (this.#connection && term > this.#term) this.#term = term + 1;
    const isHere = place.number === this.#log.last && this.#isAt(place);
    this.#post({ to: from, log: isHere ? undefined : { ...this.#log } });
  }

  #hear(message) {
    if (message.from) this.#answer(message);
    if (message.from || this.#connection || message.term < this.#term) return;
    if (message.to && message.to !== this.#id) return;
    this.#term = message.term;
    if (message.to) this.#askedIn = -1;
    const { readyState, error, log, event } = message;
    if (readyState !== CLOSED) this.#deliver({ readyState, error });
    if (log) this.#catchUp(new Log(log));
    else if (event) this.#follow(message);
    // It may be the end of all, before which there is more to come.
    if (!this.#isAt(message)) this.#askOnce();
    else if (readyState === CLOSED) this.#deliver({ readyState, error });
  }

  #isAt({ beginning, number, cursor }) {
    return this.#log?.beginning === beginning && this.#log.cursorAt(number) === cursor;
  }

  #follow({ beginning, number, event }) {
    if (this.#log?.beginning !== beginning || number > this.#log.last + 1) return;
    const known = this.#log.event(number);
    // A successor begins where it was, and gets again from the server what others have heard.
    if (number <= this.#log.last && (!known || isSame(known, event))) return;
    if (known) {
      // Or something else: a reset, or without what another event has taken the place of.
      this.#keep(this.#log.cursor);
      this.#log.cut(number);
    }
    this.#log.append(event);
    this.#deliver({ event });
  }

  #catchUp(log) {
    const own = this.#log;
    const isOurs = own?.beginning === log.beginning;
    // A successor that is not as far as its predecessor was.
    if (isOurs && log.last <= own.last && own.cursorAt(log.last) === log.cursor) return;
    const isPart = isOurs && log.cursorAt(own.last) === own.cursor;
    const cursor = own?.cursor ?? this.#cursor;
    // Events without ids cannot be found in the log of another beginning.
    const isLost = own !== null && cursor === "";
    const from = isPart ? own.last : isLost ? null : log.find(cursor);
    this.#keep(cursor);
    this.#log = log;
    this.#joined();
    if (from === null) this.#reset(cursor);
    for (const event of log.after(from ?? log.dropped)) this.#deliver({ event });
  }

  #keep(cursor) {
    if (!isUpTo(cursor, this.#cursor)) this.#cursor = cursor;
  }

  #reset(requested) {
    const { before: lastEventId, events: [first] } = this.#log;
    const data = JSON.stringify({ requested, earliest: first?.lastEventId ?? null });
    this.#deliver({ event: { type: "reset", data, lastEventId, origin: first?.origin } });
  }

  #deliver(report) {
    const { event } = report;
    if (event?.type === "reset") this.#cursor = ""; // All may come again.
    // The cursor of a page may be ahead of what has come to the tab with the connection.
    if (!event || !isUpTo(event.lastEventId, this.#cursor)) this.#report(report);
  }
}

function isSame(one, other) {
  return ["lastEventId", "type", "data"].every((field) => one[field] === other[field]);
}

export class EventStream extends EventTarget {
  static CONNECTING = CONNECTING;
  static OPEN = OPEN;
  static CLOSED = CLOSED;
  #url; #source; #lastEventId; #withCredentials;
  #readyState = CONNECTING;
  #handlers = {};
  #closing = new AbortController();

  /**
   * @param {string|URL} url
   * @param {Options} options
   */
  constructor(url, options = {}) {
    super();
    if (options.shared === true) options = sameForAll(options);
    this.#url = new URL(url, globalThis.document?.baseURI ?? location.href).href;
    this.#lastEventId = options.lastEventId ?? "";
    this.#withCredentials = options.withCredentials ?? options.credentials === "include";
    const report = (what) => this.#hear(what);
    const newConnection = (cursor, isBegun, tell) =>
      new Connection(this.#url, options, cursor, isBegun, tell);
    // Browsers have locks only in secure contexts: with HTTPS, and on localhost.
    const canShare = options.shared && navigator.locks && globalThis.BroadcastChannel;
    this.#source = canShare
      ? new Share(nameOf(this.#url, options), this.#lastEventId, newConnection, report)
      : newConnection(this.#lastEventId, false, report);
    this.#source.start();
    this.#followPage();
  }

  get url() { return this.#url; }
  get readyState() { return this.#readyState; }
  get withCredentials() { return this.#withCredentials; }
  get lastEventId() { return this.#lastEventId; }
  get CONNECTING() { return CONNECTING; }
  get OPEN() { return OPEN; }
  get CLOSED() { return CLOSED; }

  static {
    for (const type of ["open", "message", "error", "reset"]) {
      Object.defineProperty(this.prototype, `on${type}`, {
        get() { return this.#handlers[type] ?? null; },
        set(handler) {
          this.removeEventListener(type, this.#handlers[type]);
          this.#handlers[type] = typeof handler === "function" ? handler : null;
          this.addEventListener(type, this.#handlers[type]);
        },
      });
    }
  }

  close() {
    this.#readyState = CLOSED;
    this.#closing.abort();
    this.#source.close();
  }

  #followPage() {
    const { signal } = this.#closing;
    const { document } = globalThis;
    const wake = () => this.#source.wake();
    addEventListener("online", wake, { signal });
    document?.addEventListener("visibilitychange", () => document.hidden || wake(), { signal });
    // A page that the browser keeps to return to must hold no lock and no connection meanwhile.
    addEventListener("pagehide", () => this.#leave(), { signal });
    addEventListener("pageshow", ({ persisted }) => persisted && this.#source.start(), { signal });
  }

  #leave() {
    this.#source.suspend();
    this.#hear({ readyState: CONNECTING });
  }

  /** @param {Report} report */
  #hear({ readyState = this.#readyState, error, event }) {
    if (this.#readyState === CLOSED) return;
    const hasOpened = readyState === OPEN && this.#readyState !== OPEN;
    if (readyState === CLOSED) this.close();
    this.#readyState = readyState;
    if (event) {
      this.#lastEventId = event.lastEventId;
      this.dispatchEvent(new MessageEvent(event.type, event));
    }
    if (error) this.dispatchEvent(Object.assign(new Event("error"), error));
    if (hasOpened) this.dispatchEvent(new Event("open"));
  }
}

/**
 * What a stream is asked for with that is shared by whoever uses the browser: nothing that says who.
 *
 * @param {Options} options
 */
function sameForAll(options) {
  const { token, headers, withCredentials = false, credentials = "omit" } = options;
  if (token || typeof headers === "function" || withCredentials || credentials !== "omit") {
    throw new TypeError("`shared: true` is for what everybody may read. Give the user: `shared: key`.");
  }
  return { ...options, credentials };
}

/**
 * The same for those alone who get the same answer. A digest, since locks have names that can be read.
 *
 * @param {string} url
 * @param {Options} options
 */
async function nameOf(url, { shared, method = "", headers, body, credentials, withCredentials }) {
  const isText = body == null || typeof body === "string" || body instanceof URLSearchParams;
  // What cannot be compared is asked for by each tab.
  const asked = isText ? String(body ?? "") : crypto.randomUUID();
  const own = typeof headers === "function" ? [] : [...new Headers(headers)];
  const rights = credentials ?? Boolean(withCredentials);
  const all = JSON.stringify([method, url, shared, own, asked, rights]);
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(all));
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
