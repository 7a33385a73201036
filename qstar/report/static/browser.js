(function () {
  const PER_PAGE = 25;
  const make = page.make;
  const objects = (names, rows) => rows.map((values) => Object.fromEntries(names.map((name, i) => [name, values[i]])));
  const distinct = (rows, field) => [...new Set(rows.map((row) => row[field]))];
  const question = (prompt) => {
    const lines = prompt.trim().split("\n");
    return lines.filter((line) => line.length > 3).pop() || lines.pop();  // not a bare "A:"
  };

  // A searchable list of the rows in the script element `id`. `describe(data, rows)` says what it shows:
  //   section: its anchor, and the name of downloads; fields: name -> {any, values, say}, the filters; orders: name -> compare
  //   search: placeholder; texts(row): what is searched; status(found, fits, wanted): a sentence; columns: of downloads
  //   head(row): nodes of a line; terms(row): [name, content] pairs of an open one
  async function browse(box, id, describe) {
    let data;
    try {
      data = await page.unpack(id);
    } catch (error) {
      box.append("This browser cannot unpack the list: it needs DecompressionStream (2023 on).");
      return;
    }
    const rows = objects(data.columns, data.rows);
    const list = describe(data, rows);
    const kept = page.read(list.section);
    const filters = make("div", null, "filters");
    const search = make("input");
    search.type = "search";
    search.placeholder = list.search;
    search.setAttribute("aria-label", search.placeholder);
    search.value = kept.get("search") || "";
    search.addEventListener("input", refresh);
    filters.append(search);

    const chosen = {};  // field -> a function: the value that its filter lets through, undefined for all
    const fields = { ...list.fields };
    if (list.orders) fields.order = { values: Object.keys(list.orders), say: (name) => name };
    for (const [field, { any, values, say }] of Object.entries(fields)) {
      if (values.length < 2) continue;
      const select = make("select");
      select.setAttribute("aria-label", any || field);
      if (any) select.append(new Option(any, ""));
      values.forEach((value, i) => select.append(new Option(say(value), String(i))));
      select.value = [...values.keys()].find((i) => String(values[i]) === kept.get(field)) ?? (any ? "" : 0);
      chosen[field] = () => (select.value === "" ? undefined : values[Number(select.value)]);
      select.addEventListener("change", refresh);
      filters.append(select);
    }

    const status = make("p", null, "note");
    status.setAttribute("aria-live", "polite");
    const lines = make("div");
    const pages = make("div", null, "pages");
    const back = make("button", "Previous");
    const forth = make("button", "Next");
    const where = make("span", "", "soft");
    back.addEventListener("click", () => { at -= 1; draw(); });
    forth.addEventListener("click", () => { at += 1; draw(); });
    pages.append(back, where, forth);

    // What the filters let through, with the words of the run folder's files.
    const saves = make("p", "These rows as ", "saves note");
    const saved = () => found.map((row) => Object.fromEntries(list.columns.map((name) => [name, row[name]])));
    const cell = (value) => (value !== null && typeof value === "object" ? JSON.stringify(value) : value);
    saves.append(
      page.saver("JSON lines", () => page.save(list.section + ".jsonl", "application/x-ndjson",
        saved().map((row) => JSON.stringify(row) + "\n").join(""))),
      page.saver("CSV", () => page.save(list.section + ".csv", "text/csv",
        page.csv([list.columns, ...saved().map((row) => Object.values(row).map(cell))]))));
    box.append(filters, status, lines, pages, saves);

    const fits = (row) => Object.entries(chosen).every(
      ([field, value]) => field === "order" || value() === undefined || value() === row[field]);
    let at = 0, found = [], began = false;
    function refresh() {
      const wanted = search.value.toLowerCase();
      found = rows.filter((row) => fits(row) &&
        (!wanted || list.texts(row).some((text) => String(text).toLowerCase().includes(wanted))));
      if (list.orders) found.sort(list.orders[chosen.order()]);
      status.textContent = list.status(found, fits, wanted);
      at = 0;
      draw();
      const values = Object.entries(chosen).map(([field, value]) => [field, value() === undefined ? "" : String(value())]);
      if (began) page.keep(list.section, { search: search.value, ...Object.fromEntries(values) });
      began = true;
    }

    function draw() {
      const last = Math.max(0, Math.ceil(found.length / PER_PAGE) - 1);
      lines.replaceChildren(...found.slice(at * PER_PAGE, (at + 1) * PER_PAGE).map(line));
      where.textContent = "page " + (at + 1) + " of " + (last + 1);
      back.disabled = at === 0;
      forth.disabled = at >= last;
      pages.hidden = last === 0;
    }

    function line(row) {
      const node = make("details", null, "row");
      const top = make("summary");
      top.append(...list.head(row));
      node.append(top);
      node.addEventListener("toggle", () => {
        if (!node.open || node.children.length > 1) return;
        const terms = make("dl");
        for (const [name, content] of list.terms(row)) {
          const place = make("dd");
          place.append(content);
          terms.append(make("dt", name), place);
        }
        node.append(terms);
      });
      return node;
    }

    refresh();
  }

  const chip = (text, kind, title) => {
    const holder = make("span");
    holder.append(make("span", text, "chip " + kind));
    if (title) holder.firstChild.title = title;
    return holder;
  };
  const number = (n) => n.toLocaleString("en");
  const readAnswer = (row) => make("code", row.answer === null ? "none could be read" : row.answer);

  function rationales(data, rows) {
    const kinds = objects([...data.filters, "count"], data.counts);
    const words = {  // what a filter shows for values that are no words
      loop: (v) => (v === 0 ? "base" : data.unit + " " + v),
      hinted: (v) => (v ? "with the hint" : "without the hint"),
      valid: (v) => (v === null ? "not checked" : v ? "every step right" : "a wrong step"),
      group: (v) => data.groups[v] || v || "no group",
      arm: (v) => data.arms[v] || v,
      reason: (v) => v.replaceAll("_", " ") || "no reason",
      verdict: String,
    };
    const any = { arm: "every arm", loop: "every " + data.unit, verdict: "every verdict", reason: "every reason",
      hinted: "hinted or not", group: "every group", valid: "checked or not" };
    const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a) < String(b) ? -1 : 1);
    const fields = Object.fromEntries(data.filters.map((field) =>
      [field, { any: any[field], values: distinct(kinds, field).sort(order), say: words[field] }]));
    if (fields.arm.values.length < 2) document.getElementById("browser").classList.add("one-arm");

    function status(found, fits, wanted) {
      const all = kinds.filter(fits).reduce((sum, kind) => sum + kind.count, 0);
      let rest = found.length < all
        ? ": a fixed sample that holds every kind of rejection; the files in the run folder have all." : ".";
      if (wanted) rest = " that the filters let through (the search looks only at those that this page holds).";
      return "Showing " + number(found.length) + " of " + number(all) + " attempts" + rest;
    }

    function head(row) {
      const said = row.answer === null ? "no answer" : "answers " + row.answer;
      const valid = row.valid === null ? "" : row.valid ? "steps right" : "steps wrong";
      const arm = make("span", words.arm(row.arm), "soft arm");
      arm.title = arm.textContent;
      return [chip(row.verdict || "no verdict", row.verdict), arm, make("span", words.loop(row.loop), "soft"),
        make("code", question(row.prompt)), make("code", row.completion),
        make("span", said, row.answer === row.gold ? "" : "wrong"),
        make("span", valid, row.valid === false ? "wrong" : "soft")];
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

    const terms = (row) => [
      ["prompt", marked(row.prompt, row.hint)],
      ["completion", make("pre", row.completion)],
      ["right answer", make("code", row.gold)],
      ["its answer", readAnswer(row)],
      ["verdict", row.verdict + (row.reason ? ": " + words.reason(row.reason) : "") +
        (row.hinted ? " (shown the answer as a hint)" : "")],
      ...(row.valid === null ? [] : [["steps", row.valid ? "every line is exactly right" : "at least one line is wrong"]]),
      ["problem", row.id + (row.group ? " (" + words.group(row.group) + ")" : "") +
        (row.truncated ? ", cut off at the length limit" : "")],
    ];
    const columns = [...data.filters, "id", "prompt", "completion", "gold", "answer", "truncated"];
    const texts = (row) => [row.prompt, row.completion, row.answer, row.gold, row.id];
    return { section: "rationales", search: "search prompts, rationales, answers", fields, columns, texts, status, head, terms };
  }

  function completions(data, rows) {
    const armName = (name) => data.arms[name] || name;
    const fields = {
      arm: { any: "every arm", values: distinct(rows, "arm"), say: armName },
      update: { any: "every update", values: distinct(rows, "update").sort((a, b) => a - b), say: (n) => "update " + n },
    };
    const orders = {
      "highest advantage first": (a, b) => b.advantage - a.advantage,
      "lowest advantage first": (a, b) => a.advantage - b.advantage,
      "highest score first": (a, b) => b.score - a.score,
      "lowest score first": (a, b) => a.score - b.score,
      "by group": (a, b) => a.update - b.update || a.group - b.group || a.sample - b.sample,
    };
    const several = Object.keys(data.arms).length > 1;
    const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);
    const part = data.files < data.logged ? ", of " + data.files + " of " + data.logged + " logged updates" : "";
    const head = (row) => [
      chip(signed(row.advantage), row.advantage > 0 ? "right" : row.advantage < 0 ? "wrong" : "", "advantage"),
      make("span", "score " + row.score.toFixed(2)),
      make("span", "update " + row.update + (several ? " · " + armName(row.arm) : ""), "soft"),
      make("code", row.completion),
      make("code", question(row.prompt), "soft"),
      make("span", row.n_tokens + " tokens" + (row.truncated ? ", cut" : ""), row.truncated ? "wrong" : "soft"),
    ];
    const terms = (row) => [
      ["prompt", make("pre", row.prompt)],
      ["completion", make("pre", row.completion)],
      ...(row.gold === null ? [] : [["right answer", make("code", row.gold)], ["its answer", readAnswer(row)]]),
      ["rewards", Object.entries(row.rewards).map(([name, value]) => name + " " + +value.toFixed(4)).join(", ") || "no parts"],
      ["score", row.score.toFixed(4) + ", advantage " + signed(row.advantage)],
      ["divergence", row.kl.toFixed(3) + " nats from the reference"],
      ["group", "prompt " + (row.group + 1) + " of update " + row.update + ", response " + (row.sample + 1)],
    ];
    return { section: "completions", search: "search prompts and completions", fields, orders, columns: data.columns, head, terms,
      texts: (row) => [row.prompt, row.completion],
      status: (found) => number(found.length) + " completions" + part +
        ". The files in the run folder (ARM/completions) have all that were logged." };
  }

  for (const [box, id, describe] of [["browser", "rationale-data", rationales],
    ["completion-list", "completion-data", completions]]) {
    if (document.getElementById(id)) browse(document.getElementById(box), id, describe);
  }
})();
