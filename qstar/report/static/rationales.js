(async function () {
  if (!document.getElementById("rationale-data")) return;
  const box = document.getElementById("browser");
  let data;
  try {
    data = await page.unpack("rationale-data");
  } catch (error) {
    box.append("This browser cannot unpack the list: it needs DecompressionStream (2023 on).");
    return;
  }
  const PER_PAGE = 25;
  const fields = data.filters;
  const toObject = (names) => (values) => Object.fromEntries(names.map((name, i) => [name, values[i]]));
  const rows = data.rows.map(toObject(data.columns));
  const kinds = data.counts.map(toObject([...fields, "count"]));
  const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a) < String(b) ? -1 : 1);
  data.values = Object.fromEntries(fields.map((field) =>
    [field, [...new Set(kinds.map((kind) => kind[field]))].sort(order)]));
  let at = 0;

  const make = page.make;

  const words = {  // what a filter shows for values that are no words
    loop: (v) => (v === 0 ? "base" : data.unit + " " + v),
    hinted: (v) => (v ? "with the hint" : "without the hint"),
    valid: (v) => (v === null ? "not checked" : v ? "every step right" : "a wrong step"),
    group: (v) => data.groups[v] || v || "no group",
    arm: (v) => data.arms[v] || v,
    reason: (v) => v.replaceAll("_", " ") || "no reason",
  };
  const say = (field, value) => (words[field] ? words[field](value) : String(value));

  const kept = page.read("rationales");
  const filters = make("div", null, "filters");
  const search = make("input");
  search.type = "search";
  search.placeholder = "search prompts, rationales, answers";
  search.setAttribute("aria-label", search.placeholder);
  search.value = kept.get("search") || "";
  filters.append(search);
  const selects = {};
  const any = { arm: "every arm", loop: "every " + data.unit, verdict: "every verdict", reason: "every reason",
    hinted: "hinted or not", group: "every group", valid: "checked or not" };
  for (const field of fields) {
    const values = data.values[field];
    if (values.length < 2) continue;
    const select = make("select");
    select.setAttribute("aria-label", any[field]);
    select.append(new Option(any[field], ""));
    values.forEach((value, i) => select.append(new Option(say(field, value), String(i))));
    select.value = [...values.keys()].find((i) => String(values[i]) === kept.get(field)) ?? "";
    select.addEventListener("change", refresh);
    selects[field] = select;
    filters.append(select);
  }
  search.addEventListener("input", refresh);
  if (data.values.arm.length < 2) box.classList.add("one-arm");

  const status = make("p", null, "note");
  status.setAttribute("aria-live", "polite");
  const list = make("div");
  const pages = make("div", null, "pages");
  const back = make("button", "Previous");
  const forth = make("button", "Next");
  const where = make("span", "", "soft");
  back.addEventListener("click", () => { at -= 1; draw(); });
  forth.addEventListener("click", () => { at += 1; draw(); });
  pages.append(back, where, forth);

  // What the filters let through, with the words of the run folder's files.
  const saves = make("p", "These rows as ", "saves note");
  const columns = [...fields, "id", "prompt", "completion", "gold", "answer", "truncated"];
  const saved = () => found.map((row) => Object.fromEntries(columns.map((name) => [name, row[name]])));
  saves.append(
    page.saver("JSON lines", () => page.save("rationales.jsonl", "application/x-ndjson",
      saved().map((row) => JSON.stringify(row) + "\n").join(""))),
    page.saver("CSV", () => page.save("rationales.csv", "text/csv",
      page.csv([columns, ...saved().map((row) => columns.map((name) => row[name]))]))));
  box.append(filters, status, list, pages, saves);

  function fits(row) {
    return Object.entries(selects).every(
      ([field, select]) => select.value === "" || data.values[field][Number(select.value)] === row[field]);
  }

  let found = [], began = false;
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
    status.textContent = "Showing " + number(found.length) + " of " + number(all) + " attempts" + rest;
    at = 0;
    draw();
    if (began) {
      page.keep("rationales", { search: search.value, ...Object.fromEntries(Object.entries(selects).map(
        ([field, select]) => [field, select.value === "" ? "" : String(data.values[field][Number(select.value)])])) });
    }
    began = true;
  }

  function draw() {
    const last = Math.max(0, Math.ceil(found.length / PER_PAGE) - 1);
    list.replaceChildren(...found.slice(at * PER_PAGE, (at + 1) * PER_PAGE).map(entry));
    where.textContent = "page " + (at + 1) + " of " + (last + 1);
    back.disabled = at === 0;
    forth.disabled = at >= last;
    pages.hidden = last === 0;
  }

  function entry(row) {
    const node = make("details", null, "row");
    const top = make("summary");
    const head = make("span");
    head.append(make("span", row.verdict || "no verdict", "chip " + row.verdict));
    const right = row.answer === row.gold;
    const said = row.answer === null ? "no answer" : "answers " + row.answer;
    const answer = make("span", said, right ? "" : "wrong");
    const valid = row.valid === null ? "" : row.valid ? "steps right" : "steps wrong";
    const lines = row.prompt.trim().split("\n");
    const question = lines.filter((line) => line.length > 3).pop() || lines.pop();  // not a bare "A:"
    const arm = make("span", say("arm", row.arm), "soft arm");
    arm.title = arm.textContent;
    top.append(head, arm, make("span", say("loop", row.loop), "soft"), make("code", question), make("code", row.completion), answer,
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
    let from = 0;
    for (const [start, end] of spans) {
      pre.append(part(from, start), make("mark", part(start, end)));
      from = end;
    }
    pre.append(part(from));
    return pre;
  }

  refresh();
})();
