"""How the report looks, light and dark, on a phone and on a desk."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1b1f26; --soft: #5a6472;
  --rule: #dde1e7; --key: #1f5fa8; --value: #b8530f; --good: #1a7f4b; --bad: #b3261e; --warn: #fff6e0;
  --warn-rule: #d9a400; --s0: #7b8491; --s1: #b8530f; --s2: #8a6a00; --s3: #17806d; --s4: #8b4bb3;
  --s5: #b5306f; --s6: #1f5fa8; --s7: #4d7c0f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --card: #1d2128; --ink: #e8ebf0; --soft: #a3adba; --rule: #353c47;
    --key: #6cacf0; --value: #f0985a; --good: #5fcf95; --bad: #ff8a80; --warn: #2d2714;
    --warn-rule: #c79a1c; --s0: #98a1ae; --s1: #f0985a; --s2: #d8b73c; --s3: #4ec3ad; --s4: #c795ec;
    --s5: #f07fb4; --s6: #6cacf0; --s7: #a3d65c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 16px 56px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 52px 0 6px; }
p { margin: 8px 0; max-width: 46rem; }
.soft, figcaption, .small { color: var(--soft); }
.lead { font-size: 1.2rem; line-height: 1.45; margin: 18px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 20px 0; padding: 0; list-style: none; }
.tiles li { background: var(--card); border-radius: 10px; padding: 12px; border: 1px solid transparent; }
.tiles .decided { border-color: var(--key); }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.3; }
.tiles span { display: block; color: var(--soft); font-size: .95rem; }
.warning { background: var(--warn); border-left: 4px solid var(--warn-rule); border-radius: 4px;
  padding: 10px 14px; margin: 12px 0; max-width: 46rem; }
.warning ul { margin: 4px 0; padding-left: 20px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); 
  gap: 28px 36px;
  margin: 18px 0 6px; }
figure { margin: 0; max-width: 560px; min-width: 0; }
figcaption b { display: block; color: var(--ink); font-size: 1.02rem; }
figcaption { font-size: .95rem; line-height: 1.45; margin-bottom: 8px; }
svg.chart { display: block; width: 100%; height: auto; }
svg text { font-size: 13px; fill: var(--ink); }
svg .fine { font-size: 11px; }
svg .axis { fill: var(--soft); }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; } svg .over { fill: var(--paper); }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.base { stroke: var(--soft); stroke-width: 1; fill: none; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.mark { fill: var(--c); stroke: var(--paper); stroke-width: 1; }
.error { stroke: var(--c); stroke-width: 1.5; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.s4 { --c: var(--s4); } .s5 { --c: var(--s5); } .s6 { --c: var(--s6); } .s7 { --c: var(--s7); }
.steps .s0 .line { stroke-dasharray: 5 4; }
.bold .line { stroke-width: 3.6; }
.cell { fill: var(--side); shape-rendering: crispEdges; }
.key { --side: var(--key); } .value { --side: var(--value); }
.key .line, .value .line, .key .mark, .value .mark { --c: var(--side); }
.key .s1, .value .s1 { opacity: .85; } .key .s2, .value .s2 { opacity: .72; }
.key .s3, .value .s3 { opacity: .6; } .key .s4, .value .s4 { opacity: .5; }
.outline { fill: none; stroke: var(--ink); stroke-width: 1.6; }
.block { fill: var(--card); stroke: var(--rule); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none; padding: 0; margin: 10px 0 4px; }
.legend li { display: flex; align-items: center; gap: 8px; font-size: .95rem; }
svg.swatch { width: 28px; height: 14px; flex: none; }
.told { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr));
  gap: 10px 28px; }
.told li { align-items: flex-start; } .told svg { margin-top: 5px; }
.told small { display: block; color: var(--soft); font-size: .88rem; line-height: 1.4; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; margin: 16px 0;
  border: 1px solid var(--rule); border-radius: 8px; }
.scroll:focus-visible, summary:focus-visible { outline: 3px solid var(--key); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; padding: 10px 0; font-weight: 600; }
caption span { position: sticky; left: 0; display: inline-block; padding: 0 14px;
  max-width: calc(100vw - 36px); }
tr > :first-child { position: sticky; left: 0; background: var(--paper); }
th, td { padding: 8px 14px; text-align: left; vertical-align: top; border-top: 1px solid var(--rule);
  line-height: 1.4; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; vertical-align: bottom; }
tbody th { font-weight: 600; max-width: min(20rem, 45vw); overflow-wrap: break-word; }
td { white-space: nowrap; } td small { white-space: normal; }
td small, th small { display: block; font-weight: 400; color: var(--soft); font-size: .88rem; }
td small.good { color: var(--good); } td small.bad { color: var(--bad); }
small.chosen { font-weight: 600; color: var(--good); }
details { margin: 14px 0; } summary { cursor: pointer; padding: 6px 0; font-weight: 600; }
ul.plain { padding-left: 20px; max-width: 46rem; } ul.plain li { margin: 4px 0; }
dl { display: grid; grid-template-columns: fit-content(16rem) 1fr; gap: 6px 18px; margin: 14px 0;
  max-width: 46rem; line-height: 1.45; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); }
@media (max-width: 600px) {
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 10px; }
  th, td { padding: 8px 10px; } thead th { white-space: normal; }
  svg text, svg .fine { font-size: 15px; }
}
"""
