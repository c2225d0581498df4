// Sets the chosen colours before the page is painted; app.js has the switch.
"use strict";
{
  const chosen = localStorage.getItem("evomerge-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
