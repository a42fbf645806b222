// Applies the chosen theme before anything is painted; the only script that is not deferred.
"use strict";

try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("chat_server preferences"))?.theme ?? "";
} catch (error) { /* storage is off or damaged: the system's theme */ }
