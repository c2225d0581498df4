// Writes plain data as YAML, and finds the line of a key in YAML or JSON.

const PLAIN = /^[A-Za-z_./][A-Za-z0-9_./@+-]*( [A-Za-z0-9_./@+-]+)*$/;
const SPECIAL = /^(true|false|yes|no|on|off|y|n|null|~|\.inf|\.nan|\.)$/i;

function scalar(data) {
  if (typeof data === "string") return PLAIN.test(data) && !SPECIAL.test(data) ? data : JSON.stringify(data);
  if (typeof data === "number") return JSON.stringify(data).replace(/^(-?\d+)e/, "$1.0e");
  return JSON.stringify(data);
}

const simple = (data) => data === null || typeof data !== "object";

/** Return data as YAML text. */
export function yaml(data, indent = "") {
  if (simple(data)) return scalar(data);
  const list = Array.isArray(data);
  const entries = list ? data.map((one) => ["-", one]) : Object.entries(data).map(([key, one]) => [`${scalar(key)}:`, one]);
  if (!entries.length) return list ? "[]" : "{}";
  if (list && data.every(simple)) {
    const line = `[${data.map(scalar).join(", ")}]`;
    if (line.length < 100) return line;
  }
  return entries.map(([key, one]) => {
    const text = yaml(one, `${indent}  `);
    const flat = simple(one) || text.startsWith("[") || text === "{}";
    if (flat) return `${indent}${key} ${text}`;
    return list ? `${indent}- ${text.slice(indent.length + 2)}` : `${indent}${key}\n${text}`;
  }).join("\n");
}

/**
 * Return the line, from 0, on which a dotted key stands; of a key that is absent, the nearest one above it.
 * Null if none of it is there.
 */
export function lineOf(text, key) {
  const lines = text.split("\n");
  let [from, to, indent] = [0, lines.length, -1];
  let found = null;
  for (const part of key.split(".")) {
    const place = /^\d+$/.test(part) ? item(lines, from, to, indent, Number(part)) : entry(lines, from, to, indent, part);
    if (place === null) return found;
    found = place.line;
    [from, to, indent] = [place.from, place.to, place.indent];
  }
  return found;
}

const depth = (text) => text.search(/\S/);
const blank = (text) => /^\s*(#.*|[[\]{},]+)?\s*$/.test(text);

/** Return the end of the block that begins at a line with an indentation. */
function end(lines, from, to, indent) {
  for (let i = from; i < to; i += 1) if (!blank(lines[i]) && depth(lines[i]) <= indent) return i;
  return to;
}

function entry(lines, from, to, indent, key) {
  const name = `["']?${key.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}["']?\\s*:`;
  for (const wanted of [new RegExp(`^\\s*(- +)?${name}`), new RegExp(`[\\s{,]${name}`)]) {
    let least = Infinity;
    for (let i = from; i < to; i += 1) {
      if (blank(lines[i])) continue;
      const column = depth(lines[i].replace(/^(\s*)-\s/, "$1  "));
      const inside = i === from && column <= indent; // {key: value} on the line of its parent
      if (!inside) least = Math.min(least, column);
      if ((inside || column <= least) && wanted.test(lines[i])) {
        return { line: i, from: i, to: end(lines, i + 1, to, column), indent: column };
      }
    }
  }
  return null;
}

function item(lines, from, to, indent, number) {
  let seen = -1;
  let column = null;
  for (let i = from; i < to; i += 1) {
    const dash = lines[i].match(/^(\s*)-(\s|$)/);
    if (!dash || (column !== null && dash[1].length !== column) || dash[1].length < indent) continue;
    column = dash[1].length;
    seen += 1;
    if (seen === number) return { line: i, from: i, to: end(lines, i + 1, to, column), indent: column };
  }
  return null;
}
