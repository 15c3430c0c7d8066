"""How a run's page looks: one column on a phone, a grid of charts on a desktop; light or dark as the reader has it."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --card: #ffffff; --ink: #1c1c1a; --muted: #65645f; --rule: #e2e1dc; --warn: #8a4b00;
  --s1: #2a78d6; --s2: #eb6834; --s3: #1baf7a; --s4: #4a3aa7;
  --s5: #e34948; --s6: #b88200; --s7: #d45b93; --s8: #008300;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141413; --card: #1e1e1c; --ink: #ecebe6; --muted: #a3a29b; --rule: #34332f; --warn: #f0b35a;
    --s1: #4b95ee; --s2: #e0703f; --s3: #28ad80; --s4: #9d92ee;
    --s5: #ea7473; --s6: #cf9a1e; --s7: #dd6f9d; --s8: #3fa13f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 16px; overflow-wrap: anywhere; }
h1 { margin: 8px 0 4px; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 0 0 12px; font-size: 1.2rem; }
h3 { margin: 16px 0 6px; font-size: 1rem; }
p { margin: 6px 0; }
section, article {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px;
  margin: 14px 0;
}
article { padding: 4px 12px 12px; }
nav { display: flex; flex-wrap: wrap; gap: 6px 14px; margin: 12px 0; font-size: .9rem; }
a { color: var(--s1); text-decoration: none; }
a:hover { text-decoration: underline; }
.muted, small { color: var(--muted); font-size: .87rem; font-weight: normal; }
.warning { color: var(--warn); }
.badge { border-radius: 999px; padding: 1px 10px; font-size: .85rem; color: #fff; background: #6b6a65; }
.badge.finished { background: #1a7f4b; } .badge.running { background: #1f66bd; }
.badge.failed, .badge.dead { background: #b3312f; } .badge.stopped { background: #8a5a00; }
.progress { height: 8px; border-radius: 4px; background: var(--rule); margin: 10px 0; overflow: hidden; }
.progress div { height: 100%; background: var(--s1); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 14px 0; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 10px 12px; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .82rem; line-height: 1.3; display: block; }
figure { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 18px; }
.chart figcaption { font-weight: 600; font-size: .92rem; }
.chart svg { width: 100%; height: auto; display: block; }
.chart ul {
  list-style: none; margin: 2px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 14px;
  font-size: .82rem;
}
.chart li b { font-variant-numeric: tabular-nums; font-weight: 600; }
.chart text { fill: var(--muted); font-size: 10.5px; font-family: inherit; }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke: var(--line); stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: var(--line); opacity: .16; }
.line.dashed { stroke-dasharray: 5 4; }
circle { fill: var(--line); }
.key {
  display: inline-block; width: 14px; border-top: 3px solid var(--line); margin-right: 5px;
  vertical-align: middle;
}
.key.dashed { border-top-style: dashed; }
.chart.wide { margin: 10px 0 18px; }
.chart svg.bar { height: 18px; border-radius: 4px; margin: 4px 0; }
.picture { margin: 0 0 22px; }
.picture img {
  display: block; max-width: 100%; height: auto; border: 1px solid var(--rule); border-radius: 6px;
  margin: 6px 0; background: #fff;
}
.earlier { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(260px, 100%), 1fr)); gap: 12px; }
.earlier figcaption { color: var(--muted); font-size: .82rem; }
ol { margin: 6px 0; padding-left: 2.2em; columns: 260px; font-size: .88rem; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--s1); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: 4px 0; }
th, td {
  text-align: left; vertical-align: top; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--rule);
  font-weight: normal;
}
tbody th { color: var(--muted); min-width: 8em; }
thead th { font-weight: 600; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; min-width: 5em; }
pre { white-space: pre-wrap; font-size: .85rem; }
footer { color: var(--muted); font-size: .82rem; margin: 18px 0; }
@media (max-width: 560px) { main { padding: 10px; } section { padding: 12px; } h1 { font-size: 1.35rem; } }
@media print { details { display: block; } section { break-inside: avoid; } }
"""
