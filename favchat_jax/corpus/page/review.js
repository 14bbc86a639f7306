// The review page. It inserts all text as text, never as HTML, since a language model wrote it.
"use strict";

const $ = (id) => document.getElementById(id);
const DONE = { accept: "accepted", edit: "edited", reject: "rejected", regenerate: "to be rewritten" };
const FRAME = 1 / 25; // seconds

let reviewer = localStorage.getItem("reviewer") || "";
let clips = []; // [id, verdict, has problems]
let current = null; // the answer of /clips/ID
let editing = false;
let busy = false;

async function ask(path, posted) {
  const request = posted && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(posted),
  };
  let response;
  try {
    response = await fetch(path, request || undefined);
  } catch {
    throw new Error("the review command has ended: start it again");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function showStatus(message, failed = false) {
  $("status").textContent = message;
  $("status").classList.toggle("failed", failed);
}

async function guarded(work) {
  if (busy) return;
  busy = true;
  try {
    await work();
  } catch (error) {
    showStatus(error.message, true);
  } finally {
    busy = false;
  }
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

const FILTERS = {
  todo: ([, verdict]) => !verdict,
  problems: ([, , problems]) => problems,
  all: () => true,
};

function showProgress() {
  const judged = clips.filter(([, verdict]) => verdict).length;
  $("bar").style.width = `${(100 * judged) / clips.length}%`;
  $("count").textContent = `${judged} of ${clips.length} judged`;
}

function showOverview(overview) {
  clips = overview.clips;
  showProgress();
  $("pairs").replaceChildren(
    ...overview.agreement.map((pair) => {
      const row = document.createElement("tr");
      const kappa = pair.kappa === null ? "undefined" : pair.kappa.toFixed(2);
      const cells = [`${pair.first}, ${pair.second}`, pair.clips, pair.equal.toFixed(2), kappa];
      row.append(...cells.map((cell) => element("td", "", String(cell))));
      return row;
    }),
  );
  $("no-pairs").hidden = overview.agreement.length > 0;
}

// Returns the next clip of the chosen list after (step 1) or before (step -1) the current one; the list is a ring.
function neighbour(step) {
  const wanted = FILTERS[$("filter").value];
  const start = current ? clips.findIndex(([id]) => id === current.id) : step > 0 ? -1 : clips.length;
  for (let distance = 1; distance <= clips.length; distance++) {
    const place = (start + step * distance + clips.length * 2) % clips.length;
    if (wanted(clips[place])) return clips[place][0];
  }
  return null;
}

async function go(id) {
  $("desk").hidden = id === null;
  $("empty").hidden = id !== null;
  if (id === null) {
    current = null;
    $("video").removeAttribute("src");
    history.replaceState(null, "", "/");
    return;
  }
  current = await ask(`/clips/${encodeURIComponent(id)}?reviewer=${encodeURIComponent(reviewer)}`);
  history.replaceState(null, "", `#${encodeURIComponent(id)}`);
  showClip();
}

function showClip() {
  const video = $("video");
  const address = `/videos/${encodeURIComponent(current.id)}`;
  if (video.getAttribute("src") !== address) {
    video.src = address;
    video.play().catch(() => {}); // a browser may require a click first
  }
  $("name").textContent = current.id;
  $("source").textContent = current.source;
  $("backend").textContent = current.backend;
  $("verdict").textContent = DONE[current.verdict] || "";
  $("verdict").dataset.verdict = current.verdict;
  $("problems").hidden = !current.problems.length;
  $("problems").textContent = `The automatic checks say: ${current.problems.join("; ")}.`;
  const groups = Object.entries(current.labels).filter(([, names]) => names.length);
  $("labels").replaceChildren(
    ...groups.flatMap(([group, names]) => [
      element("h3", "", group),
      ...names.map((name) => element("span", "chip", name.replaceAll("_", " "))),
    ]),
  );
  if (!groups.length) $("labels").append(element("span", "place", "This clip has no labels."));
  $("summary").value = current.summary;
  $("questions").replaceChildren(...current.questions.map(card));
  setEditing(false);
}

function card(pair, number) {
  const item = document.createElement("li");
  const [question, answer] = ["question", "answer"].map((name) => {
    const field = element("textarea", name, "");
    field.rows = 1;
    field.maxLength = 1000;
    field.value = pair[name];
    field.setAttribute("aria-label", `${name} ${number + 1}`);
    return field;
  });
  const remove = element("button", "remove", "Remove");
  remove.type = "button";
  remove.addEventListener("click", () => item.remove());
  item.append(question, element("span", "kind", pair.kind), answer, remove);
  item.dataset.kind = pair.kind;
  return item;
}

function setEditing(on) {
  editing = on;
  document.body.classList.toggle("is-editing", on);
  $("verdicts").hidden = on;
  $("editing").hidden = !on;
  for (const field of document.querySelectorAll("main textarea")) field.readOnly = !on;
  if (on) {
    $("summary").focus();
    showStatus("");
  } else if (document.activeElement instanceof HTMLTextAreaElement) {
    document.activeElement.blur();
  }
}

function judge(verdict) {
  return guarded(async () => {
    if (!current) return;
    const questions = [...$("questions").children].map((item) => ({
      question: item.querySelector(".question").value,
      answer: item.querySelector(".answer").value,
      kind: item.dataset.kind,
    }));
    const { id, text } = current;
    showStatus("saving");
    await ask("/reviews", { id, reviewer, verdict, text, summary: $("summary").value, questions });
    clips.find(([other]) => other === id)[1] = verdict;
    showProgress();
    showStatus(`${id}: ${DONE[verdict]}`);
    await go(neighbour(1));
  });
}

function step(frames) {
  $("video").pause();
  $("video").currentTime += frames * FRAME;
}

const KEYS = {
  a: () => judge("accept"),
  e: () => current && setEditing(true),
  r: () => judge("reject"),
  g: () => judge("regenerate"),
  ArrowRight: () => guarded(() => go(neighbour(1))),
  ArrowLeft: () => guarded(() => go(neighbour(-1))),
  " ": () => ($("video").paused ? $("video").play() : $("video").pause()),
  ",": () => step(-1),
  ".": () => step(1),
};

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (editing) {
    if (event.key === "Escape") showClip();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) judge("edit");
    return;
  }
  const pressed = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !KEYS[pressed]) return;
  if (event.target instanceof HTMLSelectElement) return;
  event.preventDefault();
  KEYS[pressed]();
});

for (const button of document.querySelectorAll("#verdicts button")) {
  const { verdict } = button.dataset;
  button.addEventListener("click", () => (verdict === "edit" ? setEditing(true) : judge(verdict)));
}
$("save").addEventListener("click", () => judge("edit"));
$("cancel").addEventListener("click", showClip);
$("filter").addEventListener("change", () => {
  $("filter").blur();
  guarded(async () => {
    current = null;
    await go(neighbour(1));
  });
});
$("who").addEventListener("click", () => $("sign-in").showModal());
$("agreement-button").addEventListener("click", () =>
  guarded(async () => {
    showOverview(await ask(`/clips?reviewer=${encodeURIComponent(reviewer)}`));
    $("agreement").showModal();
  }),
);
$("sign-in").addEventListener("cancel", (event) => reviewer || event.preventDefault());
$("sign-in").addEventListener("close", () => {
  reviewer = $("reviewer").value.trim() || reviewer;
  localStorage.setItem("reviewer", reviewer);
  start();
});

function start() {
  $("reviewer").value = reviewer;
  if (!reviewer) {
    $("sign-in").showModal();
    return;
  }
  $("who").textContent = reviewer;
  guarded(async () => {
    showOverview(await ask(`/clips?reviewer=${encodeURIComponent(reviewer)}`));
    const asked = decodeURIComponent(location.hash.slice(1));
    current = null;
    await go(clips.some(([id]) => id === asked) ? asked : neighbour(1));
  });
}

start();
