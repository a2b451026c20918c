"""How the page of an evaluation looks: light and dark, wide and narrow."""

CSS = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #fff; --text: #1d1f21;
  --soft: #6b7075; --line: #e3e4e6; --bad: #c22f2f; --look: #9a6700;
  --good: #1a7f37; --bar: #3c78d0; --off: #f0f1f2; --mark: #ffd9d6;
  --grey: #a9aeb4; --second: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --page: #16181a; --card: #1e2124;
  --text: #e4e6e8; --soft: #9aa0a6; --line: #33373b; --bad: #ff7b72;
  --look: #e3b341; --good: #56d364; --bar: #6ba1ea; --off: #292d31;
  --mark: #6b2723; --grey: #666c73; --second: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; line-height: 1.2; margin: 0 0 8px;
  overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 10px; }
p { margin: 0 0 8px; overflow-wrap: anywhere; }
.verdict { font-size: 17px; }
.soft { color: var(--soft); }
.bad { color: var(--bad); } .look { color: var(--look); }
.good { color: var(--good); }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; }
.box { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; overflow: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap;
  vertical-align: top; font-weight: 400; }
thead th { color: var(--soft); font-size: 13px; }
th:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); }
tbody th:first-child { white-space: normal; overflow-wrap: anywhere;
  min-width: 110px; max-width: 260px; }
tbody th, tbody td { border-top: 1px solid var(--line); }
tbody th.kind { color: var(--soft); font-size: 13px; padding-top: 12px; }
td.fact { text-align: left; white-space: normal; width: 100%;
  overflow-wrap: anywhere; }
td small { display: block; color: var(--soft); font-size: 12px; }
tr.chosen { font-weight: 600; } tr.out > * { color: var(--soft); }
.figure { padding: 14px 14px 8px; }
.figure svg { display: block; width: 100%; max-width: 760px; min-width: 460px;
  height: auto; margin: 0 auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .named { paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .path { fill: none; stroke: var(--bar); opacity: .45; }
svg .bar { stroke: var(--bar); stroke-width: 1.5; }
svg .point { fill: var(--bar); } svg .label { fill: var(--text); }
svg .alpha .path { stroke: var(--second); stroke-dasharray: 4 3; }
svg .alpha .bar { stroke: var(--second); }
svg .alpha .point { fill: var(--card); stroke: var(--second);
  stroke-width: 1.8; }
svg .out .bar { stroke: var(--grey); } svg .out .point { fill: var(--grey); }
svg .ring { fill: none; stroke: var(--good); stroke-width: 2.2; }
svg .bound { stroke: var(--bad); stroke-dasharray: 5 4; }
svg .over { fill: var(--off); opacity: .6; }
svg .said { fill: var(--bad); }
.legend { font-size: 13px; color: var(--soft); margin: 8px 0; }
ol.pairs { margin: 0; padding: 8px 14px; list-style: none; font-size: 14px; }
ol.pairs li { display: grid; grid-template-columns: 40px minmax(0, 1fr);
  padding: 2px 0; overflow-wrap: anywhere; }
ol.pairs li.soft { display: block; }
details { margin: 10px 0 0; }
summary { color: var(--soft); cursor: pointer; }
.heat { max-height: 80vh; margin-top: 8px; }
.heat table { width: auto; font-size: 11px; }
.heat th, .heat td { padding: 1px 4px; border: 0; text-align: center;
  min-width: 20px; height: 19px; line-height: 17px; vertical-align: middle; }
.heat tbody th:first-child { text-align: right; white-space: nowrap;
  max-width: none; z-index: 1; }
.heat thead th { position: sticky; top: 0; background: var(--card);
  vertical-align: bottom; font-size: 11px; }
.heat thead th:first-child { z-index: 2; }
.heat thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
.heat tr:hover > * { box-shadow: inset 0 -1px var(--soft); }
.heat .r1 { background: rgba(26, 127, 55, .15); }
.heat .r2 { background: rgba(26, 127, 55, .3); }
.heat .r3 { background: rgba(26, 127, 55, .45); }
.heat .r4 { background: rgba(26, 127, 55, .6); }
.heat .w1 { background: rgba(207, 60, 50, .2); }
.heat .w2 { background: rgba(207, 60, 50, .36); }
.heat .w3 { background: rgba(207, 60, 50, .52); }
.heat .w4 { background: rgba(207, 60, 50, .7); }
input.pick { position: absolute; opacity: 0; pointer-events: none; }
.chips { display: flex; flex-wrap: wrap; gap: 6px 8px; margin: 0 0 12px; }
.chips label { border: 1px solid var(--line); border-radius: 14px;
  background: var(--card); padding: 2px 11px; font-size: 13px; cursor: pointer;
  overflow-wrap: anywhere; }
.note { display: none; }
.row { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 8px 14px; margin: 0 0 8px; }
.row > summary { overflow-wrap: anywhere; font-size: 13px; }
.row[open] .peek { display: none; }
.row dl { display: grid; margin: 6px 0 4px; gap: 4px 10px;
  grid-template-columns: 62px minmax(0, 1fr); }
.row dt { padding-top: 2px; } .row dd { font-size: 13px; min-width: 0; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.6 ui-monospace, 'DejaVu Sans Mono', monospace; }
mark { color: inherit; background: var(--mark); border-radius: 2px;
  box-shadow: 0 2px var(--bad); padding: 1px 0; }
mark.gap { padding: 1px 2px; margin: 0 1px; }
.more { color: var(--soft); font-style: italic; }
@media (max-width: 560px) { main { padding: 20px 12px 40px; }
  th, td { padding: 6px 8px; }
  tbody th:first-child { max-width: 130px; }
  .heat tbody th:first-child { max-width: 120px; overflow: hidden;
    text-overflow: ellipsis; }
  .row { padding: 8px 10px; }
  .row dl { grid-template-columns: minmax(0, 1fr); gap: 1px; } }
"""
