// Sets what the first paint depends on: the theme and whether the chats are shown. The only script that is not deferred.
"use strict";

{
  let stored = null;
  try { stored = JSON.parse(localStorage.getItem("chat_server preferences")); } catch (error) { /* storage is off or damaged: the defaults */ }
  document.documentElement.dataset.theme = stored?.theme ?? "";
  document.documentElement.classList.toggle("with-chats", stored?.sidebar !== false && !matchMedia("(max-width: 860px)").matches);
}
