// One tooltip for all tokens: shown on hover and on focus, closed by Escape, kept while the pointer is on it.
const tooltip = {
  box: byId('tooltip'),
  owner: null,
  timer: 0,

  show(owner, content) {
    clearTimeout(this.timer);
    this.owner?.removeAttribute('aria-describedby');
    this.owner = owner;
    owner.setAttribute('aria-describedby', 'tooltip');
    this.box.replaceChildren(...content);
    this.box.hidden = false;
    this.place();
  },

  hide() {
    clearTimeout(this.timer);
    this.box.hidden = true;
    this.owner?.removeAttribute('aria-describedby');
    this.owner = null;
  },

  hideSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.hide(), 120);
  },

  place() {
    if (!this.owner) return;
    const target = this.owner.getBoundingClientRect();
    const box = this.box.getBoundingClientRect();
    const room = document.documentElement.clientWidth - box.width - 8;
    const above = target.top - box.height - 8;
    this.box.style.left = `${Math.max(8, Math.min(room, target.left + target.width / 2 - box.width / 2))}px`;
    this.box.style.top = `${above > 8 ? above : target.bottom + 8}px`;
  },
};
tooltip.box.addEventListener('pointerenter', () => clearTimeout(tooltip.timer));
tooltip.box.addEventListener('pointerleave', () => tooltip.hideSoon());
document.addEventListener('keydown', (event) => { if (event.key === 'Escape') tooltip.hide(); });
addEventListener('scroll', () => tooltip.place(), { passive: true, capture: true });
