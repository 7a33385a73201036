"""The style sheet and the script of a report: plain CSS and JavaScript, inlined to make a page one file."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --soft: #5a6270;
  --line: #dfe3e9;
  --accent: #0b62a8; --mark: #ffe08a; --on-bar: #ffffff; --good: #0a7a55; --bad: #b3261e; --open: #7a5a00;
  --kept: #0b6fb5; --rationalised: #c2560a; --rejected: #737b87;
  --c0: #0b6fb5; --c1: #c2560a; --c2: #00805c; --c3: #a8448a; --c4: #8a6d00; --c5: #2f8fc4; --c6: #6b5bd0; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1a1f28; --ink: #e8ebf0;
  --soft: #a3acba;
  --line: #323a47; --accent: #6db7f2; --mark: #6b5410; --on-bar: #10131a; --good: #4fd0a0; --bad: #ff8a80;
  --open: #e5c45a; --kept: #5fb0ea; --rationalised: #f39a55; --rejected: #9aa3b1;
  --c0: #5fb0ea; --c1: #f39a55; --c2: #3ecb9c; --c3: #e394c8; --c4: #e0c04a; --c5: #9bd4f5;
  --c6: #b0a4ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 1120px; padding: 2.2rem 1.4rem 5rem; background: var(--page);
  color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1rem; font-weight: 600; color: var(--soft); margin: 0 0 .6rem; }
h1 .chip { margin-left: .5rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .5rem; letter-spacing: -.01em; }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .4rem; }
section { margin-top: 3.2rem; scroll-margin-top: 1rem; }
.headline { font-size: clamp(1.3rem, 1rem + 1.6vw, 2rem); line-height: 1.32; font-weight: 650;
  letter-spacing: -.018em;
  margin: 0 0 1.4rem; max-width: 34em; text-wrap: pretty; }
.headline small { font-size: .56em; font-weight: 400; color: var(--soft); letter-spacing: 0;
  white-space: nowrap; }
.note { color: var(--soft); margin: .2rem 0 1rem; max-width: 46em; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: 1.2rem; font-size: .92rem; }
nav a { color: var(--accent); text-decoration: none; } nav a:hover { text-decoration: underline; }
.notice { border-left: 4px solid var(--rationalised); background: var(--card); padding: .7rem 1rem;
  margin: 1rem 0;
  border-radius: 0 8px 8px 0; } .notice p { margin: .2rem 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 1rem;
  margin: 1rem 0; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .5rem; }
.card, .scroll, .example, details, .row { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.card { padding: .9rem 1rem .6rem; max-width: 620px; } .card .note { margin: 0; font-size: .88rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft);
  font-variant-numeric: tabular-nums; }
svg .name { font-weight: 600; } svg .inside { fill: var(--on-bar); font-weight: 600; font-size: 11px;
  pointer-events: none; }
svg .grid { stroke: var(--line); } svg .zero { stroke: var(--soft); }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; } svg .dashed { stroke-dasharray: 5 4;
  stroke-width: 1.6; }
svg .mark { stroke-width: 1.6; } svg .band { opacity: .17; } svg .bar { stroke: var(--card);
  stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .3rem 0; font-size: .9rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .42rem .8rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.summary td { padding-top: .6rem; padding-bottom: .6rem; } .value { white-space: nowrap; }
.value small { color: var(--soft); }
.heat { background: linear-gradient(color-mix(in srgb, var(--rejected) 30%,
  transparent) 0 0) left / var(--share) 100%
  no-repeat; min-width: 5.5em; }
.chip { display: inline-block; padding: 0 .6em; border-radius: 1em; font-size: .82rem; font-weight: 600;
  border: 1px solid currentColor; white-space: nowrap; color: var(--soft); }
.chip.ok { color: var(--good); } .chip.bad { color: var(--bad); } .chip.open { color: var(--open); }
.chip.kept { color: var(--kept); } .chip.rationalised { color: var(--rationalised); }
.chip.rejected { color: var(--rejected); }
.steps { list-style: none; counter-reset: step; padding: 0; margin: 1.2rem 0; display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(185px, 100%), 1fr)); }
.steps li { counter-increment: step; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px;
  padding: .8rem .9rem; font-size: .9rem; }
.steps li > b::before { content: counter(step) " "; color: var(--accent); }
.steps p { margin: .3rem 0; color: var(--soft); } .steps .number { color: var(--ink); font-weight: 600; }
.steps .number { display: grid; grid-template-columns: 3.6em 1fr; line-height: 1.4; }
.steps .number span { font-weight: 400; color: var(--soft); }
.example { padding: .9rem 1rem; } dl { display: grid; grid-template-columns: max-content minmax(0, 1fr);
  gap: .3rem 1rem; margin: 0; } dt { color: var(--soft); font-size: .9rem; } dd { margin: 0; }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .86rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; } mark { background: var(--mark);
  color: inherit;
  border-radius: 3px; padding: 0 .1em; }
details { padding: .55rem .9rem; margin: .7rem 0; } summary { cursor: pointer; font-weight: 600;
  font-size: .93rem; }
details .scroll { border: 0; } details td { overflow-wrap: anywhere; }
input, select, button { font: inherit; font-size: .9rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 7px; padding: .38rem .6rem; max-width: 100%; }
input:focus-visible, select:focus-visible, button:focus-visible, summary:focus-visible, a:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 1px; }
button:enabled { cursor: pointer; } button:disabled { opacity: .45; }
details input[type=search] { margin: .7rem 0 0; width: 22rem; }
.filters { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0 .6rem; }
  .filters input { flex: 1 1 16rem; }
.row { padding: 0; margin: .35rem 0; } .row summary { display: grid; gap: .1rem .8rem; padding: .5rem .8rem;
  align-items: baseline; font-weight: 400; font-size: .88rem;
  grid-template-columns: 7.2rem 8.6rem minmax(8rem, 1fr) minmax(8rem, 1.5fr) 8.5rem 5.4rem; }
.row summary > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.row dl { padding: .7rem .8rem .9rem; border-top: 1px solid var(--line); }
.pages { display: flex; gap: .6rem; align-items: center; margin-top: .8rem; font-size: .9rem; }
.soft { color: var(--soft); } .wrong { color: var(--bad); }
@media (max-width: 760px) { body { padding: 1.3rem .9rem 4rem; } section { margin-top: 2.4rem; }
  .row summary { grid-template-columns: auto 1fr; } .row summary > :nth-child(n+3) { grid-column: 1 / -1; }
  .row summary > :nth-child(4) { display: none; } dl { grid-template-columns: minmax(0, 1fr); gap: .1rem; }
  dd { margin-bottom: .5rem; } .filters > * { flex: 1 1 40%; }
  svg text { font-size: 14px; } svg .inside { font-size: 13px; } .steps { grid-template-columns: 1fr; } }
"""

# Every text of a model enters the page through textContent: it cannot become markup.
SCRIPT = """
"use strict";
(function () {
  for (const input of document.querySelectorAll("input[data-filters]")) {
    const rows = document.querySelectorAll("#" + input.dataset.filters + " tbody tr");
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
  }

  const source = document.getElementById("rationale-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const PER_PAGE = 25;
  const fields = ["arm", "loop", "verdict", "reason", "hinted", "group", "valid"];
  const toObject = (names) => (values) => Object.fromEntries(names.map((name, i) => [name, values[i]]));
  const unpack = (row) => {  // the fields that filters use are numbers into data.values
    for (const field of fields) row[field] = data.values[field][row[field]];
    return row;
  };
  const rows = data.rows.map(toObject(data.columns)).map(unpack);
  const kinds = data.counts.map(toObject([...fields, "count"])).map(unpack);
  const box = document.getElementById("browser");
  let page = 0;

  function make(name, text, className) {
    const node = document.createElement(name);
    if (text !== undefined && text !== null) node.textContent = text;
    if (className) node.className = className;
    return node;
  }

  const words = {  // what a filter shows for values that are no words
    loop: (v) => "loop " + v,
    hinted: (v) => (v ? "with the hint" : "without the hint"),
    valid: (v) => (v === null ? "not checked" : v ? "every step right" : "a wrong step"),
    group: (v) => data.groups[v] || v || "no group",
    arm: (v) => v || data.method,
    reason: (v) => v.replaceAll("_", " ") || "no reason",
  };
  const say = (field, value) => (words[field] ? words[field](value) : String(value));

  const filters = make("div", null, "filters");
  const search = make("input");
  search.type = "search";
  search.placeholder = "search prompts, rationales, answers";
  search.setAttribute("aria-label", search.placeholder);
  filters.append(search);
  const selects = {};
  const any = { arm: "every arm", loop: "every loop", verdict: "every verdict", reason: "every reason",
    hinted: "hinted or not", group: "every group", valid: "checked or not" };
  for (const field of fields) {
    const values = data.values[field];
    if (values.length < 2) continue;
    const select = make("select");
    select.setAttribute("aria-label", any[field]);
    select.append(new Option(any[field], ""));
    values.forEach((value, i) => select.append(new Option(say(field, value), String(i))));
    select.addEventListener("change", refresh);
    selects[field] = select;
    filters.append(select);
  }
  search.addEventListener("input", refresh);

  const told = make("p", null, "note");
  told.setAttribute("aria-live", "polite");
  const list = make("div");
  const pages = make("div", null, "pages");
  const back = make("button", "Previous");
  const forth = make("button", "Next");
  const where = make("span", "", "soft");
  back.addEventListener("click", () => { page -= 1; draw(); });
  forth.addEventListener("click", () => { page += 1; draw(); });
  pages.append(back, where, forth);
  box.append(filters, told, list, pages);

  function fits(row) {
    return Object.entries(selects).every(
      ([field, select]) => select.value === "" || data.values[field][Number(select.value)] === row[field]);
  }

  let found = [];
  function refresh() {
    const wanted = search.value.toLowerCase();
    const holds = (text) => String(text).toLowerCase().includes(wanted);
    found = rows.filter((row) => fits(row) &&
      (!wanted || [row.prompt, row.completion, row.answer, row.gold, row.id].some(holds)));
    const all = kinds.filter(fits).reduce((sum, kind) => sum + kind.count, 0);
    const number = (n) => n.toLocaleString("en");
    let rest = found.length < all
      ? ": a fixed sample that holds every kind of rejection; the files in the run folder have all." : ".";
    if (wanted) rest = " that the filters let through (the search looks only at those that this page holds).";
    told.textContent = "Showing " + number(found.length) + " of " + number(all) + " attempts" + rest;
    page = 0;
    draw();
  }

  function draw() {
    const last = Math.max(0, Math.ceil(found.length / PER_PAGE) - 1);
    list.replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(entry));
    where.textContent = "page " + (page + 1) + " of " + (last + 1);
    back.disabled = page === 0;
    forth.disabled = page >= last;
    pages.hidden = last === 0;
  }

  function entry(row) {
    const node = make("details", null, "row");
    const top = make("summary");
    const head = make("span");
    head.append(make("span", row.verdict || "unjudged", "chip " + row.verdict));
    const right = row.answer === row.gold;
    const said = row.answer === null ? "no answer" : "answers " + row.answer;
    const answer = make("span", said, right ? "" : "wrong");
    const valid = row.valid === null ? "" : row.valid ? "steps right" : "steps wrong";
    const lines = row.prompt.trim().split("\\n");
    const question = lines.filter((line) => line.length > 3).pop() || lines.pop();  // not a bare "A:"
    top.append(head, make("span", [row.arm, "loop " + row.loop].filter(Boolean).join(", "), "soft"),
      make("code", question), make("code", row.completion), answer,
      make("span", valid, row.valid === false ? "wrong" : "soft"));
    node.append(top);
    node.addEventListener("toggle", () => {
      if (node.open && node.children.length === 1) node.append(body(row));
    });
    return node;
  }

  function body(row) {
    const list = make("dl");
    const add = (name, value) => {
      const place = make("dd");
      place.append(value);
      list.append(make("dt", name), place);
    };
    add("prompt", marked(row.prompt, row.hint));
    add("completion", make("pre", row.completion));
    add("right answer", make("code", row.gold));
    add("its answer", make("code", row.answer === null ? "none could be read" : row.answer));
    const reason = row.reason ? ": " + say("reason", row.reason) : "";
    add("verdict", row.verdict + reason + (row.hinted ? " (shown the answer as a hint)" : ""));
    if (row.valid !== null) {
      add("steps", row.valid ? "every line is exactly right" : "at least one line is wrong");
    }
    add("problem", row.id + (row.group ? " (" + say("group", row.group) + ")" : "") +
      (row.truncated ? ", cut off at the length limit" : ""));
    return list;
  }

  function marked(prompt, spans) {
    const pre = make("pre");
    const letters = Array.from(prompt);  // spans count characters, not UTF-16 units
    const part = (start, end) => letters.slice(start, end).join("");
    let at = 0;
    for (const [start, end] of spans) {
      pre.append(part(at, start), make("mark", part(start, end)));
      at = end;
    }
    pre.append(part(at));
    return pre;
  }

  refresh();
})();
"""
