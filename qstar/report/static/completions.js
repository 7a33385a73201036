(async function () {
  const box = document.getElementById("completion-list");
  let data;
  try {
    data = await page.unpack("completion-data");
  } catch (error) {
    box.append("This browser cannot unpack the list: it needs DecompressionStream (2023 on).");
    return;
  }
  const PER_PAGE = 25;
  const make = page.make;
  const rows = data.rows.map((values) => Object.fromEntries(data.columns.map((name, i) => [name, values[i]])));
  const distinct = (field) => [...new Set(rows.map((row) => row[field]))];
  const orders = {
    "highest advantage first": (a, b) => b.advantage - a.advantage,
    "lowest advantage first": (a, b) => a.advantage - b.advantage,
    "highest score first": (a, b) => b.score - a.score,
    "lowest score first": (a, b) => a.score - b.score,
    "by group": (a, b) => a.update - b.update || a.group - b.group || a.sample - b.sample,
  };
  const kept = page.read("completions");
  const filters = make("div", null, "filters");
  const search = make("input");
  search.type = "search";
  search.placeholder = "search prompts and completions";
  search.setAttribute("aria-label", search.placeholder);
  search.value = kept.get("search") || "";
  filters.append(search);

  function choice(field, any, values, words) {
    const select = make("select");
    select.setAttribute("aria-label", any);
    if (field !== "order") select.append(new Option(any, ""));
    for (const value of values) select.append(new Option(words(value), String(value)));
    if (kept.get(field) && values.map(String).includes(kept.get(field))) select.value = kept.get(field);
    select.addEventListener("change", refresh);
    if (values.length > 1) filters.append(select);
    return select;
  }
  const selects = {
    arm: choice("arm", "every arm", distinct("arm"), (name) => data.arms[name] || name),
    update: choice("update", "every update", distinct("update").sort((a, b) => a - b), (n) => "update " + n),
  };
  const order = choice("order", "order", Object.keys(orders), (name) => name);
  search.addEventListener("input", refresh);

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
  const saves = make("p", "These rows as ", "saves note");
  saves.append(
    page.saver("JSON lines", () => page.save("completions.jsonl", "application/x-ndjson",
      found.map((row) => JSON.stringify(row) + "\n").join(""))),
    page.saver("CSV", () => page.save("completions.csv", "text/csv", page.csv([data.columns, ...found.map((row) =>
      data.columns.map((name) => (name === "rewards" ? JSON.stringify(row.rewards) : row[name])))]))));
  box.append(filters, status, list, pages, saves);

  let at = 0, found = [], began = false;
  function refresh() {
    const wanted = search.value.toLowerCase();
    found = rows.filter((row) =>
      Object.entries(selects).every(([field, select]) => select.value === "" || String(row[field]) === select.value) &&
      (!wanted || [row.prompt, row.completion].some((text) => text.toLowerCase().includes(wanted))));
    found.sort(orders[order.value]);
    const rest = data.files < data.logged ? ", of " + data.files + " of " + data.logged + " logged updates" : "";
    status.textContent = found.length.toLocaleString("en") + " completions" + rest +
      ". The files in the run folder (ARM/completions) have all that were logged.";
    at = 0;
    draw();
    const values = Object.fromEntries(Object.entries(selects).map(([field, select]) => [field, select.value]));
    if (began) page.keep("completions", { search: search.value, ...values, order: order.value });
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

  const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);

  function entry(row) {
    const node = make("details", null, "row");
    const top = make("summary");
    const head = make("span");
    const sign = row.advantage > 0 ? "right" : row.advantage < 0 ? "wrong" : "";
    const chip = make("span", signed(row.advantage), "chip " + sign);
    chip.title = "advantage";
    head.append(chip);
    const several = Object.keys(data.arms).length > 1 ? " · " + (data.arms[row.arm] || row.arm) : "";
    const question = row.prompt.trim().split("\n").filter((line) => line.length > 3).pop() || row.prompt;
    top.append(head, make("span", "score " + row.score.toFixed(2)), make("span", "update " + row.update + several, "soft"),
      make("code", row.completion), make("code", question, "soft"),
      make("span", row.n_tokens + " tokens" + (row.truncated ? ", cut" : ""), row.truncated ? "wrong" : "soft"));
    node.append(top);
    node.addEventListener("toggle", () => {
      if (node.open && node.children.length === 1) node.append(body(row));
    });
    return node;
  }

  function body(row) {
    const terms = make("dl");
    const add = (name, value) => {
      const place = make("dd");
      place.append(value);
      terms.append(make("dt", name), place);
    };
    add("prompt", make("pre", row.prompt));
    add("completion", make("pre", row.completion));
    if (row.gold !== null) {
      add("right answer", make("code", row.gold));
      add("its answer", make("code", row.answer === null ? "none could be read" : row.answer));
    }
    const parts = Object.entries(row.rewards).map(([name, value]) => name + " " + +value.toFixed(4));
    add("rewards", parts.join(", ") || "no parts");
    add("score", row.score.toFixed(4) + ", advantage " + signed(row.advantage));
    add("divergence", row.kl.toFixed(3) + " nats from the reference");
    add("group", "prompt " + (row.group + 1) + " of update " + row.update + ", response " + (row.sample + 1));
    return terms;
  }

  refresh();
})();
