"""Style and script of the report page."""

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1b1c1e;--soft:#5d6168;--line:#e4e4e1;--plain:#a3a7ae;--fast:#1f77b4;
--comp:#c9913a;--encoder:#1f77b4;--connector:#7b5ea7;--prefill:#2a9d8f;--decode:#e07a3f;--text:#b9bcc1;
--c0:#1f77b4;--c1:#e07a3f;--c2:#2a9d8f;--c3:#b5478c;--c4:#7b5ea7;--c5:#c9a227;--c6:#5a8f3c;--c7:#c0504d}
@media(prefers-color-scheme:dark){:root:not(.light){--bg:#141517;--card:#1c1e21;--ink:#eceded;--soft:#a0a4ab;--line:#2f3237;
--plain:#71767e;--fast:#58a6dd;--comp:#d9a650;--encoder:#58a6dd;--connector:#a68bd1;--prefill:#4cc0b1;--decode:#ee9560;--text:#62666d;
--c0:#58a6dd;--c1:#ee9560;--c2:#4cc0b1;--c3:#d873b4;--c4:#a68bd1;--c5:#dcbc4c;--c6:#86bd66;--c7:#de7a77}}
:root.dark{color-scheme:dark;--bg:#141517;--card:#1c1e21;--ink:#eceded;--soft:#a0a4ab;--line:#2f3237;
--plain:#71767e;--fast:#58a6dd;--comp:#d9a650;--encoder:#58a6dd;--connector:#a68bd1;--prefill:#4cc0b1;--decode:#ee9560;--text:#62666d;
--c0:#58a6dd;--c1:#ee9560;--c2:#4cc0b1;--c3:#d873b4;--c4:#a68bd1;--c5:#dcbc4c;--c6:#86bd66;--c7:#de7a77}
:root.light{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1060px;margin:0 auto;padding:44px 24px 72px}
header{position:relative}h1{font-size:clamp(26px,4vw,38px);line-height:1.15;margin:.1em 0 .3em;letter-spacing:-.015em}
h2{font-size:20px;margin:0 0 .5em;letter-spacing:-.005em}
.eyebrow{margin:0;color:var(--fast);font-weight:650;font-size:14px}.lead{font-size:18px;margin:.2em 0}
.note{color:var(--soft);border-left:3px solid var(--decode);padding:.1em 0 .1em .8em;margin:1em 0 0;max-width:78ch}
#theme{position:absolute;right:0;top:0;border:1px solid var(--line);background:var(--card);color:var(--ink);border-radius:8px;width:38px;height:38px;font-size:18px;cursor:pointer}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:24px 26px;margin-top:22px}
section p{max-width:82ch;margin:.2em 0 1em}.fine{color:var(--soft);font-size:13.5px;margin:1.1em 0 0!important}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px;background:none;border:0;padding:0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:18px 20px;display:flex;flex-direction:column}
.tile b{font-size:32px;line-height:1.15;font-variant-numeric:tabular-nums;letter-spacing:-.02em}.tile span{font-weight:550}.tile small{color:var(--soft);font-size:13.5px}
.legend{display:flex;flex-wrap:wrap;gap:6px 20px;color:var(--soft);font-size:14px;margin-bottom:12px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px}
.row{display:grid;grid-template-columns:130px 1fr;align-items:center;gap:14px;margin:8px 0}.row>span{font-weight:550}
.stack{display:flex;align-items:center;height:36px;padding-right:84px}.stack i{height:100%;min-width:1px;border-right:2px solid var(--card)}
.stack i:first-child{border-radius:6px 0 0 6px}.stack em{font-style:normal;font-weight:650;margin-left:10px;white-space:nowrap;width:0;font-variant-numeric:tabular-nums}
.s-encoder{background:var(--encoder)}.s-connector{background:var(--connector)}.s-prefill{background:var(--prefill)}.s-decode{background:var(--decode)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}th{text-align:left;font-weight:600}
thead th{color:var(--soft);font-size:13.5px;padding:4px 10px;text-align:right}thead tr:first-child th{text-align:center;color:var(--ink);border-bottom:1px solid var(--line)}
tbody tr+tr{border-top:1px solid var(--line)}td,tbody th{padding:9px 10px;vertical-align:top}tbody th small{display:block;font-weight:400;color:var(--soft);font-size:13px;max-width:30ch}
.num{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums;min-width:98px}.speed{font-weight:700;min-width:0}.same{color:var(--soft);font-size:14px}
.bar{display:block;height:5px;border-radius:3px;margin:5px 0 0 auto;min-width:2px}.b-eager{background:var(--plain)}.b-vkernels{background:var(--fast)}.b-compiled{background:var(--comp)}
.plain th{white-space:nowrap;width:170px}.plain thead th{text-align:left;padding-left:10px}.ids code{margin-right:2px}
code{font:13.5px/1.5 ui-monospace,"DejaVu Sans Mono",monospace;background:var(--bg);border:1px solid var(--line);border-radius:5px;padding:1px 5px}
.frames{display:grid;grid-template-columns:repeat(8,1fr);gap:10px}figure{margin:0}
.frames figure{border-radius:8px;overflow:hidden;border:1px solid var(--line);border-bottom:4px solid var(--clip);transition:opacity .15s}
.frames img{display:block;width:100%}.frames figcaption{display:flex;justify-content:space-between;padding:3px 7px;font-size:12.5px;font-variant-numeric:tabular-nums}
.frames span{color:var(--soft)}.frames.focus figure{opacity:.28}.frames.focus figure.on{opacity:1}
.patterns{display:grid;grid-template-columns:repeat(auto-fit,minmax(250px,1fr));gap:28px}.patterns figcaption{font-size:14px;color:var(--soft);margin-top:10px}
.patterns b{display:block;color:var(--ink);font-size:16px}svg{display:block;width:100%;background:var(--bg);border:1px solid var(--line);border-radius:6px}
svg path{stroke:var(--line);stroke-width:.07}rect.text{fill:var(--text)}rect.f0{fill:var(--c0)}rect.f1{fill:var(--c1)}rect.f2{fill:var(--c2)}rect.f3{fill:var(--c3)}
rect.f4{fill:var(--c4)}rect.f5{fill:var(--c5)}rect.f6{fill:var(--c6)}rect.f7{fill:var(--c7)}
#tip{position:fixed;pointer-events:none;background:var(--ink);color:var(--bg);border-radius:6px;padding:4px 9px;font-size:13px;opacity:0;transition:opacity .1s}
@media(max-width:900px){.frames{grid-template-columns:repeat(4,1fr)}}
@media(max-width:640px){main{padding:24px 14px}section{padding:18px 16px}.row{grid-template-columns:1fr;gap:2px}}
@media print{#theme{display:none}section,.tile{break-inside:avoid}}
"""

SCRIPT = """
const root=document.documentElement;
document.getElementById('theme').onclick=()=>{
  const dark=root.classList.contains('dark')||(!root.classList.contains('light')&&matchMedia('(prefers-color-scheme: dark)').matches);
  root.classList.toggle('dark',!dark);root.classList.toggle('light',dark)};
const tip=document.body.appendChild(Object.assign(document.createElement('div'),{id:'tip'}));
document.querySelectorAll('[data-tip]').forEach(e=>{
  e.onmousemove=m=>{tip.textContent=e.dataset.tip;tip.style.left=m.clientX+14+'px';tip.style.top=m.clientY+14+'px';tip.style.opacity=1};
  e.onmouseleave=()=>{tip.style.opacity=0}});
const strip=document.querySelector('.frames');
strip.querySelectorAll('figure').forEach(f=>{
  f.onmouseenter=()=>{strip.classList.add('focus');strip.querySelectorAll('figure').forEach(g=>g.classList.toggle('on',g.dataset.clip===f.dataset.clip))};
  f.onmouseleave=()=>strip.classList.remove('focus')});
"""
