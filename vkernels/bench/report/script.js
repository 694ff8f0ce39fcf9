'use strict';
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const root = document.documentElement;

document.getElementById('theme').onclick = () => {
  const system = !root.classList.contains('light') && matchMedia('(prefers-color-scheme: dark)').matches;
  const dark = root.classList.contains('dark') || system;
  root.classList.toggle('dark', !dark);
  root.classList.toggle('light', dark);
};

const tip = document.body.appendChild(Object.assign(document.createElement('div'), {id: 'tip'}));
const say = (text, x, y) => {
  tip.textContent = text;
  tip.classList.add('on');
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 8)) + 'px';
  tip.style.top = (y + 14 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 14) + 'px';
};
const hush = () => tip.classList.remove('on');
all('[data-tip]').forEach(mark => {
  mark.onmousemove = event => say(mark.dataset.tip, event.clientX, event.clientY);
  mark.onmouseleave = mark.onblur = hush;
  mark.onfocus = () => {
    const box = mark.getBoundingClientRect();
    say(mark.dataset.tip, box.right - 8, box.bottom - 8);
  };
});
addEventListener('keydown', event => event.key === 'Escape' && hush());

const front = (key, on) => {
  const chart = key.closest('svg');
  chart.classList.toggle('focus', on);
  all('[data-series]', chart).forEach(mark => mark.classList.toggle('on', on && mark.dataset.series === key.dataset.key));
};
all('.key').forEach(key => {
  const held = () => key.closest('svg').querySelector('.key.on');
  const rest = () => held() ? front(held(), true) : front(key, false);
  const hold = () => {
    const was = held();
    if (was) was.classList.remove('on');
    if (was !== key) key.classList.add('on');
    rest();
  };
  key.onmouseenter = () => front(key, true);
  key.onmouseleave = rest;
  key.onclick = hold;
  key.onkeydown = event => {
    if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); hold(); }
  };
});

const table = document.getElementById('table');
if (table) {
  const body = table.tBodies[0], lines = [...body.rows], heads = all('thead th', table);
  const search = document.getElementById('search'), count = document.getElementById('count'), choices = all('.filters select');
  const number = cell => 'v' in cell.dataset ? Number(cell.dataset.v) : null;

  const sort = column => {
    const down = heads[column].getAttribute('aria-sort') === 'ascending';
    const numeric = heads[column].classList.contains('num');
    const order = (a, b) => {
      const x = a.cells[column], y = b.cells[column];
      if (!numeric) return (down ? -1 : 1) * x.textContent.localeCompare(y.textContent, 'en', {numeric: true});
      const p = number(x), q = number(y);
      if (p === null || q === null) return (p === null) - (q === null);  // what was not measured stays last
      return down ? q - p : p - q;
    };
    heads.forEach((head, i) => head.setAttribute('aria-sort', i !== column ? 'none' : down ? 'descending' : 'ascending'));
    body.append(...lines.sort(order));
  };
  heads.forEach((head, i) => { head.firstElementChild.onclick = () => sort(i); });

  const sift = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    lines.forEach(line => {
      const text = line.textContent.toLowerCase();
      line.hidden = !words.every(word => text.includes(word)) ||
        !choices.every(choice => !choice.value || line.dataset[choice.dataset.key] === choice.value);
      shown += !line.hidden;
    });
    count.textContent = shown === lines.length ? `${shown} rows` : `${shown} of ${lines.length} rows`;
  };
  search.oninput = sift;
  choices.forEach(choice => { choice.onchange = sift; });
}

let folded = [];
addEventListener('beforeprint', () => { folded = all('details:not([open])'); folded.forEach(each => { each.open = true; }); });
addEventListener('afterprint', () => folded.forEach(each => { each.open = false; }));
