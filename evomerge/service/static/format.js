// Numbers and times for people.

export const NONE = "–";
const MINUS = "\u2212";

/** Return a number with so many decimals and a true minus; a dash for nothing. */
export function fixed(value, decimals) {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE;
  const text = Math.abs(value).toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  return value < 0 && Number(Math.abs(value).toFixed(decimals)) !== 0 ? MINUS + text : text;
}

export const score = (value) => fixed(value, 3);
export const count = (value) => fixed(value, 0);

/** Return `0.480 to 0.544`; empty where there is no interval. */
export function interval(found, show = score) {
  if (!found || found.low === null || found.low === undefined || found.low === found.high) return "";
  return `${show(found.low)} to ${show(found.high)}`;
}

/** Return a share of 1 as points with a sign: `+6.8`. */
export function points(value) {
  const text = fixed(100 * value, 1);
  return value > 0 && text !== "0.0" ? `+${text}` : text;
}

/** Return a gain's interval in points: `+5.2 to +8.5`. */
export const gainEnds = (found) => interval(found, points);

export const percent = (share) => (share === null || share === undefined ? NONE : `${Math.round(100 * share)} %`);

/** Return a parameter's value: a number, a switch, a choice. */
export function value(found) {
  if (typeof found === "number") return Number.isInteger(found) ? String(found) : score(found);
  if (found === null || found === undefined) return NONE;
  return typeof found === "object" ? JSON.stringify(found) : String(found);
}

/** Return a length of time, such as `3 min 20 s`. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return NONE;
  const whole = Math.max(0, seconds);
  if (whole < 10) return `${whole.toFixed(1)} s`;
  if (whole < 60) return `${Math.round(whole)} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${pad(whole % 60)} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${pad((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

const pad = (number) => String(Math.floor(number)).padStart(2, "0");

/** Return how long ago a moment was, in Unix seconds. */
export function ago(moment) {
  const seconds = Date.now() / 1000 - moment;
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
}

/** Return the date and time of a moment where the reader is. */
export function moment(seconds) {
  const date = new Date(1000 * seconds);
  return `${date.getFullYear()}-${pad(date.getMonth() + 1)}-${pad(date.getDate())} ${clock(seconds)}`;
}

/** Return the time of day of a moment. */
export function clock(seconds) {
  const date = new Date(1000 * seconds);
  return `${pad(date.getHours())}:${pad(date.getMinutes())}:${pad(date.getSeconds())}`;
}

export function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  let rest = number;
  while (rest >= 1000 && place < units.length - 1) {
    rest /= 1000;
    place += 1;
  }
  return `${place === 0 || rest >= 100 ? Math.round(rest) : rest.toFixed(1)} ${units[place]}`;
}

/** Return a word in its number: `1 run`, `2 runs`. */
export function many(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}
