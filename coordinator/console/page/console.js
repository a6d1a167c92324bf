"use strict";
// Text from the service reaches the page as text nodes only, never as markup.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const EVERY_MS = 1000;
let key = sessionStorage.getItem("pdserve-key") || "";
let mayAct = false;

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (attribute === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (value !== false && value !== null) node.setAttribute(attribute, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
  node.append(...children);
  return node;
}

const ms = (seconds) => seconds === null || seconds === undefined ? "–" : seconds === 0 ? "0" : seconds >= 10 ? `${seconds.toFixed(1)} s` : seconds >= 1 ? `${seconds.toFixed(2)} s` : `${(seconds * 1e3).toFixed(seconds < 0.01 ? 2 : 0)} ms`;
const share = (part) => `${(part * 100).toFixed(part > 0.9995 || part === 0 ? 0 : 1)}%`;
function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (count >= size) return `${(count / size).toFixed(count >= 10 * size ? 0 : 1)} ${unit}`;
  return `${Math.round(count)} B`;
}
const ago = (seconds) => seconds < 60 ? `${Math.round(seconds)} s ago` : `${Math.round(seconds / 60)} min ago`;

async function ask(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { ...options, headers });
  const said = await response.json();
  if (!response.ok) throw Object.assign(new Error(said.error || response.statusText), { status: response.status });
  return said;
}
function trouble(text) {
  $("trouble").textContent = text || "";
  $("trouble").hidden = !text;
}

async function refresh() {
  try {
    const state = await ask("api/state");
    trouble("");
    $("enter").hidden = !state.rights.keys || Boolean(key);
    mayAct = state.rights.keys && Boolean(key);
    $("acting").textContent = mayAct ? "" : state.rights.keys ? "Enter an API key with scope admin to drain workers or change roles." : "Workers can be drained and change roles from here once security.api_keys_file is set.";
    totals(state);
    map(state);
    classes(state);
    recent(state.recent);
  } catch (error) {
    if (error.status === 401 || error.status === 403) { $("enter").hidden = false; trouble(error.message); }
    else trouble(error.status ? error.message : "the service does not answer");
  }
}

function totals(state) {
  const sum = (role, field) => state.workers.filter((w) => w.role === role && w.up).reduce((total, w) => total + (w[field] || 0), 0);
  const entries = [
    ["requests", state.requests.active], ["waiting", state.requests.waiting],
    ["prompts", `${Math.round(sum("prefill", "tokens_per_s"))} tok/s`], ["answers", `${Math.round(sum("decode", "tokens_per_s"))} tok/s`],
    ["KV moved", `${bytes(state.flows.reduce((total, flow) => total + flow.bytes_per_s, 0))}/s`],
  ];
  $("totals").replaceChildren(...entries.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
}

// --- workers ---------------------------------------------------------------------------------------

let shownWorkers = "";
function map(state) {
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.act : null;
  const text = JSON.stringify([state.workers, mayAct]);
  if (text !== shownWorkers) {
    shownWorkers = text;
    for (const role of ["prefill", "decode"]) {
      const workers = state.workers.filter((worker) => worker.role === role);
      $(role).replaceChildren(el("div", { class: "dim" }, role === "prefill" ? `Prefill (${workers.length})` : `Decode (${workers.length})`), ...workers.map(card));
    }
    if (focused) document.querySelector(`[data-act="${CSS.escape(focused)}"]`)?.focus();
  }
  flows(state);
}
function card(worker) {
  const parts = [el("span", { class: `standing ${worker.standing}` }, worker.standing), el("span", { class: "name" }, worker.id), el("span", { class: "dim" }, ` ${worker.model}`)];
  if (worker.blocks) {
    const load = worker.role === "prefill"
      ? `${worker.running} reading, ${worker.waiting} waiting (${worker.waiting_tokens} tokens)`
      : `${worker.running} writing, ${worker.waiting} waiting, ${worker.waiting_tokens} tokens of context`;
    const speed = `${Math.round(worker.tokens_per_s)} tok/s, step ${worker.step_ms.toFixed(1)} ms${worker.busy === null ? "" : `, device ${share(worker.busy)} busy`}`;
    const b = worker.blocks;
    const used = `KV ${b.held} of ${b.total} blocks in use, ${b.cached} cached${b.quarantined ? `, ${b.quarantined} quarantined` : ""}${worker.prefix_hits === null ? "" : `, ${share(worker.prefix_hits)} prefix hits`}`;
    const bar = el("div", { class: "bar", role: "img", "aria-label": used });
    for (const kind of ["held", "quarantined", "cached"]) { const piece = el("i", { class: kind }); piece.style.width = `${(b[kind] / b.total) * 100}%`; bar.append(piece); }
    parts.push(el("p", {}, load), el("p", { class: "dim" }, speed), bar, el("p", { class: "dim" }, used));
    for (const pair of worker.pairs.filter((one) => one.error)) parts.push(el("p", { class: "missed" }, `no transfer to ${pair.peer}: ${pair.error}`));
    const ways = worker.pairs.filter((one) => !one.error && one.bytes_per_s).map((one) => `${one.peer} ${one.path} ${bytes(one.bytes_per_s)}/s`);
    if (worker.role === "prefill" && ways.length) parts.push(el("p", { class: "dim" }, `to ${ways.join("; ")}`));
  }
  if (worker.standing === "lost") parts.push(el("p", { class: "dim" }, "its successor is being started"));
  if (mayAct && worker.up) parts.push(el("p", { class: "actions" }, ...actions(worker)));
  return el("div", { class: `worker ${worker.role}${worker.up ? "" : " off"}`, id: `worker-${worker.id}` }, ...parts);
}
function actions(worker) {
  const other = worker.role === "prefill" ? "decode" : "prefill";
  if (worker.standing === "standing by") return [];
  const made = worker.standing === "draining" ? [["undrain", "Use again"]] : [["drain", "Drain"], ["flip", `Make it ${other}`]];
  return made.flatMap(([action, label]) => [el("button", { "data-act": `${worker.id} ${action}`, on: { click: () => act(worker.id, action, label) } }, label), " "]);
}
async function act(worker, action, label) {
  if (action !== "undrain" && !confirm(`${label}: ${worker}? Its requests finish or move to other workers.`)) return;
  try { await ask(`api/workers/${encodeURIComponent(worker)}/${action}`, { method: "POST" }); await refresh(); }
  catch (error) { trouble(error.message); }
}
function flows(state) {
  const box = $("map").getBoundingClientRect();
  const most = Math.max(...state.flows.map((flow) => flow.bytes_per_s), 1);
  const lines = [];
  for (const flow of state.flows) {
    const from = $(`worker-${flow.from}`), to = $(`worker-${flow.to}`);
    if (!from || !to) continue;
    const a = from.getBoundingClientRect(), b = to.getBoundingClientRect();
    const leftward = a.left > b.left, beside = a.left === b.left;
    const x1 = (leftward ? a.left : a.right) - box.left, x2 = (beside ? b.right : leftward ? b.right : b.left) - box.left;
    // Two of one role lie in one column: the way between them goes around, on the right.
    const y1 = a.top + a.height / 2 - box.top, y2 = b.top + b.height / 2 - box.top, half = beside ? x1 + 45 : (x1 + x2) / 2;
    lines.push(svg("path", { d: `M${x1} ${y1} C${half} ${y1} ${half} ${y2} ${x2} ${y2}`, fill: "none", stroke: "var(--prefill)", "stroke-opacity": 0.7, "stroke-width": 1 + 5 * flow.bytes_per_s / most }));
    lines.push(svg("text", { x: half, y: (y1 + y2) / 2 - 5, "text-anchor": "middle", fill: "var(--dim)", "font-size": 11 }, `${bytes(flow.bytes_per_s)}/s`));
  }
  $("flows").replaceChildren(...lines);
}

// --- targets and requests --------------------------------------------------------------------------

function head(...names) {
  return el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { class: name.startsWith("#") ? "num" : null, scope: "col" }, name.replace("#", "")))));
}
function classes(state) {
  const cell = ([met, missed]) => met + missed === 0 ? el("td", { class: "num dim" }, "no target") : el("td", { class: `num ${missed ? met / (met + missed) < 0.99 ? "missed" : "" : "met"}` }, `${share(met / (met + missed))} of ${met + missed}`);
  const rows = state.classes.map((one) => el("tr", {}, el("td", {}, one.class || "(no class)"), el("td", { class: "dim" }, one.model), el("td", { class: "num" }, String(one.requests)), el("td", { class: `num ${one.failed ? "missed" : ""}` }, String(one.failed)), cell(one.ttft), cell(one.tpot)));
  $("classes").replaceChildren(el("caption", { class: "hint" }, `last ${Math.round(state.window_s / 60)} minutes`), head("class", "model", "#ended", "#failed", "#TTFT", "#TPOT"), el("tbody", {}, ...rows));
  $("plans").replaceChildren(...state.plans.map((plan) => el("p", {}, el("b", {}, `Plan for ${plan.model}: ${plan.standing}. `), el("span", { class: "dim" }, plan.reason))));
}
function recent(requests) {
  const late = (met) => met === null ? "" : met ? "met" : "missed";
  const rows = requests.map((one) => el("tr", { tabindex: 0, on: { click: () => show(one.id), keydown: (event) => { if (event.key === "Enter") show(one.id); } } },
    el("td", {}, one.id), el("td", { class: "dim" }, ago(one.ago_s)), el("td", {}, one.class || one.tenant || ""),
    el("td", { class: ["stop", "length"].includes(one.outcome) ? "" : "missed" }, one.outcome),
    el("td", { class: "num" }, `${one.prompt_tokens} → ${one.output_tokens}`),
    el("td", { class: `num ${late(one.ttft_met)}` }, ms(one.ttft_s)), el("td", { class: `num ${late(one.tpot_met)}` }, ms(one.tpot_s)), el("td", { class: "num" }, ms(one.e2e_s)),
    el("td", { class: "dim" }, one.prefill_worker ? `${one.prefill_worker} → ${one.decode_worker}` : one.decode_worker), el("td", { class: "num" }, one.attempts > 1 ? String(one.attempts) : "")));
  $("recent").replaceChildren(head("request", "", "class", "outcome", "#tokens", "#TTFT", "#TPOT", "#all", "workers", "#attempts"), el("tbody", {}, ...rows));
}

// --- one request -----------------------------------------------------------------------------------

async function show(id) {
  try { draw(await ask(`api/requests/${encodeURIComponent(id)}`)); trouble(""); }
  catch (error) { trouble(error.message); }
}
function draw(story) {
  const rows = [];
  const add = (row, name, from, to, color, title) => { let found = rows.find((one) => one.name === row); if (!found) { found = { name: row, spans: [] }; rows.push(found); } found.spans.push({ name, from, to, color, title }); };
  const colors = { queued: "var(--line)", admitted: "var(--line)", prefilling: "var(--prefill)", transferring: "var(--quarantined)", decoding: "var(--decode)" };
  for (const phase of story.phases) add("phases", phase.phase, phase.start_s, phase.end_s, colors[phase.phase] || "var(--cached)", phase.phase);
  for (const attempt of story.attempts) {
    const reader = attempt.prefill_worker || attempt.decode_worker, began = attempt.prefill_start_s;
    if (began !== undefined) {
      let from = began;
      for (const chunk of attempt.chunks) { add(`${reader} reads`, "", from, chunk.at_s, "var(--prefill)", `chunk to ${chunk.tokens_done} tokens`); from = chunk.at_s; }
      if (!attempt.chunks.length && attempt.prefill_end_s !== undefined) add(`${reader} reads`, "", began, attempt.prefill_end_s, "var(--prefill)", "prompt");
    }
    if (attempt.kv_arrived_s !== undefined && Number(attempt.bytes_moved) && attempt.prefill_end_s !== undefined) add("KV, not hidden", "", attempt.prefill_end_s, Math.max(attempt.kv_arrived_s, attempt.prefill_end_s), "var(--quarantined)", `${bytes(Number(attempt.bytes_moved))} by ${attempt.transfer_path}`);
    if (attempt.failure) add(`attempt ${attempt.attempt}`, attempt.failure, attempt.start_s, attempt.end_s, "var(--bad)", attempt.failure);
  }
  const last = story.attempts[story.attempts.length - 1];
  let before = null;
  for (const output of story.outputs) { if (before !== null) add(`${last ? last.decode_worker : ""} writes`, "", before, output.at_s, "var(--decode)", `${output.tokens} tokens after ${ms(output.at_s - before)}`); before = output.at_s; }
  const end = Math.max(...rows.flatMap((row) => row.spans.map((span) => span.to)), 1e-3);
  const left = 150, width = 1000, high = 22, plot = width - left - 10;
  const x = (seconds) => left + (seconds / end) * plot;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${rows.length * high + 24}`, role: "img", "aria-label": "timeline" });
  for (let tick = 0; tick <= 5; tick++) {
    const at = (end * tick) / 5;
    picture.append(svg("line", { class: "axis", x1: x(at), x2: x(at), y1: 0, y2: rows.length * high }), svg("text", { x: x(at), y: rows.length * high + 16, "text-anchor": tick === 5 ? "end" : "middle" }, ms(at)));
  }
  rows.forEach((row, index) => {
    picture.append(svg("text", { x: 0, y: index * high + 15 }, row.name));
    for (const span of row.spans) {
      const wide = Math.max(x(span.to) - x(span.from), 1);
      picture.append(svg("rect", { x: x(span.from), y: index * high + 3, width: wide, height: high - 6, fill: span.color, stroke: "var(--card)", "stroke-width": 0.5 }, svg("title", {}, `${span.title}: ${ms(span.from)} to ${ms(span.to)}`)));
      if (wide > 60 && span.name) picture.append(svg("text", { class: "on", x: x(span.from) + 4, y: index * high + 15 }, span.name));
    }
  });
  const facts = [`${story.prompt_tokens} tokens in, ${story.output_tokens} out`, story.outcome || "running", story.error].filter(Boolean);
  const why = story.decisions.map((decision) => el("li", {}, `${ms(decision.at_s)}: ${decision.prefill ? `${decision.prefill.worker} reads, ` : ""}${decision.decode.worker} writes. ${decision.why}`));
  const notes = story.notes.map((note) => el("li", { class: "dim" }, `${ms(note.at_s)}: ${note.text}`));
  $("story").replaceChildren(el("h3", {}, story.request), el("p", { class: "dim" }, facts.join(" · ")), picture, el("ul", {}, ...why, ...notes));
  $("story").hidden = false;
}

$("find").addEventListener("submit", (event) => { event.preventDefault(); show($("request").value.trim() || "last"); });
$("enter").addEventListener("submit", (event) => { event.preventDefault(); key = $("key").value.trim(); sessionStorage.setItem("pdserve-key", key); $("key").value = ""; refresh(); });
addEventListener("resize", refresh);
async function keepFresh() { if (!document.hidden) await refresh(); setTimeout(keepFresh, EVERY_MS); }
keepFresh();
