"""The status page: one HTML file with its style and script, and nothing to fetch but /status."""

from __future__ import annotations

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>xKV service</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #888; --good: #2a8; --bad: #d54; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 70rem; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
header { display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: baseline; }
header p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
#tiles { margin-top: 1rem; display: grid;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .5rem; }
#tiles div { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; min-width: 0; }
#tiles b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
#tiles span, th { color: var(--soft); font-size: .85rem; font-weight: normal; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; }
td.name { min-width: 7rem; max-width: 16rem; overflow-wrap: break-word; }
td.n { white-space: nowrap; }
caption { text-align: left; color: var(--soft); }
form { margin-top: 1rem; display: flex; flex-wrap: wrap; gap: .5rem; }
input { flex: 1 1 12rem; min-width: 0; font: inherit; padding: .35rem .5rem; } button { font: inherit; }
#state::before { content: "\\25cf"; margin-right: .4em; color: var(--bad); }
#state.live::before { color: var(--good); }
[hidden] { display: none !important; }
</style>
<header><h1>xKV service</h1><p id="state">connecting</p><p id="model"></p></header>
<form id="door" hidden><input id="key" type="password" autocomplete="off" placeholder="key" aria-label="key">
<button>show</button></form>
<main id="main" hidden>
<div id="tiles"></div>
<h2>Misses</h2><div class="scroll"><table id="misses"></table></div>
<h2>Prefixes</h2><div class="scroll"><table id="prefixes"></table></div>
</main>
<script>
"use strict";
const $ = name => document.getElementById(name);
const number = value => value.toLocaleString("en");
const bytes = value => {
  let unit = 0;
  while (value >= 1024 && unit < 4) { value /= 1024; unit++; }
  return `${unit ? value.toFixed(1) : value} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
};
const share = (part, whole) => whole ? `${(100 * part / whole).toFixed(1)} %` : "–";
let key = sessionStorage.getItem("key") || "";

function cell(kind, text, style) {
  const made = document.createElement(kind);
  made.textContent = text;
  if (style) made.className = style;
  return made;
}
function tile(label, text) {
  const made = document.createElement("div");
  made.append(cell("b", text), cell("span", label));
  return made;
}
function table(into, head, rows, none = "none") {
  const lines = [head.map(([text, style]) => cell("th", text, style)),
    ...rows.map(row => row.map((text, at) => cell("td", text, head[at][1])))];
  if (!rows.length) return into.replaceChildren(cell("caption", none));
  into.replaceChildren(...lines.map(cells => {
    const line = document.createElement("tr");
    line.append(...cells);
    return line;
  }));
}
function show(status) {
  const {traffic, engine} = status;
  $("model").textContent = `${status.model}, namespace ${status.namespace}`;
  const tiles = [tile("requests ended", number(traffic.requests)),
    tile("requests in the server", number(traffic.in_flight)),
    tile("prefix hits", share(traffic.hits, traffic.requests)),
    tile("prompt tokens cached", share(traffic.cached_tokens, traffic.prompt_tokens)),
    tile("tokens a second, last minute", traffic.tokens_per_second.toFixed(1)),
    tile("tokens answered", number(traffic.generated_tokens))];
  if (engine) tiles.push(tile(engine.engines === 1 ? "engine" : "engines", number(engine.engines)),
    tile("answers being computed", number(engine.running)), tile("answers waiting", number(engine.waiting)),
    tile("prefixes in memory", number(engine.resident_prefixes)),
    tile("memory of prefixes", bytes(engine.prefix_bytes)),
    tile("conversations in memory", number(engine.kept_tails)),
    tile("memory of conversations", bytes(engine.tail_bytes)));
  $("tiles").replaceChildren(...tiles);
  table($("misses"), [["reason", ""], ["requests", "n"]],
    Object.entries(traffic.misses).map(([reason, count]) => [reason, number(count)]));
  table($("prefixes"), [["id", ""], ["name", "name"], ["namespace", "name"], ["status", ""], ["tokens", "n"],
    ["bytes", "n"], ["ratio", "n"], ["fidelity", "n"]],
    status.prefixes.map(one => [one.id.slice(0, 12), one.name, one.namespace,
      one.status + (one.pinned ? ", pinned" : "") + (one.usable === false ? ", not used" : ""),
      number(one.tokens),
      one.bytes === null ? "" : bytes(one.bytes), one.ratio === null ? "" : `${one.ratio.toFixed(1)}x`,
      one.fidelity === null ? "" : share(one.fidelity, 1)]),
    status.prefixes_error || "none");
  $("main").hidden = false;
}
async function poll() {
  let text = "no answer", live = false;
  try {
    const answer = await fetch("status", {headers: key ? {authorization: `Bearer ${key}`} : {}});
    $("door").hidden = answer.status !== 401;
    if (answer.ok) { show(await answer.json()); text = "live"; live = true; }
    else { $("main").hidden = true; text = answer.status === 401 ? "needs a key" : `error ${answer.status}`; }
  } catch (error) { /* the server is away: said so, and asked again */ }
  $("state").textContent = text;
  $("state").className = live ? "live" : "";
}
$("door").addEventListener("submit", event => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("key", key);
  poll();
});
// One at a time: a server that is slow to answer is not asked again meanwhile.
async function watch() {
  if (!document.hidden) await poll();
  setTimeout(watch, 2000);
}
watch();
</script>
</html>
"""
