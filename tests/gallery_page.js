"use strict";
// Drives a page in a headless Chromium over its DevTools protocol: node gallery_page.js CHROMIUM PROFILE < STEPS
// STEPS is a JSON list of {open: URL}, {run: EXPRESSION}, {until: EXPRESSION}, {key: NAME}, {click: SELECTOR},
// {size: [W, H]} and {shot: FILE}. Prints {results, errors, requests, opened}: one result a step, what the page
// complained about, what it asked for beyond itself, and the milliseconds to the first card of each page.
const { spawn } = require("node:child_process");
const fs = require("node:fs");
const path = require("node:path");

const [chromium, profile] = process.argv.slice(2);
const PATIENCE = 60000;

async function until(condition, what) {
  for (const end = Date.now() + PATIENCE; Date.now() < end;) {
    const value = await condition();
    if (value) return value;
    await new Promise((done) => setTimeout(done, 20));
  }
  throw new Error(`waited in vain for ${what}`);
}

async function connect() {
  const port = path.join(profile, "DevToolsActivePort");
  const address = await until(() => fs.existsSync(port) && fs.readFileSync(port, "utf8").split("\n")[1] && fs.readFileSync(port, "utf8").split("\n"), "Chromium");
  const socket = new WebSocket(`ws://127.0.0.1:${address[0]}${address[1]}`);
  await new Promise((done, failed) => { socket.onopen = done; socket.onerror = failed; });
  const waiting = new Map();
  const listeners = [];
  let session;
  let number = 0;
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    if (message.id === undefined) { listeners.forEach((listener) => listener(message)); return; }
    const { done, failed } = waiting.get(message.id);
    waiting.delete(message.id);
    if (message.error) failed(new Error(JSON.stringify(message.error)));
    else done(message.result);
  };
  const send = (method, params = {}) => new Promise((done, failed) => {
    number += 1;
    waiting.set(number, { done, failed });
    socket.send(JSON.stringify({ id: number, method, params, sessionId: session }));
  });
  const { targetId } = await send("Target.createTarget", { url: "about:blank" });
  session = (await send("Target.attachToTarget", { targetId, flatten: true })).sessionId;
  return { send, listen: (listener) => listeners.push(listener) };
}

const CODES = { ArrowLeft: 37, ArrowUp: 38, ArrowRight: 39, ArrowDown: 40, PageUp: 33, PageDown: 34, End: 35, Home: 36, Enter: 13, Escape: 27 };

async function act(page, step, report) {
  const run = async (expression) => {
    const { result, exceptionDetails } = await page.send("Runtime.evaluate", { expression, returnByValue: true, awaitPromise: true });
    if (exceptionDetails) throw new Error(`${expression}: ${exceptionDetails.exception?.description}`);
    return result.value;
  };
  if (step.run !== undefined) return run(step.run);
  if (step.until !== undefined) return until(() => run(step.until), step.until);
  if (step.click !== undefined) return run(`document.querySelector(${JSON.stringify(step.click)}).click()`);
  if (step.size !== undefined) {
    return page.send("Emulation.setDeviceMetricsOverride", { width: step.size[0], height: step.size[1], deviceScaleFactor: step.scale || 1, mobile: false });
  }
  if (step.key !== undefined) {
    const text = step.key.length === 1 ? step.key : step.key === "Enter" ? "\r" : undefined;
    const code = CODES[step.key] || step.key.toUpperCase().charCodeAt(0);
    await page.send("Input.dispatchKeyEvent", { type: "keyDown", key: step.key, text, windowsVirtualKeyCode: code });
    return page.send("Input.dispatchKeyEvent", { type: "keyUp", key: step.key, windowsVirtualKeyCode: code });
  }
  if (step.open !== undefined) {
    await page.send("Page.navigate", { url: "about:blank" });
    const { errorText } = await page.send("Page.navigate", { url: step.open });
    if (errorText) throw new Error(`${step.open}: ${errorText}`);
    await until(() => run("document.readyState === 'complete'").catch(() => false), "the page");
    const started = await run("new Promise((d) => requestAnimationFrame(() => setTimeout(() => d(performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null), 50)))");
    report.opened.push({ paint: started, load: await run("performance.getEntriesByType('navigation')[0].domComplete"), ready: await run("performance.getEntriesByName('gallery-ready')[0]?.startTime ?? null") });
    return null;
  }
  const { data } = await page.send("Page.captureScreenshot", { format: "png" });
  fs.writeFileSync(step.shot, Buffer.from(data, "base64"));
  return null;
}

async function main() {
  const steps = JSON.parse(fs.readFileSync(0, "utf8"));
  // Without its sandbox: it opens nothing but pages written by the test, also in containers.
  const browser = spawn(chromium, ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--remote-debugging-port=0", `--user-data-dir=${profile}`, "about:blank"], { stdio: "ignore" });
  const report = { results: [], errors: [], requests: [], opened: [] };
  try {
    const page = await connect();
    page.listen(({ method, params }) => {
      if (method === "Runtime.exceptionThrown") report.errors.push(params.exceptionDetails.exception?.description || params.exceptionDetails.text);
      if (method === "Log.entryAdded" && params.entry.level === "error") report.errors.push(params.entry.text);
      if (method === "Network.requestWillBeSent" && !params.request.url.startsWith("data:")) report.requests.push(params.request.url);
    });
    for (const domain of ["Page", "Runtime", "Log", "Network"]) await page.send(`${domain}.enable`);
    for (const step of steps) report.results.push((await act(page, step, report)) ?? null);
  } finally {
    browser.kill();
    await new Promise((done) => { if (browser.exitCode !== null) done(); else browser.on("exit", done); setTimeout(done, 5000); });
  }
  process.stdout.write(JSON.stringify(report), () => process.exit(0));
}

main().catch((error) => { process.stderr.write(String(error.stack)); process.exit(1); });
