(function () {
  const source = document.getElementById("thought-index");
  if (!source) return;
  const index = JSON.parse(source.textContent);
  const box = document.getElementById("viewer");
  const PER_PAGE = 25;
  const loaded = new Map();
  // As the address says, else the last step of the main arm.
  const kept = page.read("thoughts");
  const named = index.blocks.findIndex((b) => b.arm === kept.get("arm") && String(b.step) === kept.get("step"));
  const state = { block: named < 0 ? index.opens : named, query: (kept.get("search") || "").toLowerCase(),
    group: kept.get("class"), order: kept.get("order") || "file", paint: kept.get("colour") || "gain", page: 0 };
  let began = false;
  let block = null, found = [], pinned = null;

  const make = page.make;
  const signed = (v) => (Math.abs(v) < 0.005 ? "" : v < 0 ? "\u2212" : "+") + Math.abs(v).toFixed(2);
  const number = (v) => (v === null ? "\u2013" : (v < 0 ? "\u2212" : "") + Math.abs(v).toFixed(2));
  const share = (nll) => { const p = 100 * Math.exp(-nll); return p.toFixed(p < 10 || p > 99 ? 1 : 0) + "%"; };
  const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
  const visible = (word) => word.replaceAll("\n", "\u23ce").replaceAll("\t", "\u21e5");

  async function unpack(number) {
    if (loaded.has(number)) return loaded.get(number);
    const data = await page.unpack("thoughts-" + number);
    const words = (ids) => ids.map((id) => data.vocab[id]);
    data.texts = data.texts.map(([id, tokens, classes, base, passes], at) => {
      const text = { at, id, tokens: words(tokens), classes: words(classes), base };
      text.passes = passes.map(([said, nll, weight, reward]) => ({ said: said.map(words), nll, weight, reward }));
      text.gains = base.map((b, j) => {
        const nlls = text.passes.map((p) => p.nll[j]).filter((v) => v !== null);
        return b === null || !nlls.length ? null : b - mean(nlls);
      });
      text.sum = text.gains.reduce((a, g) => a + (g || 0), 0);
      text.low = text.tokens.join("").toLowerCase();
      return text;
    });
    loaded.set(number, data);
    return data;
  }

  // ------------------------------------------------------------------------------------------------- controls
  const bench = make("div", null, "bench");
  const choose = (label, options, change) => {
    const select = make("select");
    select.setAttribute("aria-label", label);
    options.forEach(([name, value]) => select.append(new Option(name, value)));
    select.addEventListener("change", () => change(select.value));
    bench.append(select);
    return select;
  };
  const arms = [...new Set(index.blocks.map((b) => b.arm))];
  const stepsOf = (arm) => index.blocks.map((b, i) => [b.step, i, b.arm]).filter((b) => b[2] === arm);
  let arm = index.blocks[state.block].arm;
  if (arms.length > 1) {
    choose("arm", arms.map((a) => ["arm: " + a, a]), (value) => {
      const step = index.blocks[state.block].step;
      arm = value;
      const near = stepsOf(arm).sort((a, b) => Math.abs(a[0] - step) - Math.abs(b[0] - step) || b[0] - a[0]);
      open(near[0][1]);
    }).value = arm;
  }
  const steprow = make("label", "step", "steprow");
  const slider = make("input");
  slider.type = "range";
  slider.min = 0;
  slider.setAttribute("aria-label", "step");
  const stepname = make("output");
  slider.addEventListener("input", () => open(stepsOf(arm)[slider.value][1]));
  steprow.append(slider, stepname);
  bench.append(steprow);
  choose("colour", [["colour: gain", "gain"], ["colour: mixing weight", "weight"]], (value) => {
    state.paint = value;
    refresh(true);
  }).value = state.paint;
  choose("order", [["order: as written", "file"], ["order: most helped", "up"], ["order: most hurt", "down"]],
    (value) => { state.order = value; refresh(); }).value = state.order;
  const search = make("input");
  search.type = "search";
  search.placeholder = "search texts and thoughts";
  search.setAttribute("aria-label", search.placeholder);
  search.value = state.query;
  search.addEventListener("input", () => { state.query = search.value.toLowerCase(); refresh(); });
  bench.append(search);
  const key = make("div", null, "key"), tally = make("div", null, "tally"), list = make("div", null, "texts");
  const peek = make("div", null, "peek");
  peek.hidden = true;
  peek.id = "peek";
  peek.setAttribute("role", "status");
  const pages = make("div", null, "pages"), ends = make("div", null, "ends");
  const back = make("button", "back"), forth = make("button", "more"), where = make("span", null, "soft");
  back.addEventListener("click", () => turn(-1));
  forth.addEventListener("click", () => turn(1));
  pages.append(back, where, forth);
  box.append(bench, key, tally, list, pages, ends);
  function turn(by) { state.page += by; draw(); list.scrollIntoView({ block: "nearest" }); }

  async function open(number) {
    state.block = number;
    const about = index.blocks[number], steps = stepsOf(arm);
    slider.max = steps.length - 1;
    slider.value = steps.findIndex((s) => s[1] === number);
    steprow.hidden = steps.length < 2;
    stepname.textContent = about.step.toLocaleString("en") + (about.step === 0 ? " (base)" : "");
    let data;
    try {
      data = await unpack(number);
    } catch (error) {
      list.replaceChildren(make("p", "This browser cannot unpack the thoughts: it needs DecompressionStream (2023 on).",
        "note"));
      return;
    }
    if (state.block !== number) return;  // another one was chosen meanwhile
    block = data;
    if (!block.classes.some(([name]) => name === state.group)) state.group = null;
    drawTally();
    drawEnds();
    refresh(true);
  }

  function drawTally() {
    const named = block.classes.filter(([name]) => name);
    tally.replaceChildren(...(named.length < 2 ? [] : named).map(([name, gain, count]) => {
      const button = make("button", name.replaceAll("_", " ") + " " + signed(gain));
      button.type = "button";
      button.title = "mean gain of " + count.toLocaleString("en") + " tokens, nats; press to dim the others";
      button.setAttribute("aria-pressed", String(state.group === name));
      button.addEventListener("click", () => {
        state.group = state.group === name ? null : name;
        drawTally();
        refresh(true);
      });
      return button;
    }));
  }

  // ---------------------------------------------------------------------------------------------------- texts
  const says = (text) => text.passes.some((p) => p.said.some((s) => s.join("").toLowerCase().includes(state.query)));
  const sumOf = (text) => state.group === null ? text.sum
    : text.gains.reduce((a, g, j) => a + (text.classes[j + 1] === state.group ? g || 0 : 0), 0);

  function refresh(stay) {
    const q = state.query;
    found = block.texts.filter((text) => !q || text.id.toLowerCase().includes(q) || text.low.includes(q) || says(text));
    if (state.order !== "file") {
      const sign = state.order === "up" ? -1 : 1;
      found.sort((a, b) => sign * (sumOf(a) - sumOf(b)) || a.at - b.at);
    }
    if (!stay) state.page = 0;
    draw();
    const { arm, step } = index.blocks[state.block];
    if (began) {
      page.keep("thoughts", { arm, step: String(step), class: state.group, search: state.query,
        order: state.order === "file" ? "" : state.order, colour: state.paint === "gain" ? "" : state.paint });
    }
    began = true;
  }

  function draw() {
    unpin();
    const last = Math.max(0, Math.ceil(found.length / PER_PAGE) - 1);
    state.page = Math.min(state.page, last);
    const shown = found.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
    list.replaceChildren(...shown.map(row), peek);
    list.style.setProperty("--id", Math.min(13, Math.max(...shown.map((text) => text.id.length), 2)) + "ch");
    list.classList.toggle("short", shown.length > 1 && shown.every((text) => text.low.length <= 24));
    if (!found.length) list.prepend(make("p", "Nothing found.", "text soft"));
    const about = index.blocks[state.block];
    const all = about.shown < about.total ? " (of " + about.total.toLocaleString("en") + " in the run folder)" : "";
    where.textContent = "page " + (state.page + 1) + " of " + (last + 1) + ", " + found.length.toLocaleString("en") +
      " texts" + all;
    back.disabled = state.page === 0;
    forth.disabled = state.page >= last;
    const bar = make("i", null, state.paint), range = state.paint === "gain" ? index.scale.toFixed(2) + " nats" : "1";
    const low = make("span", "\u2212" + range), line = make("span");
    line.append(low, bar, make("span", "+" + range));
    key.replaceChildren(line, make("span", state.paint === "gain"
      ? "blue: helped · orange, dotted: hurt" : "weight of the thought in the prediction"));
  }

  // Square root: gains of a tenth of the scale can be seen, too. At most 72%, so that the text stays readable.
  function heat(node, value, scale) {
    const strength = Math.min(1, Math.sqrt(Math.abs(value) / scale));
    if (strength < 0.12) return;
    node.classList.add(value > 0 ? "pos" : "neg");
    if (value < 0 && strength > 0.4) node.classList.add("bad");
    node.style.setProperty("--heat", Math.round(72 * strength) + "%");
  }

  function paint(node, text, j) {
    const weights = text.passes.map((p) => p.weight[j]).filter((w) => w !== null);
    const value = state.paint === "gain" ? text.gains[j] : weights.length ? mean(weights) : null;
    if (value !== null) heat(node, value, state.paint === "gain" ? index.scale : 1);
  }

  function row(text) {
    const node = make("div", null, "text");
    const line = make("p", null, "toks");
    let first = true;
    text.tokens.forEach((word, k) => {
      if (word === "" && (k === 0 || text.gains[k - 1] === null)) return;  // padding
      const token = make("span", word.replaceAll("\n", "\u23ce\n"), "tok");  // a mark, and the line ends
      const j = k - 1, known = j >= 0 && text.gains[j] !== null;
      if (known) {
        token.classList.add("on");
        token.dataset.text = text.at;
        token.dataset.entry = j;
        token.tabIndex = first ? 0 : -1;
        token.setAttribute("aria-describedby", "peek");
        first = false;
        paint(token, text, j);
      }
      if (state.group !== null && text.classes[k] !== state.group) token.classList.add("dim");
      line.append(token);
    });
    const sum = make("span", signed(sumOf(text)), "sum");
    sum.title = "gain of the whole text, nats";
    node.append(make("span", text.id, "id"), line, sum);
    return node;
  }

  // ----------------------------------------------------------------------------------------------------- peek
  function said(tokens) {
    const line = make("div", null, "said");
    line.append(make("span", "\u27e8", "edge"));
    tokens.forEach((word) => line.append(make("span", visible(word))));
    line.append(make("span", "\u27e9", "edge"));
    return line;
  }

  function fact(name, value, extra) {
    const span = make("span", name + " ");
    span.append(make("b", value));
    if (extra) span.append(extra);
    return span;
  }

  function tell(text, j) {
    const word = make("span", visible(text.tokens[j + 1]), "tok"), gain = text.gains[j];
    heat(word, gain, index.scale);
    const head = make("h4");
    const name = text.classes[j + 1];
    head.append(word, make("span", name.replaceAll("_", " "), "soft"), make("span", signed(gain) + " nats", "gain " +
      (gain > 0.005 ? "up" : gain < -0.005 ? "down" : "soft")));
    const nlls = text.passes.map((p) => p.nll[j]).filter((v) => v !== null);
    const line = make("p", "likelihood " + share(text.base[j]) + " without thoughts, " + share(mean(nlls)) + " with");
    const parts = [head, line];
    for (const p of text.passes) {
      if (p.nll[j] === null) continue;
      const part = make("div", null, "think"), facts = make("div", null, "facts");
      const meter = make("span", null, "meter"), fill = make("i");
      fill.style.width = 100 * Math.max(0, Math.min(1, p.weight[j] || 0)) + "%";
      meter.append(fill);
      facts.append(fact("weight", number(p.weight[j]), meter));
      if (p.reward[j] !== null) facts.append(fact("reward", signed(p.reward[j])));
      facts.append(fact("then", share(p.nll[j])));
      part.append(p.said[j].length ? said(p.said[j]) : make("div", "nothing was thought here", "soft"), facts);
      parts.push(part);
    }
    return parts;
  }

  function show(token) {
    const text = block.texts[token.dataset.text];
    peek.replaceChildren(...tell(text, Number(token.dataset.entry)));
    peek.hidden = false;
    const at = token.getBoundingClientRect(), frame = list.getBoundingClientRect();
    const most = Math.max(8, frame.width - peek.offsetWidth - 8);
    peek.style.left = Math.min(most, Math.max(8, at.left - frame.left - 24)) + "px";
    const below = at.bottom + peek.offsetHeight + 14 < window.innerHeight || at.top < peek.offsetHeight + 14;
    peek.style.top = (below ? at.bottom - frame.top + 8 : at.top - frame.top - peek.offsetHeight - 8) + "px";
  }

  function unpin() {
    if (pinned) pinned.classList.remove("open");
    pinned = null;
    peek.hidden = true;
  }

  function pin(token) {
    const same = pinned === token;
    unpin();
    if (same) return;
    pinned = token;
    token.classList.add("open");
    show(token);
  }

  const tokenOf = (event) => (event.target.closest ? event.target.closest(".texts .tok.on") : null);
  list.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    if (token && !pinned && event.pointerType === "mouse") show(token);
  });
  list.addEventListener("pointerout", (event) => {
    if (!pinned && event.pointerType === "mouse" && tokenOf(event)) peek.hidden = true;
  });
  list.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (token && token.matches(":focus-visible")) { unpin(); show(token); }
  });
  list.addEventListener("focusout", () => { if (!pinned) peek.hidden = true; });
  document.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token) pin(token);
    else if (!peek.contains(event.target) && !ends.contains(event.target)) unpin();
  });
  list.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    const row = [...token.closest(".toks").querySelectorAll(".tok.on")], at = row.indexOf(token);
    const rows = [...list.querySelectorAll(".toks")], line = rows.indexOf(token.closest(".toks"));
    const beside = (n) => rows[n] && rows[n].querySelectorAll(".tok.on")[at];
    const goal = { ArrowRight: row[at + 1], ArrowLeft: row[at - 1], Home: row[0], End: row[row.length - 1],
      ArrowDown: beside(line + 1), ArrowUp: beside(line - 1) }[event.key];
    if (goal) {
      event.preventDefault();
      token.tabIndex = -1;
      goal.tabIndex = 0;
      goal.focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      pin(token);
    }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") unpin(); });

  // ---------------------------------------------------------------------------------------- helped and hurt most
  function drawEnds() {
    const sides = [["Helped most", block.helped], ["Hurt most", block.hurt]];
    ends.replaceChildren(...sides.map(([title, entries]) => {
      const card = make("figure", null, "card"), rows = make("ol");
      card.append(make("figcaption", title));
      entries.forEach(([at, j]) => rows.append(end(block.texts[at], j)));
      card.append(entries.length ? rows : make("p", "No token by more than 0.005 nats.", "note"));
      return card;
    }));
  }

  function end(text, j) {
    const item = make("li"), button = make("button"), gain = text.gains[j];
    button.type = "button";
    const context = make("span", null, "where");
    const word = make("span", visible(text.tokens[j + 1]), "tok");
    heat(word, gain, index.scale);
    context.append(visible(text.tokens.slice(Math.max(0, j - 11), j + 1).join("")), word);
    button.append(make("b", signed(gain), gain > 0 ? "up" : "down"), context);
    const known = text.passes.filter((p) => p.nll[j] !== null);
    known.sort((a, b) => (gain > 0 ? 1 : -1) * (a.nll[j] - b.nll[j]));  // the thought that did it
    if (known.length) button.append(said(known[0].said[j]));
    button.addEventListener("click", () => jump(text, j));
    item.append(button);
    return item;
  }

  function jump(text, j) {
    if (!found.includes(text)) {
      state.query = search.value = "";
      refresh();
    }
    state.page = Math.floor(found.indexOf(text) / PER_PAGE);
    draw();
    const token = list.querySelector('.tok[data-text="' + text.at + '"][data-entry="' + j + '"]');
    token.scrollIntoView({ block: "center" });
    pin(token);
  }

  open(state.block);
})();
