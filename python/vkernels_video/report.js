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
