// Keys of the review page. A verdict is sent by its button, together with the pair that is shown just then.
(() => {
  const press = id => document.getElementById(id)?.click();
  const keys = {
    a: () => press("accept"), r: () => press("reject"), u: () => press("unsure"),
    ArrowLeft: () => press("back"), ArrowRight: () => press("forward"), n: () => press("unseen"),
    s: () => document.querySelectorAll(".pair .veil").forEach(toggleVeil),
    k: () => { hideDifference(); document.body.classList.toggle("keep-shown"); },
    d: toggleDifference,
    e: () => document.querySelector("#reason textarea, #reason input")?.focus(),
  };

  function toggleVeil(veil) {
    hideDifference();
    veil.classList.toggle("open");
  }

  function hideDifference() {
    document.querySelectorAll(".pair .difference").forEach(image => image.remove());
    document.querySelectorAll(".pair .differs").forEach(frame => frame.classList.remove("differs"));
  }

  // the edited image with the original laid over it: what is equal turns black. Only of images that are shown
  function toggleDifference() {
    const [original, edited] = document.querySelectorAll(".pair .frame");
    const isVeiled = !document.body.classList.contains("keep-shown") && document.querySelector(".pair .veil:not(.open)");
    if (document.querySelector(".pair .difference")) return hideDifference();
    const image = original?.querySelector("img")?.cloneNode();
    if (isVeiled || !image || !edited.querySelector("img")) return;
    image.className = "difference";
    edited.classList.add("differs");
    edited.append(image);
  }

  document.addEventListener("keydown", event => {
    const isWriting = event.target.closest?.("input, textarea, select, [contenteditable]");
    if (isWriting) {
      if (event.key === "Escape" || event.key === "Enter") { event.preventDefault(); event.target.blur(); }
      return;
    }
    // a key that is held down must not judge pairs that nobody has looked at, be it on a button
    if (event.repeat && event.target.closest?.("button")) event.preventDefault();
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act) { event.preventDefault(); act(); }
  });
  document.addEventListener("click", event => {
    const veil = event.target.closest(".pair .veil");
    if (veil) toggleVeil(veil);
  });
})();
