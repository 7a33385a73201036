(function () {
  const data = JSON.parse(document.getElementById("comparison").textContent);
  const at = (id) => document.getElementById(id);
  const STORE = "qstar-compare-" + data.page;
  let votes = {}, now = 0, since = Date.now();
  try { votes = JSON.parse(localStorage.getItem(STORE)) || {}; } catch (error) { votes = {}; }  // private windows
  while (now < data.items.length - 1 && votes[data.items[now].item]) now += 1;

  function draw() {
    const item = data.items[now], vote = votes[item.item];
    at("prompt").textContent = item.prompt;
    for (const side of ["left", "right"]) at("text-" + side).textContent = item[side];
    for (const choice of ["left", "right", "equal"]) {
      at(choice).classList.toggle("chosen", Boolean(vote) && vote.choice === choice);
      at(choice).setAttribute("aria-pressed", String(Boolean(vote) && vote.choice === choice));
    }
    const done = Object.keys(votes).length;
    at("progress").textContent = "Question " + (now + 1) + " of " + data.items.length + ", " + done + " answered" +
      (done === data.items.length ? ". All done: download your votes." : "");
    at("back").disabled = now === 0;
    at("download").disabled = done === 0;
    since = Date.now();
  }

  function choose(choice) {
    const item = data.items[now].item;
    votes[item] = { page: data.page, item: item, choice: choice, seconds: (Date.now() - since) / 1000 };
    try { localStorage.setItem(STORE, JSON.stringify(votes)); } catch (error) { /* they stay in this tab */ }
    if (now < data.items.length - 1) now += 1;
    draw();
  }

  function back() {
    if (now > 0) now -= 1;
    draw();
  }

  function lines() {
    const rater = at("rater").value.trim();
    return Object.keys(votes).sort().map((item) => JSON.stringify({ ...votes[item], rater: rater }) + "\n").join("");
  }

  const download = () => page.save("votes.jsonl", "application/x-ndjson", lines());

  for (const choice of ["left", "right", "equal"]) at(choice).addEventListener("click", () => choose(choice));
  at("back").addEventListener("click", back);
  at("download").addEventListener("click", download);
  document.addEventListener("keydown", (event) => {
    if (event.target === at("rater") || event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "equal" };
    if (keys[event.key]) choose(keys[event.key]);
    else if (event.key === "ArrowUp") back();
    else return;
    event.preventDefault();
  });
  window.qstarVotes = lines;  // what the download holds
  draw();
})();
