"use strict";
// What all pages share. Every text of a model enters a page through textContent: it cannot become markup.
const page = {
  make(name, text, className) {
    const node = document.createElement(name);
    if (text !== undefined && text !== null) node.textContent = text;
    if (className) node.className = className;
    return node;
  },

  // Filters are kept in the address, behind the anchor of their section: #rationales?arm=star&loop=2
  read(section) {
    const [anchor, query] = location.hash.slice(1).split("?");
    return new URLSearchParams(anchor === section ? query : "");
  },
  keep(section, values) {
    const kept = new URLSearchParams(Object.entries(values).filter((pair) => pair[1]));
    try {
      history.replaceState(history.state, "", "#" + section + (String(kept) && "?" + kept));
    } catch (error) { /* an embedded page has no address of its own */ }
  },

  // What render.packed wrote into the script element `id`.
  async unpack(id) {
    const packed = atob(document.getElementById(id).textContent);
    const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  },

  csv(rows) {
    // A leading = + - @ would be a formula to a spreadsheet, and models write such texts: a quote keeps it text.
    const cell = (value) => {
      const text = value === null || value === undefined ? "" : String(value);
      const safe = typeof value === "string" && /^[=+@\-\t\r]/.test(text) && isNaN(text) ? "'" + text : text;
      return '"' + safe.replaceAll('"', '""') + '"';
    };
    return rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
  },
  save(name, type, text) {
    const link = page.make("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    document.body.append(link);
    link.click();
    link.remove();
  },
  saver(label, action) {
    const button = page.make("button", label);
    button.type = "button";
    button.addEventListener("click", action);
    return button;
  },
};

(function () {
  const anchor = location.hash.slice(1).split("?")[0];
  const before = history.state && history.state.reloaded ? history.state : null;
  if (location.hash.includes("?") && !before) {
    const section = document.getElementById(anchor);
    if (section) section.scrollIntoView();
  }

  // ---------------------------------------------------------------------------------- page of a run that goes on
  // It reloads itself; the history entry keeps the place and what is open, the address the filters.
  const parts = () => [...document.querySelectorAll("main > section > details")];
  if (before) {
    history.replaceState(null, "");
    history.scrollRestoration = "manual";
    parts().forEach((part, i) => { part.open = before.open.includes(i); });
    // Once scripts have drawn their lists, which change the height of what is above.
    let tries = 20;
    setTimeout(function back() {
      const same = document.documentElement.scrollHeight === before.height;
      if (same || (tries -= 1) < 0) window.scrollTo({ top: before.y, behavior: "instant" });
      else setTimeout(back, 20);
    });
  }
  const seconds = Number(document.body.dataset.refresh || 0);
  if (seconds) {
    let paused = false;
    const pause = page.saver("", () => { paused = !paused; say(); });
    const say = () => { pause.textContent = paused ? "Reloading paused" : "Reloads every " + seconds + " s"; };
    say();
    document.querySelector("h1").append(" ", pause);
    setInterval(() => {
      // Not under a reader's hands: in a field, with text selected, or with a line of a list open.
      const busy = document.activeElement.matches("input, select") || String(getSelection()) ||
        document.querySelector("details.row[open]") || document.hidden;
      if (paused || busy) return;
      const open = [...parts().keys()].filter((i) => parts()[i].open);
      try {
        history.replaceState({ reloaded: true, y: scrollY, height: document.documentElement.scrollHeight, open }, "");
      } catch (error) { /* an embedded page reloads at its top */ }
      location.reload();
    }, seconds * 1000);
  }

  // ---------------------------------------------------------------------------------------------------- theme
  const themes = { "": "auto", light: "light", dark: "dark" };
  let theme = "";
  try { theme = localStorage.getItem("qstar-theme") || ""; } catch (error) { /* private windows */ }
  const button = page.make("button", null, "theme");
  button.type = "button";
  function paint() {
    document.documentElement.style.colorScheme = theme;
    button.textContent = "Theme: " + themes[theme];
  }
  if (!(theme in themes)) theme = "";
  button.addEventListener("click", () => {
    const names = Object.keys(themes);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    try { localStorage.setItem("qstar-theme", theme); } catch (error) { /* it lasts as long as the page */ }
    paint();
  });
  paint();
  document.querySelector("header").append(button);

  // --------------------------------------------------------------------------------------------------- tables
  for (const input of document.querySelectorAll("input[data-filters]")) {
    const rows = document.querySelectorAll("#" + input.dataset.filters + " tbody tr");
    const section = input.closest("section").id;
    const filter = () => {
      const wanted = input.value.toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    };
    input.value = page.read(section).get("search") || "";
    if (input.value) {
      input.closest("details").open = true;
      filter();
    }
    input.addEventListener("input", () => { filter(); page.keep(section, { search: input.value }); });
  }
  const wide = new ResizeObserver((seen) => seen.forEach(({ target }) =>
    target.classList.toggle("wide", target.scrollWidth > target.clientWidth + 1)));
  for (const box of document.querySelectorAll(".scroll")) {
    const rows = () => [...box.querySelectorAll("tr")].map((row) => [...row.cells].map((cell) => cell.innerText.trim()));
    // Named by what the table stands under.
    const title = box.closest("details, section, header").querySelector("summary, h2");
    const name = (title ? title.textContent : document.title).trim().replace(/[^\p{L}\p{N}]+/gu, "_") + ".csv";
    const tools = page.make("p", null, "tools");
    tools.append(page.make("span", "the table scrolls sideways →", "wide"),
      page.saver("Download CSV", () => page.save(name, "text/csv", page.csv(rows()))));
    box.after(tools);
    wide.observe(box);
  }
})();
