"use strict";
// Compares two pictures that lie on each other: the right-hand part of the upper one is clipped away.
const stage = document.getElementById("stage");
if (stage) {
  const viewport = stage.parentElement;
  const before = document.getElementById("before");
  const divider = document.getElementById("divider");
  const split = document.getElementById("split");
  const zoom = document.getElementById("zoom");
  const width = Number(stage.dataset.width);
  const height = Number(stage.dataset.height);

  const setSplit = (percent) => {
    const share = Math.min(100, Math.max(0, percent));
    before.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
    divider.style.left = `${share}%`;
    split.value = share;
  };
  const setZoom = (value) => {
    const across = (viewport.scrollLeft + viewport.clientWidth / 2) / stage.clientWidth;
    const down = (viewport.scrollTop + viewport.clientHeight / 2) / stage.clientHeight;
    const fit = Math.min(viewport.clientWidth / width, (0.78 * window.innerHeight) / height);
    const factor = value === "fit" ? fit : Number(value);
    stage.style.width = `${factor * width}px`;
    stage.classList.toggle("pixels", value !== "fit" && factor > 1);
    viewport.scrollLeft = across * stage.clientWidth - viewport.clientWidth / 2;
    viewport.scrollTop = down * stage.clientHeight - viewport.clientHeight / 2;
  };
  const follow = (event) => {
    const box = stage.getBoundingClientRect();
    setSplit((100 * (event.clientX - box.left)) / box.width);
  };

  split.addEventListener("input", () => setSplit(Number(split.value)));
  zoom.addEventListener("change", () => setZoom(zoom.value));
  stage.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    stage.setPointerCapture(event.pointerId);
    follow(event);
  });
  stage.addEventListener("pointermove", (event) => {
    if (stage.hasPointerCapture(event.pointerId)) follow(event);
  });
  window.addEventListener("resize", () => setZoom(zoom.value));
  setZoom("fit");
  setSplit(50);
}
