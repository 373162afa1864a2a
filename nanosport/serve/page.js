"use strict";
// Every text enters the page as a text node: nothing that is sent or said is read as HTML.
const $ = id => document.getElementById(id);
const form = $("ask"), button = form.querySelector("button");
let upload = null, preview = null, newest = null;

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}
function call(path, options) {
  const token = $("token").value;
  const headers = {...options.headers, ...(token && {Authorization: `Bearer ${token}`})};
  return fetch(path, {...options, headers});
}
async function checked(response) {
  if (response.ok) return response;
  if (response.status === 401) $("secret").hidden = false;
  const reply = await response.json().catch(() => ({}));
  throw new Error(reply.error?.message ?? `${response.status} ${response.statusText}`);
}
function say(text, isWrong = false) {
  $("state").textContent = text;
  $("state").className = isWrong ? "wrong" : "";
}
function ready(isReady) {
  $("question").disabled = button.disabled = !isReady;
  if (isReady) $("question").focus();
}

async function send(file) {
  if (!file) return;
  newest = file;
  forget();
  ready(false);
  $("video").hidden = true;
  say(`sending ${file.name} …`);
  try {
    const body = {method: "POST", body: file, headers: {"Content-Type": "application/octet-stream"}};
    const sent = await (await checked(await call("videos", body))).json();
    if (file !== newest) return forget(sent);
    upload = {...sent, name: file.name};
  } catch (error) {
    if (file !== newest) return;
    return say(`${file.name}: ${error.message}`, true);
  }
  say(`${file.name}: ${upload.num_frames} frames`);
  if (preview) URL.revokeObjectURL(preview);
  $("video").src = preview = URL.createObjectURL(file);
  $("video").hidden = false;
  ready(true);
}
function forget(sent = upload) {
  if (sent) call(`videos/${sent.id}`, {method: "DELETE", keepalive: true}).catch(() => {});
  if (sent === upload) upload = null;
}

async function ask(text) {
  const lines = make("div", {role: "group", "aria-label": "Time line"}), said = make("pre");
  const stop = make("button", {type: "button"}, "Stop"), last = make("p", {role: "status"});
  const article = make("article", {}, make("h2", {}, text), make("small", {}, upload.name), lines, said, last, stop);
  $("answers").prepend(article);
  const control = new AbortController();
  stop.addEventListener("click", () => control.abort());
  const content = [{type: "video_url", video_url: {url: upload.url}}, {type: "text", text}];
  const num_frames = upload.num_frames;
  const asked = {messages: [{role: "user", content}], stream: true, show_turns: true};
  try {
    const response = await checked(await call("v1/chat/completions", {method: "POST",
      body: JSON.stringify(asked), headers: {"Content-Type": "application/json"},
      signal: control.signal}));
    for await (const chunk of chunks(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      said.append(chunk.choices[0].delta.content ?? "");
      show(chunk.nanosport ?? {}, num_frames, lines, last);
    }
  } catch (error) {
    last.className = "wrong";
    last.textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
  stop.remove();
}
async function* chunks(body) {
  let rest = "";
  const decoder = new TextDecoder(), reader = body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + decoder.decode(part.value, {stream: true})).split("\n\n");
    rest = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}
function show(beside, count, lines, last) {
  const percent = v => `${100 * Math.min(Math.max(v, 0), count) / count}%`;
  const line = (name, ...marks) => lines.append(
    make("div", {class: "line"}, make("span", {}, name), make("div", {class: "track"}, ...marks)));
  const mark = (kind, start, end) => {
    const bar = make("i", {class: kind});
    bar.style.left = percent(start);
    if (end !== undefined) bar.style.width = `${100 * (Math.min(end, count) - start) / count}%`;
    return bar;
  };
  if (beside.frames) line(`frames 0 to ${count - 1}`, ...beside.frames.map(i => mark("tick", i)));
  if (beside.turn?.window) {
    const [start, end] = beside.turn.window, kind = beside.turn.error ? "refused" : "asked";
    line(`${kind}: ${start} to ${end}`, mark(kind, start, end + 1));
  }
  if (beside.turn?.error) lines.append(make("p", {class: "wrong"}, `refused: ${beside.turn.error}`));
  if (beside.status) last.append(beside.answer === null
    ? `no answer (${beside.status.replaceAll("_", " ")})` : make("b", {}, beside.answer));
}

const drop = $("drop");
for (const [name, isOver] of [["dragover", true], ["dragleave", false], ["drop", false]])
  drop.addEventListener(name, event => {
    event.preventDefault();
    drop.classList.toggle("over", isOver);
    if (name === "drop") send(event.dataTransfer.files[0]);
  });
$("video").addEventListener("error", () => {
  if (!$("video").hidden) say(`${$("state").textContent} (this browser cannot play it)`);
  $("video").hidden = true;
});
$("file").addEventListener("change", () => send($("file").files[0]));
$("token").addEventListener("change", () => send(newest));
$("secret").addEventListener("submit", event => event.preventDefault());
form.addEventListener("submit", event => {
  event.preventDefault();
  if (upload && $("question").value.trim()) ask($("question").value.trim());
});
window.addEventListener("pagehide", () => forget());
