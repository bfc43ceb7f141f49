// Elements, and text with marks in it. All text gets into the page as text nodes, never as HTML.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// Markdown, a small safe part of it: fences, headings, lists, inline code, bold, italics, http(s) links.
const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*([^*\s](?:[\s\S]*?[^*\s])?)\*\*|\*([^*\s](?:[^*]*[^*\s])?)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>"')\]]+[^\s<>"')\].,;:!?])/g;

function inline(text, into) {
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) into.append(text.slice(at, match.index));
    at = match.index + match[0].length;
    if (match[2] !== undefined) into.append(element("code", {}, match[2]));
    else if (match[3] !== undefined) into.append(inline(match[3], element("strong")));
    else if (match[4] !== undefined) into.append(inline(match[4], element("em")));
    else into.append(link(match[6] || match[7], match[5] || match[7]));
  }
  if (at < text.length) into.append(text.slice(at));
  return into;
}

function link(href, label) {
  let url;
  try { url = new URL(href); } catch { return label; }
  if (url.protocol !== "http:" && url.protocol !== "https:") return label;
  return element("a", { href: url.href, rel: "noopener noreferrer nofollow", target: "_blank" }, label);
}

export function markdown(text) {
  const blocks = [];
  let paragraph = [];
  let list = null;
  const endParagraph = () => {
    if (!paragraph.length) return;
    const made = element("p");
    paragraph.forEach((line, index) => {
      if (index) made.append(element("br"));
      inline(line, made);
    });
    blocks.push(made);
    paragraph = [];
  };
  const end = () => { endParagraph(); list = null; };
  const lines = text.split("\n");
  for (let n = 0; n < lines.length; n++) {
    const line = lines[n];
    const fence = line.match(/^\s*(```+|~~~+)/);
    if (fence) {
      end();
      const code = [];
      for (n++; n < lines.length && !lines[n].trimStart().startsWith(fence[1]); n++) code.push(lines[n]);
      blocks.push(element("pre", {}, element("code", {}, code.join("\n"))));
      continue;
    }
    const heading = line.match(/^#{1,6}\s+(.*)$/);
    const item = line.match(/^\s*(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/);
    if (heading) {
      end();
      blocks.push(inline(heading[1], element("h3")));
    } else if (item) {
      endParagraph();
      const kind = item[1] ? "ul" : "ol";
      if (!list || list.localName !== kind) {
        list = element(kind, kind === "ol" && item[2] !== "1" ? { start: item[2] } : {});
        blocks.push(list);
      }
      list.append(inline(item[3], element("li")));
    } else if (line.trim() === "") {
      // A blank line inside of a list does not end it if another item follows.
      endParagraph();
      if (!(lines[n + 1] || "").match(/^\s*([-*+]|\d{1,9}[.)])\s/)) list = null;
    } else if (list && /^\s{2,}/.test(line)) {
      const last = list.lastElementChild;
      last.append(element("br"));
      inline(line.trim(), last);
    } else {
      list = null;
      paragraph.push(line);
    }
  }
  end();
  return blocks;
}
