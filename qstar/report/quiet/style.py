"""Style of the thought viewer, inlined beside that of every report."""

VIEWER_STYLE = """
:root { --up: #1f77c9; --down: #d9660a; --ground: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --up: #3d8fe0; --down: #e07b1a; --ground: #1a1f28; } }
.tight th, .tight td { padding-left: .6rem; padding-right: .6rem; }
.up { color: var(--accent); } .down { color: var(--rationalised); }
.value small.up { color: var(--accent); font-weight: 600; } .value small.down { color: var(--rationalised);
  font-weight: 600; }
.bench { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: 1rem 0 .5rem; }
.bench input[type=search] { flex: 1 1 12rem; }
.steprow { display: flex; align-items: center; gap: .5rem; font-size: .9rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.steprow input { width: 8.5rem; padding: 0; accent-color: var(--accent); } .steprow output { min-width: 5.2em; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; font-size: .85rem;
  color: var(--soft); margin: .2rem 0 .8rem; }
.key i { display: inline-block; width: 11rem; height: .75rem; border-radius: 3px; vertical-align: -.08rem;
  margin: 0 .45rem; border: 1px solid var(--line); }
.key .gain { background: linear-gradient(90deg, var(--down), color-mix(in srgb, var(--down) 35%, var(--ground)) 30%,
  var(--ground) 50%, color-mix(in srgb, var(--up) 35%, var(--ground)) 70%, var(--up)); }
.key .weight { background: linear-gradient(90deg, var(--down), var(--ground) 50%, var(--up)); }
.tally { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 .8rem; }
.tally button { border-radius: 1em; padding: .12rem .75rem; font-size: .85rem; font-variant-numeric: tabular-nums; }
.tally button[aria-pressed=true] { border-color: var(--accent); color: var(--accent);
  box-shadow: inset 0 0 0 1px var(--accent); }
.texts { background: var(--card); border: 1px solid var(--line); border-radius: 10px; position: relative; }
.texts > .text:nth-last-child(2) { border-bottom-color: transparent; }
.texts.short { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
.texts.short .text { grid-template-columns: var(--id, 6.4rem) minmax(0, 1fr) auto; border-right: 1px solid var(--line);
  margin: 0 -1px -1px 0; }
.text { display: grid; grid-template-columns: var(--id, 6.4rem) minmax(0, 1fr) auto; gap: .2rem .9rem; padding: .5rem .9rem;
  border-bottom: 1px solid var(--line); align-items: baseline; content-visibility: auto;
  contain-intrinsic-size: auto 2.6rem; }
.text > .id, .text > .sum { font-size: .8rem; color: var(--soft); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.text > .id { overflow: hidden; text-overflow: ellipsis; } .text > .sum { text-align: right; }
.toks { margin: 0; line-height: 1.95; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .95rem;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.tok { border-radius: 3px; padding: .16em .07em; margin: 0 1px 0 0; cursor: default;
  border-bottom: 2px solid transparent; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.tok.on { cursor: pointer; }
.tok.pos { background: color-mix(in srgb, var(--up) var(--heat), transparent); }
.tok.neg { background: color-mix(in srgb, var(--down) var(--heat), transparent); }
.tok.bad { border-bottom-color: var(--down); border-bottom-style: dotted; }
.tok.dim { opacity: .35; } .tok.on:hover { box-shadow: 0 0 0 2px var(--soft); }
.tok:focus-visible, .tok.open { outline: none; box-shadow: 0 0 0 2px var(--ink); position: relative; }
.peek { position: absolute; z-index: 5; width: min(30rem, calc(100vw - 2rem)); background: var(--card);
  color: var(--ink); border: 1px solid var(--line); border-radius: 12px; padding: .8rem 1rem .9rem;
  box-shadow: 0 10px 34px rgb(0 0 0 / .22), 0 1px 3px rgb(0 0 0 / .14); font-size: .88rem; }
.peek[hidden] { display: none; }
.peek h4 { margin: 0 0 .15rem; font-size: .95rem; display: flex; gap: .6rem; align-items: baseline; }
.peek h4 .tok { font-family: ui-monospace, Menlo, Consolas, monospace; padding: .05em .4em; white-space: pre; }
.peek h4 .gain { margin-left: auto; font-variant-numeric: tabular-nums; }
.peek p { margin: 0 0 .5rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.think { border-top: 1px solid var(--line); padding: .5rem 0 .1rem; }
.said { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; line-height: 1.9;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.said span { background: color-mix(in srgb, var(--soft) 16%, transparent); border-radius: 4px; padding: .1em .32em;
  margin-right: 3px; } .said .edge { background: none; color: var(--soft); padding: 0 .1em; }
.facts { display: flex; flex-wrap: wrap; gap: 0 1.1rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.facts b { color: var(--ink); font-weight: 600; }
.meter { display: inline-block; width: 3.2rem; height: .42rem; border-radius: 3px; margin-left: .4rem;
  vertical-align: .08rem; background: color-mix(in srgb, var(--soft) 22%, transparent); overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--up); }
.ends { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); gap: 1rem;
  margin-top: 1.4rem; align-items: start; }
.ends .card { max-width: none; } .ends ol { list-style: none; margin: 0; padding: 0; }
.ends li button { display: grid; grid-template-columns: 4.2rem minmax(0, 1fr); gap: 0 .7rem; width: 100%;
  text-align: left; border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: .45rem .2rem;
  background: none; }
.ends li:first-child button { border-top: 0; }
.ends li button:hover { background: color-mix(in srgb, var(--accent) 8%, transparent); }
.ends b { font-variant-numeric: tabular-nums; } .ends .said, .ends .where { font-size: .84rem; }
.ends .where { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft);
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.ends .where .tok { color: var(--ink); padding: .05em .25em; font-weight: 600; }
.ends .said { grid-column: 2; }
@media (max-width: 760px) { .text { grid-template-columns: minmax(0, 1fr) auto; padding: .5rem .7rem; }
  .texts.short { display: block; } .texts.short .text { border-right: 0; margin: 0;
    grid-template-columns: minmax(0, 1fr) auto; }
  .toks { grid-column: 1 / -1; grid-row: 2; font-size: 1rem; line-height: 2.1; }
  .bench > * { flex: 1 1 44%; } .bench .steprow { flex: 1 1 100%; } .steprow input { flex: 1; }
  .key i { width: 7rem; }
  .peek { position: fixed; left: .5rem !important; right: .5rem; bottom: .5rem; top: auto !important; width: auto;
    max-height: 55vh; overflow-y: auto; } }
"""
