// Reading JSON without changing what a model wrote.
//
// The arguments of a call are bytes: a number above 2^53, 1.0 or a repeated name would not survive JSON.parse, and a
// person would approve something else than what runs. So they stay the text that they came as.

const TOKEN = /"(?:[^"\\]|\\[^])*"|[{}[\],:]|[^\s{}[\],:"]+/y;
const BLANK = /\s*/y;
const DEEPEST = 40;
const LONGEST = 200_000;

// Yields {text, at} of each token; ends early where the text is no JSON.
function* tokens(text, from = 0) {
  let at = from;
  for (;;) {
    BLANK.lastIndex = at;
    BLANK.test(text);
    at = Math.max(at, BLANK.lastIndex);
    TOKEN.lastIndex = at;
    const found = TOKEN.exec(text);
    if (!found) return;
    const token = { text: found[0], at };
    at = TOKEN.lastIndex;
    yield token;
  }
}

// Where the value that begins at a token ends, and where it begins.
function valueAt(text, from) {
  let depth = 0;
  let start = -1;
  for (const token of tokens(text, from)) {
    if (start < 0) start = token.at;
    if (token.text === "{" || token.text === "[") depth += 1;
    else if (token.text === "}" || token.text === "]") depth -= 1;
    if (depth <= 0) return [start, token.at + token.text.length];
  }
  return [from, from];
}

// JSON.parse, except that every member called "arguments" is the text of its value.
export function parse(text) {
  if (!text.includes('"arguments"')) return JSON.parse(text);
  let made = "";
  let copied = 0;
  let skipTo = 0;
  let name = null;
  for (const token of tokens(text)) {
    if (token.at < skipTo) continue;
    if (token.text === ":" && name?.text === '"arguments"') {
      const [start, end] = valueAt(text, token.at + 1);
      if (text[start] !== '"' && end > start) {
        made += text.slice(copied, start) + JSON.stringify(text.slice(start, end));
        copied = end;
      }
      skipTo = end;
    }
    name = token;
  }
  return JSON.parse(made + text.slice(copied));
}

// JSON with a line for each member, every token as it was; any other text as it is.
export function indent(text) {
  if (text.length > LONGEST) return text;
  try { JSON.parse(text); } catch { return text; }
  const parts = [];
  let depth = 0;
  let before = "";
  const line = () => parts.push("\n", "  ".repeat(Math.min(Math.max(depth, 0), DEEPEST)));
  for (const { text: token } of tokens(text)) {
    const opened = before === "{" || before === "[";
    if (token === "}" || token === "]") {
      depth -= 1;
      if (!opened) line();
    } else if (opened || before === ",") {
      line();
    }
    parts.push(token);
    if (token === ":") parts.push(" ");
    if (token === "{" || token === "[") depth += 1;
    before = token;
  }
  return parts.join("");
}
