"use strict";
// Every text of the run enters the page as a text node: nothing of it is ever read as HTML.
const $ = id => document.getElementById(id);
const read = id => JSON.parse($(id).textContent);
const run = read("run");
const COLOURS = ["var(--blue)", "var(--red)", "var(--green)", "#b07aa1", "#e08a2e", "#17a2b8",
  "#8c6d31", "#9aa3ad"];
const ROW = 44;  // pixels of a row of the list, as the style sheet has it

function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}
function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}
function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes))
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(element.style, value);
    else if (value !== null && value !== false) element.setAttribute(key, value);
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}
const words = name => name.replaceAll("_", " ");
const number = (value, digits = 3) =>
  value === null || value === undefined ? "–" : String(Number(value.toPrecision(digits)));
const signed = value => (value > 0 ? "+" : "") + value.toFixed(2);

// The curves: small charts with one cursor.

const CHARTS = [
  ["Reward by part", ["reward", "accuracy", "tool_reward"]],
  ["Accuracy", ["accuracy"]],
  ["Tool and format", ["tool_rate", "format_rate", "repeat_rate"]],
  ["KL to the SFT model", ["kl"]],
  ["Entropy", ["entropy"]],
  ["Clipped and masked tokens", ["clip_fraction", "masked"]],
  ["Gap of sampler and trainer", ["logprob_gap_text", "logprob_gap_after_image"]],
  ["Frames and turns", ["frames", "new_frames", "turns"]],
  ["Loss", ["loss"]],
  ["Gradient norm", ["grad_norm"]],
];
const PARTS = ["seconds_read", "seconds_speak", "seconds_video", "seconds_tower"];  // of the rollout
const moves = [];  // of each chart: what the cursor does to it

function chart(title, keys) {
  const values = keys.flatMap(key => run.log.map(row => row[key])).filter(Number.isFinite);
  if (!values.length) return;
  const low = Math.min(0, ...values), span = Math.max(...values) - low || 1;
  const last = Math.max(1, run.log.length - 1);
  const x = k => 300 * k / last, y = value => 100 - 100 * (value - low) / span;
  const lines = keys.flatMap((key, n) => pieces(key).map(piece => {
    const points = piece.map(([k, value]) => `${x(k).toFixed(1)},${y(value).toFixed(1)}`);
    if (piece.length === 1)
      return draw("circle", {cx: x(piece[0][0]), cy: y(piece[0][1]), r: 2.5, fill: COLOURS[n % 8]});
    return draw("polyline", {points: points.join(" "), stroke: COLOURS[n % 8]});
  }));
  const cursor = draw("line", {y1: 0, y2: 100});
  const svg = draw("svg", {viewBox: "0 0 300 100", preserveAspectRatio: "none", role: "img",
    "aria-label": `${title} over ${run.log.length} steps`}, ...lines, cursor);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    setCursor(Math.round(last * (event.clientX - box.left) / box.width));
  });
  const legend = make("div", {class: "legend"});
  moves.push(k => {
    cursor.setAttribute("x1", x(k));
    cursor.setAttribute("x2", x(k));
    legend.replaceChildren(...keys.map((key, n) => make("span", {},
      make("b", {style: {color: COLOURS[n % 8]}}, "■ "),
      `${words(key.replace("seconds_", ""))} ${number(run.log[k][key])}`)));
  });
  $("charts").append(make("figure", {}, make("h3", {}, title),
    make("div", {class: "scale"}, number(low + span)), svg,
    make("div", {class: "scale"}, number(low)), legend));
}
function pieces(key) {  // a value that was not finite breaks the line
  const all = [[]];
  run.log.forEach((row, k) => {
    if (Number.isFinite(row[key])) all.at(-1).push([k, row[key]]);
    else if (all.at(-1).length) all.push([]);
  });
  return all.filter(piece => piece.length);
}
function setCursor(k) {
  k = Math.max(0, Math.min(run.log.length - 1, k));
  $("cursor").value = k;
  $("at").textContent = `step ${run.log[k].step}`;
  moves.forEach(move => move(k));
}
if (run.log.length) {
  const known = new Set(run.log.flatMap(row => Object.keys(row)));
  const stages = [...known].filter(key => key.startsWith("seconds_") && !PARTS.includes(key));
  for (const [title, keys] of [...CHARTS, ["Seconds by stage", stages]])
    chart(title, keys.filter(key => known.has(key)));
  $("cursor").max = run.log.length - 1;
  $("cursor").addEventListener("input", () => setCursor($("cursor").valueAsNumber));
  setCursor(run.log.length - 1);
} else $("curves").hidden = true;

// The list: only the rows in sight are elements.

const episodes = run.groups.flatMap((group, g) =>
  group.episodes.map((episode, member) => ({...episode, group, g, member})));
let shown = [], chosen = 0, beside = null, openTokens = false;

function filter() {
  const kind = $("kind").value, step = $("step").value, text = $("text").value.toLowerCase();
  const was = shown[chosen];
  shown = episodes.filter(e => (!kind || e.kind === kind) && (!step || e.group.step === +step)
    && (!text || `${e.group.question} ${e.answer} ${e.group.id}`.toLowerCase().includes(text)));
  $("count").textContent = `${shown.length} of ${episodes.length} episodes`;
  $("rows").style.height = `${ROW * shown.length}px`;
  choose(Math.max(0, shown.indexOf(was)));
}
function paintList() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const end = Math.min(shown.length, first + Math.ceil(list.clientHeight / ROW) + 10);
  $("rows").replaceChildren(...shown.slice(first, end).map((e, k) => row(e, first + k)));
  if (shown.length) list.setAttribute("aria-activedescendant", `row-${chosen}`);
  else list.removeAttribute("aria-activedescendant");
}
function row(e, n) {
  const side = e.kind.startsWith("right") ? "right" : "wrong";
  return make("div", {class: "row", role: "option", id: `row-${n}`, "aria-selected": n === chosen,
    "aria-posinset": n + 1, "aria-setsize": shown.length, style: {top: `${ROW * n}px`},
    onclick: () => choose(n)},
    make("b", {}, e.reward.total.toFixed(2)), make("div", {class: side}, e.kind),
    make("div", {}, make("small", {}, `step ${e.group.step} · ${e.group.question}`)));
}
function choose(n) {
  const group = shown[chosen]?.g;
  chosen = n;
  if (shown[n]?.g !== group) beside = beside === null ? null : other(shown[n]);
  else if (beside === shown[n]?.member) beside = other(shown[n]);
  const list = $("list"), top = ROW * n;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  paintList();
  paintDetail();
  remember();
}
const other = e => e && e.group.episodes.length > 1 ? (e.member ? 0 : 1) : null;

// An episode.

function paintDetail() {
  const e = shown[chosen];
  $("detail").replaceChildren();
  if (!e) return $("detail").append("No episode is like this.");
  const {group} = e, letters = "ABCDEFGHIJ";
  const options = group.options.map((text, k) => make("div", {}, `(${letters[k]}) ${text}`));
  const pick = make("select", {id: "beside", onchange: () => {
    beside = pick.value === "" ? null : +pick.value;
    paintDetail();
    remember();
  }}, make("option", {value: ""}, "nothing"));
  group.episodes.forEach((one, k) => {
    if (k !== e.member)
      pick.append(make("option", {value: k}, `${k}: ${one.reward.total.toFixed(2)}, ${one.kind}`));
  });
  pick.value = beside ?? "";
  const sides = [e.member, ...(beside === null ? [] : [beside])];
  fill($("detail"), {}, [make("h2", {}, group.question), ...options,
    make("p", {}, "the truth: ", make("b", {}, group.answer), ` · ${group.id} · ${group.video}`),
    group.clip.error ? make("p", {class: "wrong"}, group.clip.error) : null,
    make("p", {}, make("label", {}, "Beside it, of its group: ", pick)),
    make("div", {id: "sides"}, ...sides.map(member => article(group, e.g, member)))]);
}
function article(group, g, member) {
  const e = group.episodes[member], parts = [];
  e.turns.forEach((turn, t) => {
    const [think, rest] = said(turn.text);
    if (think) parts.push(make("p", {class: "think"}, think));
    if (rest) parts.push(make("pre", {}, rest));
    if (turn.error) parts.push(make("p", {class: "wrong"}, `refused: ${turn.error}`));
    parts.push(tokens(e, g, member, t), frames(group, turn.frames));
  });
  const reward = Object.entries(e.reward).map(([name, value]) =>
    make("tr", {}, make("th", {scope: "row"}, words(name)), make("td", {}, number(value))));
  return make("article", {"aria-label": `Episode ${member}`},
    make("h3", {}, `Episode ${member}: ${e.kind}`), timeLine(group, e),
    frames(group, e.overview), ...parts,
    make("p", {}, `${words(e.status)}: `, make("b", {}, String(e.answer))),
    make("table", {"aria-label": "Reward by part"}, make("tbody", {}, ...reward,
      make("tr", {}, make("th", {scope: "row"}, "advantage"),
        make("td", {}, signed(e.advantage))))));
}
function said(text) {  // the reasoning, and what follows it
  const end = text.indexOf("</think>");
  if (end < 0) return ["", text.trim()];
  return [text.slice(0, end).replace("<think>", "").trim(), text.slice(end + 8).trim()];
}
function frames(group, indices) {
  const {window: event, clip} = group;
  return make("div", {}, ...indices.map(i => {
    const inside = event && event[0] <= i && i <= event[1];
    const img = clip.error ? null
      : make("img", {src: `frames/${clip.name}_${i}.jpg`, loading: "lazy", alt: `frame ${i}`});
    return make("figure", {class: inside ? "frame event" : "frame"}, img, `frame ${i}`);
  }));
}
function timeLine(group, e) {
  const asked = e.turns.filter(turn => turn.window);
  const seen = [...e.overview, ...asked.flatMap(turn => turn.window), ...(group.window ?? [])];
  const count = group.clip.num_frames ?? Math.max(1, ...seen) + 1;
  const place = (start, end, kind) => {
    const [a, b] = [start, end + 1].map(v => 100 * Math.min(Math.max(v, 0), count) / count);
    return make("i", {class: kind, style: {left: `${a}%`, width: `${b - a}%`}});
  };
  const line = (name, ...marks) =>
    make("div", {class: "line"}, make("span", {}, name), make("div", {class: "track"}, ...marks));
  const ticks = e.overview.map(i => make("i", {class: "tick", style: {left: `${100 * i / count}%`}}));
  const lines = [line(`frames 0 to ${count - 1}`, ...ticks)];
  if (group.window) lines.push(line(`event: ${group.window.join(" to ")}`,
    place(...group.window, "event")));
  for (const {window, error} of asked)
    lines.push(line(`${error ? "refused" : "asked"}: ${window.join(" to ")}`,
      place(...window, error ? "refused" : "asked")));
  return make("div", {role: "group", "aria-label": "Time line"}, ...lines);
}
function tokens(e, g, member, t) {
  const summary = make("summary", {},
    `tokens: log-prob of each as sampled; the advantage of each is ${signed(e.advantage)}`);
  const box = make("div", {class: "tokens"});
  const details = make("details", {class: "of-tokens", ontoggle: () => {
    if (!details.open || box.firstChild) return;
    const [texts, logp] = read(`tokens-${g}`)[member][t];
    box.append(...texts.map((text, k) => make("ruby", {style: {
      borderBottomColor: `color-mix(in srgb, var(--red) ${Math.min(100, -40 * logp[k])}%, transparent)`,
    }}, text.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅", make("rt", {}, logp[k].toFixed(2)))));
  }}, summary, box);
  details.open = openTokens;
  return details;
}

// Keys, and what a reload keeps: it is written behind the page's address.

function remember() {
  const e = shown[chosen], kept = {kind: $("kind").value, step: $("step").value,
    text: $("text").value, group: e && `${e.group.step}/${e.group.id}`, member: e?.member,
    beside: beside ?? "", tokens: openTokens ? 1 : ""};
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
}
function restore() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const id of ["kind", "step", "text"]) $(id).value = kept.get(id) ?? "";
  openTokens = kept.get("tokens") === "1";
  filter();
  const n = shown.findIndex(e => `${e.group.step}/${e.group.id}` === kept.get("group")
    && e.member === +kept.get("member"));
  if (n < 0) return;
  choose(n);
  const k = kept.get("beside");
  if (k && shown[n].group.episodes[+k]) beside = +k;
  paintDetail();
  remember();
}
function toggleTokens() {
  openTokens = !openTokens;
  document.querySelectorAll(".of-tokens").forEach(one => { one.open = openTokens; });
  remember();
}
const step = by => shown.length && choose(Math.max(0, Math.min(shown.length - 1, chosen + by)));
const page = () => Math.max(1, Math.floor($("list").clientHeight / ROW) - 1);
const IN_LIST = {ArrowDown: () => step(1), ArrowUp: () => step(-1), PageDown: () => step(page()),
  PageUp: () => step(-page()), Home: () => step(-Infinity), End: () => step(Infinity)};
const ANYWHERE = {j: () => step(1), k: () => step(-1), t: toggleTokens, "/": () => $("text").focus(),
  b: () => {
    beside = beside === null ? other(shown[chosen]) : null;
    paintDetail();
    remember();
  }};
document.addEventListener("keydown", event => {
  const writes = event.target.matches("input, select, textarea");
  const inList = event.target === $("list") && IN_LIST[event.key];
  const act = inList || (!writes && !event.ctrlKey && !event.metaKey && !event.altKey
    && ANYWHERE[event.key]);
  if (!act) return;
  event.preventDefault();
  act();
});

function choices(select, names, all) {
  select.append(make("option", {value: ""}, all));
  for (const [value, name] of names) select.append(make("option", {value}, name));
}
const counts = new Map();
episodes.forEach(e => counts.set(e.kind, (counts.get(e.kind) ?? 0) + 1));
choices($("kind"), run.kinds.map(kind => [kind, `${kind} (${counts.get(kind) ?? 0})`]), "all");
choices($("step"), [...new Set(run.groups.map(group => group.step))].map(k => [k, k]), "all");
$("about").textContent = run.about;
$("filters").addEventListener("input", filter);
$("filters").addEventListener("submit", event => event.preventDefault());
$("list").addEventListener("scroll", paintList);
window.addEventListener("resize", paintList);
$("episodes").hidden = !episodes.length;
if (run.live_s) {
  $("live").hidden = false;
  setInterval(() => $("live").firstElementChild.checked && location.reload(), 1000 * run.live_s);
}
if (episodes.length) restore();
document.documentElement.dataset.readyMs = Math.round(performance.now());
