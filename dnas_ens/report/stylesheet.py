"""How the page looks: one column, the reader's own font, light or dark as the reader's system is, and on paper."""

STYLESHEET = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1f2933; --muted: #52606d; --line: #9aa5b1; --grid: #e4e7eb; --panel: #f2f4f6;
  --blue: #0072b2; --vermilion: #d55e00; --green: #009e73; --purple: #b8579a; --orange: #e69f00; --sky: #56b4e9;
  --gap: 2.5rem;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --ink: #e3e7eb; --muted: #a0abb6; --line: #66727e; --grid: #29313a; --panel: #1d242c;
    --blue: #58aee6; --vermilion: #f18f55; --green: #3fc49a; --purple: #d991c4; --orange: #efb945; --sky: #93d3f6;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, system-ui, sans-serif;
  font-kerning: normal; overflow-wrap: break-word;
}
.page { max-width: 62rem; margin: 0 auto; padding: 0 1.5rem 4rem; }
p, .note, li { max-width: 41rem; margin: 0 0 1rem; text-wrap: pretty; }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: .2em; }
a:hover { text-decoration-color: currentColor; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 3px; border-radius: 2px; }
small, .note, figcaption, .subject, nav { color: var(--muted); }

header { padding-top: clamp(2rem, 7vw, 4.5rem); }
.subject { margin: 0 0 1.25rem; font-size: .9375rem; }
h1 {
  margin: 0 0 1.5rem; max-width: 22em; font-size: clamp(1.625rem, 1.1rem + 2.3vw, 2.5rem);
  line-height: 1.2; font-weight: 600; letter-spacing: -.018em; text-wrap: balance;
}
.lead p { font-size: 1.125rem; max-width: 40rem; margin-bottom: .75rem; }
.key {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1.5rem var(--gap);
  margin: 2.5rem 0 0; padding: 1.5rem 0; border: solid var(--grid); border-width: 1px 0;
}
.key div { display: flex; flex-direction: column; }
.key dt { font-size: .875rem; color: var(--muted); }
.key dd { margin: 0; }
.key .value {
  font-size: 1.875rem; line-height: 1.3; font-weight: 600; letter-spacing: -.015em; font-variant-numeric: tabular-nums;
}
.key .remark { font-size: .875rem; line-height: 1.4; color: var(--muted); }
nav { margin-top: 1.5rem; font-size: .9375rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .35rem 1.5rem; margin: 0; padding: 0; list-style: none; }
nav li { margin: 0; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }

section { margin-top: 4.5rem; }
h2 {
  margin: 0 0 1rem; font-size: 1.5rem; line-height: 1.25; font-weight: 600; letter-spacing: -.012em;
  scroll-margin-top: 1.5rem; text-wrap: balance;
}
h3 { margin: 2.5rem 0 .5rem; font-size: 1.0625rem; line-height: 1.35; font-weight: 600; }
.note { margin-top: 1rem; font-size: .9375rem; line-height: 1.55; }

.table { overflow-x: auto; margin: 1.5rem 0 0; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; line-height: 1.35; }
th, td { padding: .5rem .75rem; text-align: right; vertical-align: top; font-variant-numeric: tabular-nums; }
tbody th { font-weight: 400; text-align: left; padding-left: 0; min-width: 9.5rem; }
tr > :first-child { position: sticky; left: 0; background: var(--paper); }
thead th, thead td {
  font-size: .87em; font-weight: 400; color: var(--muted);
  vertical-align: bottom; border-bottom: 1px solid var(--line);
}
tbody tr + tr > * { border-top: 1px solid var(--grid); }
tbody tr.best > *, tbody tr.member + tr.ensemble > * { border-top: 1px solid var(--line); }
tr.ensemble > * { font-weight: 600; }
td small { display: block; font-size: .86em; font-weight: 400; white-space: nowrap; }
.glyph { display: inline-block; vertical-align: middle; overflow: visible; }
.glyph line { stroke: var(--line); stroke-width: 2; }
.glyph circle { fill: var(--muted); }
tr.ensemble .glyph line, tr.ensemble .glyph circle { stroke: var(--blue); }
tr.ensemble .glyph circle { fill: var(--blue); }
.scale { display: flex; justify-content: space-between; width: 8rem; margin-left: auto; }
.numbered { display: grid; grid-template-columns: 1.9em 1fr; }
.numbered > span { color: var(--muted); font-weight: 400; }

.pictures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  gap: 2.5rem var(--gap); margin-top: 2rem; align-items: start;
}
figure { margin: 0; min-width: 0; }
figure.wide, figure.cells { grid-column: 1 / -1; }
.drawing { overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; font-family: inherit; fill: var(--ink); }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: inherit; font-variant-numeric: tabular-nums; }
figcaption { margin-top: .75rem; max-width: 41rem; font-size: .9375rem; line-height: 1.5; }
figcaption strong { color: var(--ink); font-weight: 600; }
@media screen and (min-width: 56rem) { /* a panel alone has its caption beside it */
  .pictures.single { grid-template-columns: 1fr; }
  .single figure.panel { display: grid; grid-template-columns: 1fr 1fr; gap: var(--gap); align-items: center; }
}

.facts { margin: 0 0 1.5rem; font-size: .9375rem; }
.facts div {
  display: grid; grid-template-columns: 7rem 1fr; gap: 1rem; padding: .5rem 0; border-top: 1px solid var(--grid);
}
.facts dt { color: var(--muted); }
.facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
pre {
  margin: 0; padding: 1rem 1.25rem; overflow-x: auto; background: var(--panel); border-radius: 6px;
  font: .8125rem/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}

@media (min-width: 80rem) { /* two drawings of cells side by side, a little wider than the column */
  .pictures.of-cells { grid-template-columns: 1fr 1fr; width: 76rem; margin-left: -8.5rem; }
  .of-cells figure.cells { grid-column: auto; }
}
@media (max-width: 40rem) {
  .page { padding: 0 1.125rem 3rem; }
  section { margin-top: 3.5rem; }
  .key { grid-template-columns: 1fr 1fr; gap: 1.25rem 1.5rem; }
  .key .value { font-size: 1.5rem; }
  figure.cells svg { min-width: 38rem; }
  figure.wide svg { min-width: 34rem; }
  .facts div { grid-template-columns: 1fr; gap: 0; }
  tbody th { min-width: 7.5rem; max-width: 11rem; padding-right: .5rem; }
  .numbered { min-width: 10rem; }
  th, td { padding: .5rem .5rem; }
}
@media print {
  @page { margin: 16mm 15mm; }
  :root { --paper: #fff; }
  body { font-size: 10pt; background: none; }
  .page { max-width: none; padding: 0; }
  header { padding-top: 0; }
  h1 { font-size: 20pt; }
  .lead p { font-size: 11pt; }
  .key { grid-template-columns: repeat(4, 1fr); gap: 1rem; }
  .key .value { font-size: 16pt; }
  nav { display: none; }
  section { margin-top: 2.25rem; }
  h2, h3, thead { break-after: avoid; }
  h2 { font-size: 14pt; }
  section > p:not(.note) { break-after: avoid; break-inside: avoid; }
  figure, tr, .key, .facts div { break-inside: avoid; }
  p, .note, figcaption { orphans: 3; widows: 3; }
  .table, .drawing, pre { overflow: visible; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; background: none; padding: 0; font-size: 7.5pt; }
  table, .note, figcaption, .facts { font-size: 8.5pt; }
  th, td { padding: .25rem .35rem; }
  tr > :first-child { position: static; }
  .pictures { grid-template-columns: 1fr 1fr; gap: 1.5rem; }
  .pictures.of-cells { grid-template-columns: 1fr 1fr; width: auto; margin-left: 0; }
  .of-cells figure.cells { grid-column: auto; }
  figure.wide { max-width: 15cm; }
}
"""
