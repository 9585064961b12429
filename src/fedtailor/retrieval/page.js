// All text is put in as text (textContent), never as HTML: documents of silos may hold anything.
"use strict";

const at = id => document.getElementById(id);
const form = at("form"), question = at("question"), count = at("count"), answer = at("answer"), most = Number(form.dataset.most);
let known = {}, cards = [], labels = [], written = 0, asking = null;

const letters = text => [...text.trim()].length;
const plural = (number, one, more) => `${number} ${number === 1 ? one : more}`;

function made(name, className, ...inside) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...inside);
  return element;
}

const listed = (texts, between) => texts.flatMap((text, index) => [index ? between : "", made("bdi", "", text)]);

function say(text, busy = false) {
  const status = at("status");
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle("busy", busy);
}

function counted() {
  const here = letters(question.value);
  count.textContent = `${here.toLocaleString("en")} of ${most.toLocaleString("en")} letters`;
  count.classList.toggle("over", here > most);
}

// The answer: what came since, each citation of a source a link to its card. An open bracket waits until it is known whether
// it becomes one.
function write(all) {
  const text = known.text;
  while (written < text.length) {
    const open = text.indexOf("[", written);
    if (open !== written) {
      plain(text.slice(written, open < 0 ? text.length : open));
      written = open < 0 ? text.length : open;
      continue;
    }
    const rest = text.slice(written);
    if (!all && labels.some(label => label.length > rest.length && label.startsWith(rest))) return;
    const cited = labels.find(label => rest.startsWith(label));
    if (cited) link(cited);
    else plain("[");
    written += cited ? cited.length : 1;
  }
}

function plain(text) {
  if (answer.lastChild instanceof Text) answer.lastChild.appendData(text);
  else answer.append(text);
}

function link(cited) {
  const those = cards.filter(card => card.dataset.cited === cited);
  const to = made("a", "", cited);
  to.href = `#${those[0].id}`;
  to.addEventListener("click", () => {
    for (const card of cards) card.classList.toggle("lit", those.includes(card));
    those[0].focus({ preventScroll: true });
  });
  for (const card of those) card.classList.add("used");
  answer.append(to);
}

function showSources() {
  cards = known.sources.map((source, index) => {
    const filled = made("span");
    filled.style.width = `${100 * source.score}%`;
    const score = made("span", "score", made("span", "bar", filled), made("span", "unseen", "score "), source.told);
    score.title = "1 is as good as can be";
    const where = made("p", "where", ...listed([source.document, source.section].filter(Boolean), " › "));
    const text = source.text ? made("div", "text", source.text) : made("p", "text none", "Its silo lets out no text of it.");
    text.dir = "auto";
    const card = made("li", "card", made("div", "head",
      made("span", "", made("bdi", "silo", source.silo), made("span", "use", "cited")), score), where, text);
    card.id = `source-${index + 1}`;
    card.tabIndex = -1;
    card.dataset.cited = source.cited;
    return card;
  });
  at("sources").replaceChildren(...cards);
  for (const text of at("sources").querySelectorAll(".text")) if (text.scrollHeight > text.clientHeight + 1) {
    text.tabIndex = 0;  // the keyboard can scroll it
    text.setAttribute("role", "region");
    text.setAttribute("aria-label", "passage");
  }
  labels = [...new Set(known.sources.map(source => source.cited))].sort((one, other) => other.length - one.length);
  answer.replaceChildren();
  written = 0;
}

function showSilos() {
  const row = (name, className, inside) => made("div", className, made("dt", "", name), made("dd", "", ...inside));
  const silos = names => names.length ? listed(names, ", ") : [made("span", "soft", "–")];
  const missing = Object.entries(known.missing).map(([silo, why]) => made("li", "", made("bdi", "", silo), ": ", made("bdi", "", why)));
  const spared = known.spared.length ? [...silos(known.spared), made("span", "soft", " (not promising)")] : silos([]);
  at("silos").replaceChildren(row("asked", "", silos(known.asked)), row("not asked", "", spared),
    missing.length ? row("missing", "missing", [made("ul", "", ...missing)]) : row("missing", "", silos([])));
}

function doing() {
  if (known.text) return "Writing";
  if (known.sources.length) return `Reading ${plural(known.sources.length, "passage", "passages")}`;
  return known.asked.length ? `Searching ${plural(known.asked.length, "silo", "silos")}` : "Asking";
}

function ended() {
  const times = Object.entries(known.seconds).map(([what, time]) => `${what} ${time}`).join(", ");
  const lost = Object.keys(known.missing).length;
  return [known.found ? "Answered" : "No passage answers this", times && ` (${times})`,
    lost ? `; ${plural(lost, "silo is", "silos are")} missing from it` : ""].join("");
}

function take(told) {
  if ("question" in told) at("asked").textContent = told.question;
  if ("ahead" in told) {
    say(told.ahead === 1 ? "One question is being answered; yours is next" : `${told.ahead} questions are ahead of yours`, true);
    return;
  }
  if ("error" in told) throw new Error(told.error);
  if ("more" in told) told.text = known.text + told.more;
  else if ("text" in told) { answer.replaceChildren(); written = 0; }
  Object.assign(known, told);
  if (told.sources) showSources();
  if (told.asked || told.spared || told.missing) showSilos();
  answer.classList.toggle("nothing", !known.found);
  write(known.done);
  at("no-source").hidden = known.sources.length > 0;
  if (known.done) {
    if (!known.text && !known.found) plain("No passage answers this question.");
    at("no-source").textContent = "None.";
    say(ended());
  } else say(doing(), true);
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

async function ask() {
  const asked = question.value.trim();
  at("problem").textContent = "";
  if (!asked || letters(asked) > most) {
    at("problem").textContent = asked ? `A question has at most ${most.toLocaleString("en")} letters; say it shorter.` : "Type a question first.";
    question.focus();
    return;
  }
  const stopped = asking = new AbortController();
  known = { text: "", sources: [], asked: [], spared: [], missing: {}, found: true, done: false, seconds: {} };
  busy(true);
  try {
    const reply = await fetch("ask", { method: "POST", body: JSON.stringify({ question: asked }), signal: stopped.signal,
      headers: { "Content-Type": "application/json" } });
    if (!reply.ok) throw new Error(reply.headers.get("Content-Type").includes("json") ? (await reply.json()).error : await reply.text());
    for await (const told of lines(reply.body)) take(told);
    if (!known.done) throw new TypeError("it ended too early");
  } catch (error) {
    write(true);
    at("no-source").textContent = "None.";
    say(known.text ? "What stands here is not the whole answer" : "No answer");
    if (stopped.signal.aborted) say(known.text ? "Stopped: what stands here is not the whole answer" : "Stopped");
    else at("problem").textContent = error instanceof TypeError ? "The connection was lost; ask again." : sentence(error.message);
  } finally {
    busy(false);
  }
}

const sentence = text => text.charAt(0).toUpperCase() + text.slice(1);

function busy(is) {
  const ask = at("ask"), stop = at("stop");
  answer.setAttribute("aria-busy", String(is));  // a screen reader reads it once, when it is whole
  ask.setAttribute("aria-disabled", String(is));
  if (!is && document.activeElement === stop) question.focus();
  stop.classList.toggle("idle", !is);
  if (!is) {
    asking = null;
    return;
  }
  at("shown").hidden = false;
  at("asked").textContent = question.value.trim();
  at("no-source").textContent = "None yet.";
  at("no-source").hidden = false;
  answer.classList.remove("nothing");
  showSources();
  showSilos();
  say("Asking", true);
}

form.addEventListener("submit", event => {
  event.preventDefault();
  if (!asking) ask();
});
question.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
question.addEventListener("input", counted);
at("stop").addEventListener("click", () => asking?.abort());
addEventListener("keydown", event => {
  if (event.key === "Escape") asking?.abort();
});
counted();
