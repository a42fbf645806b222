// Every word of the page, in one table. A translation is another such file.
"use strict";

const number = value => new Intl.NumberFormat(undefined, {maximumFractionDigits: 1}).format(value);
const plural = (count, one, many) => `${number(count)} ${count === 1 ? one : many}`;

const TEXT = {
  // accessible names: other programs use them to drive the page
  message: "Message", send: "Send", stop: "Stop", newChat: "New chat", settings: "Settings", regenerate: "Regenerate", edit: "Edit",
  copy: "Copy", copyCode: "Copy code", export: "Export", import: "Import", server: "Server", conversation: "Conversation",
  you: "You", assistant: "Assistant", chats: "Chats", searchChats: "Search chats", rename: "Rename", delete: "Delete",
  goOn: "Continue", answerNow: "Answer now", previousAnswer: "Previous answer", nextAnswer: "Next answer", thinking: "Thinking", theme: "Theme",
  thisChat: "This chat (JSON)", allChats: "All chats (JSON)", asMarkdown: "Markdown", asPage: "HTML page",
  previousVersion: "Previous version", nextVersion: "Next version",

  // header, list of chats
  model: "Model", modelStates: {unloaded: "", loading: "loading", ready: "loaded", failed: "failed"},
  modelIs: ({id, state, bytes, loading, now}, base) => [id, now ? `now ${now}` : id === base ? "" : `adapter of ${base}`, `${TEXT.modelStates[state] ?? state}${loading ? ` ${Math.floor(100 * loading)}\u00a0%` : ""}`, bytes ? TEXT.bytes(bytes) : ""].filter(Boolean).join(" · "),
  bytes: count => count < 1e9 ? `${number(Math.round(count / 1e6))} MB` : `${number(count / 1e9)} GB`,
  chat: "Chat", menu: "Menu", showChats: "Show or hide chats", untitled: "Untitled chat", title: "Title", pin: "Pin", more: "More",
  pinned: "Pinned", today: "Today", yesterday: "Yesterday", lastWeek: "Previous 7 days", lastMonth: "Previous 30 days",
  noChats: "Your chats will appear here.", nothingFound: "No chat has all of these words.",
  found: count => plural(count, "chat found", "chats found"),
  deleteAll: "Delete all chats", deleteAllTitle: count => `Delete ${count === 1 ? "the only chat" : `all ${number(count)} chats`}?`,
  deleteAllHint: "They are only in this browser. Export keeps a copy.", keepThem: "Keep them",
  deletedChats: count => `Deleted ${plural(count, "chat", "chats")}.`, deleted: title => `Deleted “${title}”.`, deletedMessages: count => `Deleted ${plural(count, "message", "messages")}.`,
  undo: "Undo", dismiss: "Dismiss", deletedElsewhere: "This chat was deleted in another tab.",
  themes: {"": "System", light: "Light", dark: "Dark"}, themeIs: theme => `Theme: ${theme}`, shortcuts: "Keyboard shortcuts",

  // empty page
  welcome: "What would you like to know?", welcomeText: "How should the text begin?",
  device: name => name === "cpu" ? "the CPU" : name === "cuda" || name === "mps" ? "the GPU" : name.replace(/^cuda:/, "GPU "),
  running: (devices, context) => `Running${devices.length ? ` on ${devices.join(", ")}` : ""}${context ? ` with ${number(context)} tokens of context` : ""}.`,
  completes: "This model was not made to chat: it continues the text that you type, which grows in place.",
  onlyEmbeds: name => `${name} makes embeddings of texts, and no answers.`,
  statuses: {draining: "the server is stopping", unavailable: "no worker of the server runs"}, loadingLabel: "Loading", starting: "starting",
  loading: (stage, fraction) => `The model is not ready: ${TEXT.statuses[stage] ?? stage}${fraction ? ` ${Math.round(fraction * 100)}\u00a0%` : ""}.`,
  demonstration: code => ["This is a very small demonstration model, which is often wrong. Give the server another with ",
    code("python chat_server.py MODEL"), ": a .gguf file, a Hugging Face model's folder or name, or a nanochat checkpoint."],
  examples: ["What is the capital of Japan?", "Explain why the sky is blue to a ten-year-old",
    "Give three tips for a good night's sleep", "Show me a Python function that reverses a string"],

  // composer
  messageHint: "Ask anything", textHint: "Text to continue", attach: "Attach text files", latest: "Jump to latest", removeFile: name => `Remove ${name}`,
  characters: count => plural(count, "character", "characters"), pasted: count => `Pasted text${count ? ` ${count + 1}` : ""}.txt`,
  fileTooLarge: (name, bytes) => `${name} is larger than ${number(bytes / 1024)} KB.`, notText: name => `${name} is not a text file.`,
  stopFirst: "An answer is being written: stop it first.", notReady: "The model is not ready yet.",
  encodings: {"windows-1252": ", read as Latin-1", "utf-16le": ", read as UTF-16", "utf-16be": ", read as UTF-16"},
  used: (used, draft, context, about) => `${about ? "about " : ""}${number(used)}${draft ? ` + ${number(draft)}` : ""} of ${number(context)} tokens`,
  tooLong: (tokens, context, files) => `This message has ${number(tokens)} tokens, and the model takes ${number(context)} for question and answer together. Shorten it${files ? " or remove a file" : ""}.`,
  willDrop: "The context is full: the oldest messages will be left out.",
  full: "The context is full: this server may refuse the next message.",
  trouble: {missing: "This browser stores nothing for this page: chats last until it is closed. Export keeps them.",
    full: "This browser's storage is full: new chats last until the page is closed. Export keeps it; deleting chats makes room."},

  // turns
  copied: "Copied", copyMarkdown: "Copy as Markdown", branch: "Branch into a new chat", deleteMessage: "Delete from here on",
  editedText: "Edited text", cancel: "Cancel", update: "Update", save: "Save", edited: "edited",
  wrap: "Wrap lines", downloadCode: "Download code", codeIn: language => `Code${language ? ` in ${language}` : ""}`, enterKey: "Enter the key", tryAgain: "Try again",
  pleaseContinue: "Please continue.",

  // looking inside an answer
  lens: "Token lens", again: "Run again", prompt: "Prompt", tokensOf: "Tokens of the answer", tokenId: id => `token ${id}`,
  share: share => `${share >= 0.0995 ? (100 * share).toFixed(0) : share >= 0.00095 ? (100 * share).toFixed(1) : "< 0.1"}\u00a0%`,
  notDrawn: "not drawn by the model", goOnWith: (text, share) => `Go on with ${text}, ${share}`,
  looking: count => `Making the answer again to see its probabilities: ${plural(count, "token", "tokens")}`,
  lensHint: "Choose a token to see what else stood there; one of these begins another answer.",
  runningAgain: count => `Running again: ${plural(count, "token", "tokens")}`, sameAgain: count => `Run again: the same ${plural(count, "token", "tokens")}.`,
  differsAt: ({at, was, is}) => `Run again, it differs${at ? ` from token ${number(at)} on: ${is ? `“${is}”` : "its end"} instead of ${was ? `“${was}”` : "its end"}` : ""}.`,
  otherWeights: "The model has other weights now.", noPrompt: "The server does not say what the prompt is.", template: "Template",
  roles: {system: "System", user: "You", assistant: "Assistant", tool: "Result"},
  promptFacts: ({tokens, context, cached, dropped}) => [`${plural(tokens, "token", "tokens")}${context ? ` of ${number(context)}` : ""}`,
    ...(cached ? [`the first ${number(cached)} (grey) were cached`] : []),
    ...(dropped ? [`${plural(dropped, "oldest message", "oldest messages")} left out`] : [])].join("; ") + ".",

  // compare
  compare: "Compare", compareHint: "The same question, answered at the same time. What differs from the first answer is marked where it begins.", addColumn: "Add a column",
  removeColumn: "Remove the column", goOnWithThis: "Go on with this", step: "Step", adapter: "Adapter", column: place => `Answer ${place}`,
  differsFrom: ({position, probabilities: [theirs, its] = []}) => `differs from token ${number(position + 1)} on (${[theirs, its].map(share => typeof share === "number" ? TEXT.share(share) : "its end").join(" / ")})`,

  // the server at a glance
  serverStatus: "Server status", backToChat: "Back to the chat", noStatus: "The server does not say how it is.", milliseconds: ms => ms < 999.5 ? `${ms < 9.95 ? ms.toFixed(1) : Math.round(ms)} ms` : TEXT.seconds(ms / 1000),
  status: {throughput: "Tokens per second", firstToken: "First token (median / 95 %)", interToken: "Between tokens (median / 95 %)", requests: "Running / waiting",
    pages: "KV pages in use", memory: "Memory", workers: "Workers ready", restarts: "Restarts of workers", delayed: "Answers delayed by a worker's end"}, bitsOf: run => `Bits per byte of ${run}, by step`,
  statusAbout: ({model, uptime_s: seconds = 0, workers = []}) => [model, [...new Set(workers.map(({device}) => TEXT.device(device)))].join(", "),
    seconds ? `up for ${seconds < 5400 ? plural(Math.round(seconds / 60), "minute", "minutes") : plural(Math.round(seconds / 3600), "hour", "hours")}` : ""].filter(Boolean).join(" · "),
  columns: {model: "Model", state: "State", bytes: "In memory", bits: "Bits per byte", worker: "Worker", device: "Device", running: "Running", restarts: "Restarts"},

  // what is happening
  connecting: "Connecting…", noServer: home => `No server at ${home} answers; still trying.`,
  serverLost: home => `The server at ${home} no longer answers; still trying.`,
  refusesPage: (home, origin) => `The server at ${home} runs, but does not allow this page. Start it with --cors-origin ${origin}.`,
  sentThen: "Your message will then be sent.", lost: "The connection is lost; trying again…",
  endedIn: title => `The answer in “${title}” is finished.`, endedBadly: title => `The answer in “${title}” failed.`, show: "Show", endedMark: "✓ ",
  waiting: "Waiting for the answer", answering: "Answering", answerFinished: "Answer finished", answerStopped: "Answer stopped",
  waitingForFirst: "Waiting for the first token…", queued: place => `In the queue, place ${place}`,
  loadingModel: (name, share) => `Loading ${name}${share ? `, ${Math.floor(100 * share)}\u00a0%` : "…"}`,
  reading: share => `Reading the prompt, ${Math.floor(100 * share)}\u00a0%`, thinkingNow: "Thinking", writing: "Writing",
  resumed: "Resumed", inOtherTab: "Another tab receives this answer…",
  speed: speed => `${speed.toFixed(1)} tok/s`, aboutSpeed: speed => `about ${speed.toFixed(1)} tok/s`,
  firstToken: ms => `first token after ${ms < 999.5 ? `${Math.round(ms)} ms` : TEXT.seconds(ms / 1000)}`, tokens: count => plural(count, "token", "tokens"),
  seconds: seconds => `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`, worker: gpu => `worker ${gpu}`,
  nothing: "The model answered nothing.", thoughtNothing: "The model thought about it, but answered nothing.",
  onlyThoughts: "The model was still thinking when it reached the length limit.",
  nothingBefore: note => `The answer was ${note} before its first word.`,
  cut: "cut at the length limit", dropped: count => `without the ${plural(count, "oldest message", "oldest messages")}, which no longer fit`,
  notes: {stopped: "stopped", interrupted: "interrupted"},
  details: ({prompt_tokens: prompt, cached_tokens: cached, queue_ms: queued, ttft_ms: first}) => [
    `Prompt of ${plural(prompt, "token", "tokens")}${cached === undefined ? "" : `, ${plural(cached, "token", "tokens")} remembered`}`,
    ...(queued === undefined ? [] : [`queued for ${Math.round(queued)} ms`]),
    ...(first === undefined ? [] : [`first token after ${Math.round(first)} ms`])].join("; ") + ".",

  // errors
  noAnswer: (home, origin) => `No answer from ${home}: is the server running` + (origin ? `, and does it allow this page (--cors-origin ${origin})?` : "?"),
  refused: "The server refused", retryIn: seconds => `, try again in ${seconds} s`, gaveUp: "The server gave up",
  connectionLost: "The connection to the server was lost.", connectionBroke: why => `The connection broke: ${why}.`,
  endedEarly: "The connection ended before the answer did.",

  // commands
  help: commands => `${commands.join(" · ")}. Without a value: the server's default. //… sends a text that begins with a slash.`,
  aNumber: "N", aText: "TEXT", commandList: "Commands",
  commands: {system: "what the model is told first", clear: "begin a new chat", help: "list the commands", seed: "the same seed draws the same answer",
    temperature: "how freely to choose words", topk: "choose among so many tokens", topp: "choose among the likeliest tokens of this share",
    minp: "leave out tokens less likely than this share of the likeliest", repetition: "divide the odds of what was already written",
    presence: "lower the odds of what occurs in the answer", frequency: "the same for each time it occurs", effort: "how much to think", budget: "most tokens to think",
    maxtokens: "longest answer"},
  badChoice: (name, text, choices) => `/${name} takes ${choices.slice(0, -1).join(", ")} or ${choices.at(-1)}, not “${text}”.`,
  noCommand: name => `There is no command /${name}. /help lists them; // sends a text that begins with a slash.`,
  badParameter: (name, text, min, max) => `/${name} takes a number from ${min} to ${max}, not “${text}”.`,
  parameterIs: (name, text) => text !== undefined ? `${name} is now ${text}.` : `${name} is the server's default again.`,
  systemIs: text => `The system prompt is now “${text}”.`, systemIsEmpty: "The system prompt is now empty.",

  // import
  notJson: name => `${name} is not a conversation: it is not valid JSON.`,
  notAChat: name => `${name} is not a conversation: it must be JSON with "conversations", or with a list "messages" of {role, content}.`,
  badMessage: (name, chat, i) => `${name} is not a conversation: message ${i + 1} of chat ${chat + 1} lacks a role or a text.`,
  sameIds: name => `${name} is not a conversation: two messages have the same id.`,
  messages: count => plural(count, "message", "messages"), importTitle: name => `Import ${name}?`, leaveIt: "Leave it",
  brings: (chats, messages) => `It brings ${plural(chats, "chat", "chats")} with ${plural(messages, "message", "messages")}.`,
  replace: what => `Replace the one that is here (${what})`,
  imported: (chats, messages, name) => `Imported ${plural(chats, "chat", "chats")} with ${plural(messages, "message", "messages")} from ${name}.`,
  replaced: count => `Replaced ${plural(count, "chat", "chats")}.`,

  // settings
  settingsChat: "This chat", settingsPage: "This page", settingsHint: "An empty field leaves the choice to the server.",
  systemPrompt: "System prompt", systemHint: "none", templateAdds: "How the model's template renders a message “…”", preset: "Preset",
  choosePreset: "Choose…", presets: {precise: "Precise", creative: "Creative", repeatable: "Repeatable"}, presetName: "Name of the preset",
  savePreset: "Save as preset", deletePreset: "Delete preset", presetSaved: name => `Saved as “${name}”`,
  parameters: {temperature: "Temperature", top_k: "Top-k", top_p: "Top-p", min_p: "Min-p", repetition_penalty: "Repetition penalty",
    presence_penalty: "Presence penalty", frequency_penalty: "Frequency penalty", reasoning_effort: "Thinking effort", thinking_budget: "Thinking budget", max_tokens: "Max tokens", seed: "Seed"},
  moreParameters: "Penalties and thinking effort", default: "default", random: "random", restOfContext: "rest of context", stopStrings: "Stop strings, one per line", none: "none",
  toolsAndFormat: "Functions and answer format", functions: "Functions that the model may call (JSON)", addCalculator: "Add a calculator",
  schema: "JSON schema of answers", budget: "Thinking budget", noLimit: "no limit", notValidJson: why => `This is not valid JSON: ${why}.`,
  badFunction: place => `Function ${place} needs a name of letters, digits, _, - and ., and parameters that are a JSON schema.`,
  badSchema: "A JSON schema is an object, such as {\"type\": \"object\", \"properties\": {...}}.", callOf: name => `Call of ${name}`, result: "Result", sendResults: "Send results",
  clicks: "Click a message to edit it, or to answer it again", titles: "Let the model name new chats",
  titleRequest: (question, answer) => `Question: ${question}\n\nAnswer: ${answer}\n\nWrite a title of two to six words for this conversation. Write nothing else.`,
  notify: "Notify me when an answer ends in the background", notifyRefused: "The browser does not allow notifications of this page.",
  defaults: "Defaults", forNewChats: "Use for new chats",
  usedForNew: "New chats begin with these", done: "Done",

  // prompts
  prompts: "Prompts", promptName: "Name of the prompt", promptUse: "What it is", promptText: "Text of the prompt", starter: "Starter", usePrompt: "Use",
  savePrompt: "Save prompt", noPrompts: "None yet.", promptsHint: "A system prompt is told to the model first. A starter begins a message, and stands on the empty page.",

  // server
  serverHint: "For a page opened from a file, or to talk to another machine. That server must allow this page (--cors-origin; null for a file).",
  url: "URL", apiKey: "API key", keyWanted: "This server needs an API key.", wrongKey: "The server does not know this API key.",
  noAddress: text => `“${text}” is not an address such as http://gpu-box:8000.`, askTitle: "Use another server?",
  askServer: home => `The address of this page asks it to use the server ${home}. Your messages would be sent there.`,
  useIt: "Use this server", dontUseIt: "Stay here",

  keysTitle: "Keyboard shortcuts",
  keys: [["Enter", "send"], ["Shift Enter", "new line"], ["Esc", "stop the answer, leave a dialog or the server's status"], ["↑", "in an empty message: what you asked before"],
    ["← →", "in a token lens: from token to token; ↓ to what stood beside it"], ["Ctrl K", "search chats"], ["Ctrl Shift O", "new chat"], ["?", "this list"]],
};
