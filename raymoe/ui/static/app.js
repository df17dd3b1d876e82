"use strict";
// The page: one stream of server-sent events in, everything else is drawing.

const KEEP_POINTS = 180, KEEP_EVENTS = 200, SILENT_MS = 6000, RETRY_MS = 3000;
const byId = (id) => document.getElementById(id);
const seconds = (v) => (v == null ? "–" : v < 0.9995 ? `${(1000 * v).toFixed(v < 0.01 ? 1 : 0)} ms` : `${v.toFixed(2)} s`);
const count = (v) => (v == null ? "–" : v >= 1e6 ? `${(v / 1e6).toFixed(1)} M` : v >= 1e4 ? `${(v / 1e3).toFixed(1)} k` : v >= 100 || v === Math.round(v) ? String(Math.round(v)) : v.toFixed(1));
const part = (v) => (v == null ? "–" : v.toFixed(3));
function bytes(v) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (v >= 1024 && i < units.length - 1) { v /= 1024; i += 1; }
  return `${v.toFixed(v < 10 && i ? 1 : 0)} ${units[i]}`;
}
function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const charts = [
  new Chart(byId("chart-tokens"), "Tokens generated/s", [{ name: "", key: "tokens_per_s" }], count),
  new Chart(byId("chart-balance"), "Balancedness", [{ name: "", key: "balancedness" }], part, 1),
  new Chart(byId("chart-first"), "First token after",
    [{ name: "p50", key: "first_token_p50_s" }, { name: "p95", key: "first_token_p95_s" }], seconds),
  new Chart(byId("chart-next"), "Between tokens",
    [{ name: "p50", key: "next_token_p50_s" }, { name: "p95", key: "next_token_p95_s" }], seconds),
];
charts.forEach((chart) => chart.draw([]));

const page = { points: [], source: null, layer: 0, layers: 0, shown: null, focus: [0, 0], heard: 0, retry: 0 };

// ---- the connection

function connect() {
  clearTimeout(page.retry);
  if (page.source) page.source.close();
  const source = new EventSource(`ui/events?layer=${page.layer}`);
  page.source = source;
  page.heard = Date.now();
  source.onmessage = (event) => {
    page.heard = Date.now();
    take(JSON.parse(event.data));
  };
  source.onerror = () => {
    if (source !== page.source) return;
    source.close();
    lost("The endpoint does not answer, or too many pages are open. Trying again…");
    page.retry = setTimeout(connect, RETRY_MS);
  };
}

setInterval(() => {
  if (page.source && page.source.readyState !== EventSource.CLOSED && Date.now() - page.heard > SILENT_MS) {
    lost("Nothing has been heard for a while. Trying again…");
    connect();
  }
}, 1000);

function say(state, text) {
  const pill = byId("connection");
  if (pill.textContent !== text) pill.textContent = text;
  pill.className = `pill ${state}`;
}

// nothing has been shown yet: then nothing is old
const old = () => (page.layers ? " What you see is old." : "");

function lost(why) {
  say("lost", "connection lost");
  byId("notice").textContent = why + old();
  byId("notice").hidden = false;
  document.body.classList.add("stale");
}

function take(message) {
  document.body.classList.toggle("stale", !message.controller);
  byId("notice").hidden = message.controller;
  if (!message.controller) {
    say("waiting", "controller away");
    byId("notice").textContent = `The placement controller does not answer; requests are served on.${old()}`;
  } else {
    say("live", "live");
  }
  if (message.full) { page.points = []; byId("events").replaceChildren(); }
  page.points = page.points.concat(message.history).slice(-KEEP_POINTS);
  if (message.full || message.history.length) charts.forEach((chart) => chart.draw(page.points));
  addEvents(message.events);
  if (message.controller) drawState(message);
}

// ---- what there is now

function drawState(message) {
  const status = message.status, last = page.points[page.points.length - 1] || {};
  byId("subtitle").textContent =
    `${status.model} · ${status.family} · deployment ${status.deployment} · epoch ${status.epoch}`;
  document.title = `${status.ready ? "" : "! "}raymoe · ${status.model}`;
  byId("tile-tokens").textContent = count(last.tokens_per_s);
  byId("tile-first").textContent = seconds(last.first_token_p95_s);
  byId("tile-next").textContent = seconds(last.next_token_p95_s);
  byId("tile-balance").textContent = part(status.balancedness);
  const ready = status.groups.filter((group) => group.state === "ready").length;
  byId("tile-groups").textContent = `${ready} of ${status.groups.length}`;
  const plan = message.last_plan || {};
  const promised = plan.promised == null ? "" : ` (${(100 * plan.promised).toFixed(1)} %)`;
  byId("tile-plans").textContent = `${message.plans}${promised}`;
  byId("tile-plans").title = plan.trigger ? `the last one: ${plan.trigger}, promised gain in brackets` : "";
  drawFleet(status.groups, message.group_load, message.latency_s);
  byId("routers").textContent = status.routers
    .map((r) => `${r.id}: ${r.state}, KV cache ${Math.round((100 * r.profile.kv_used_blocks) / Math.max(r.profile.kv_blocks, 1))} %`)
    .join(" · ") || "no router is known to the controller";
  drawLayers(message);
  drawHeat(message.layer);
}

function meter(value, most, text, kind) {
  const box = element("div", `meter ${kind}`);
  const bar = svgElement("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" });
  bar.append(svgElement("rect", { height: 8, width: most > 0 ? Math.min(100, (100 * value) / most) : 0 }));
  box.append(bar, element("span", "", text));
  return box;
}

function drawFleet(groups, load, latency) {
  const most = Math.max(1e-9, ...Object.values(load));
  const rows = groups.map((group) => {
    const row = element("tr");
    const cell = (content, label, className) => {
      const td = element("td", className);
      if (label) td.dataset.label = label;
      td.append(content);
      row.append(td);
    };
    const name = element("strong", "", group.id);
    name.title = `${group.kind}, pid ${group.pid}, node ${group.node}`;
    cell(name, "", "");
    const kind = group.state === "ready" ? "ready" : group.state === "lost" ? "lost" : "other";
    const state = element("span", `state ${kind}`, group.state);
    if (group.last_error) state.title = group.last_error;
    cell(state, "", "");
    cell(meter(load[group.id] || 0, most, count(load[group.id] || 0), "load"), "load", "wide");
    const held = `${bytes(group.resident_bytes)} of ${bytes(group.memory_bytes)}`;
    cell(meter(group.resident_bytes, group.memory_bytes, held, "memory"), "memory", "wide");
    cell(group.speed.toFixed(2), "speed", "num");
    cell(String(group.replicas), "replicas", "num");
    cell(count(group.queued_pairs), "queue", "num");
    cell(seconds(latency[group.id]), "answers in", "num");
    return row;
  });
  if (!rows.length) {
    const row = element("tr"), cell = element("td", "muted", "there are no groups");
    cell.colSpan = 8;
    row.append(cell);
    rows.push(row);
  }
  byId("fleet").tBodies[0].replaceChildren(...rows);
}

// ---- the heat map

function drawLayers(message) {
  const select = byId("layer");
  if (page.layers !== message.layer_count && message.layer_count) {
    page.layers = message.layer_count;
    select.replaceChildren(...Array.from({ length: page.layers }, (_, i) => new Option(String(i), String(i))));
    select.value = String(page.layer);
  }
  byId("layer-down").disabled = page.layer <= 0;
  byId("layer-up").disabled = page.layer >= page.layers - 1;
  const balance = message.layer_balancedness[String(page.layer)];
  byId("layer-balance").textContent = balance == null ? "no load" : `balancedness ${part(balance)}`;
}

function chooseLayer(layer) {
  if (layer < 0 || layer >= page.layers) return;
  page.layer = layer;
  page.shown = null;
  byId("layer").value = String(layer);
  byId("detail").textContent = "";
  byId("layer-balance").textContent = "loading…";
  connect();
}
byId("layer").addEventListener("change", (event) => chooseLayer(Number(event.target.value)));
byId("layer-down").addEventListener("click", () => chooseLayer(page.layer - 1));
byId("layer-up").addEventListener("click", () => chooseLayer(page.layer + 1));

function drawHeat(layer) {
  const grid = byId("heat"), experts = layer.load.length, shape = `${layer.groups.join(" ")}|${experts}`;
  if (layer.index !== page.layer) return;
  // [expert][group], 0 where there is no replica; one that takes nothing yet is here all the same
  layer.share = layer.replicas.map((list) => {
    const row = new Array(layer.groups.length).fill(0);
    for (const [g, share] of list) row[g] = Math.max(share, 1e-6);
    return row;
  });
  if (!experts) {
    grid.replaceChildren(element("p", "muted", "no expert has a ready replica yet"));
    page.shown = null;
    return;
  }
  const fresh = page.shown && page.shown.shape === shape ? page.shown.share : null;
  if (grid.dataset.shape !== shape) buildHeat(grid, layer, shape);
  const most = Math.max(1e-9, ...layer.load.map((load, e) => load * Math.max(...layer.share[e])));
  byId("heat-middle").textContent = count(most > 1e-6 ? most / 4 : 0);
  byId("heat-most").textContent = `${count(most > 1e-6 ? most : 0)} pairs/s`;
  layer.groups.forEach((group, g) => {
    for (let e = 0; e < experts; e += 1) {
      const cell = grid.cells[g][e], share = layer.share[e][g], here = share > 0;
      const taken = layer.load[e] * share, copies = layer.share[e].filter((s) => s > 0).length;
      // by the square root: loads differ by orders of magnitude
      const level = taken > 0 ? Math.max(1, Math.ceil(5 * Math.sqrt(taken / most))) : 0;
      const arrived = fresh && here && !(fresh[e] && fresh[e][g] > 0);
      const names = ["cell", here ? `heat-${level}` : "none"];
      if (here && copies > 1) names.push("many");
      if (arrived || (cell.classList.contains("fresh") && here && Date.now() - cell.since < 2500)) names.push("fresh");
      if (arrived) cell.since = Date.now();
      cell.className = names.join(" ");
      const words = here
        ? `expert ${e} on ${group}: ${count(taken)} pairs/s, ${Math.round(100 * share)} % of its load${copies > 1 ? `, ${copies} replicas` : ""}`
        : `expert ${e}: no replica on ${group}`;
      cell.setAttribute("aria-label", words);
      cell.title = words;
    }
  });
  page.shown = { shape, share: layer.share };
  grid.dataset.layer = layer.index;
}

function buildHeat(grid, layer, shape) {
  const experts = layer.load.length, head = element("div");
  grid.dataset.shape = shape;
  grid.style.setProperty("--columns", experts);
  head.setAttribute("role", "row");
  const corner = element("span", "corner");
  corner.setAttribute("role", "columnheader");
  corner.textContent = "";
  corner.setAttribute("aria-label", "group");
  head.append(corner);
  for (let e = 0; e < experts; e += 1) {
    const column = element("span", "", e % (experts > 32 ? 4 : 1) ? "" : String(e));
    column.setAttribute("role", "columnheader");
    column.setAttribute("aria-label", `expert ${e}`);
    head.append(column);
  }
  const rows = layer.groups.map((group) => {
    const row = element("div"), name = element("span", "", group);
    row.setAttribute("role", "row");
    name.setAttribute("role", "rowheader");
    name.title = group;
    row.append(name);
    return row;
  });
  grid.cells = layer.groups.map((_, g) => Array.from({ length: experts }, (_, e) => {
    const cell = element("span", "cell none");
    cell.setAttribute("role", "gridcell");
    cell.tabIndex = -1;
    cell.addEventListener("focus", () => { page.focus = [g, e]; mark(grid); tell(cell); });
    cell.addEventListener("click", () => { cell.focus(); why(g, e); });
    rows[g].append(cell);
    return cell;
  }));
  grid.replaceChildren(head, ...rows);
  page.focus = [Math.min(page.focus[0], layer.groups.length - 1), Math.min(page.focus[1], experts - 1)];
  mark(grid);
}

function mark(grid) {
  grid.cells.forEach((row, g) => row.forEach((cell, e) => {
    cell.tabIndex = g === page.focus[0] && e === page.focus[1] ? 0 : -1;
  }));
}

const tell = (cell) => { byId("detail").textContent = cell.getAttribute("aria-label"); };

byId("heat").addEventListener("keydown", (event) => {
  const grid = byId("heat"), [g, e] = page.focus;
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -e], End: [0, Infinity] }[event.key];
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); why(g, e); return; }
  if (!step || !grid.cells) return;
  event.preventDefault();
  const row = Math.min(Math.max(g + step[0], 0), grid.cells.length - 1);
  const column = Math.min(Math.max(e + step[1], 0), grid.cells[0].length - 1);
  grid.cells[row][column].focus();
});

async function why(g, e) {
  const words = byId("heat").cells[g][e].getAttribute("aria-label");
  try {
    const answer = await fetch(`ui/view?layer=${page.layer}&why=1`);
    if (!answer.ok) throw new Error(`it answered ${answer.status}`);
    const found = (await answer.json()).layer.why[`${e},${g}`];
    const since = found && found.since > 0 ? ` Here since ${new Date(found.since * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "medium", hour12: false })}` : "";
    byId("detail").textContent = found ? `${words}.${since}: ${found.why}.` : `${words}.`;
  } catch (error) {
    byId("detail").textContent = `${words}. Why cannot be told now: ${error.message}.`;
  }
}

// ---- events

function addEvents(events) {
  const list = byId("events");
  const items = events.map((event) => {
    const item = element("li", event.kind), time = element("time", "", clock(event.at));
    time.dateTime = new Date(event.at * 1000).toISOString();
    item.append(time, element("span", "kind", event.kind), element("span", "text", event.text));
    return item;
  });
  if (items.length) list.querySelectorAll("li.muted").forEach((item) => item.remove());
  list.prepend(...items.reverse());
  while (list.children.length > KEEP_EVENTS) list.lastChild.remove();
  if (!list.children.length) list.append(element("li", "muted", "nothing has happened yet"));
}

connect();
