// A receiver of webhooks that verifies them by Standard Webhooks, with Node alone.
import { createHmac, createPublicKey, timingSafeEqual, verify as verifyEd25519 } from "node:crypto";
import { createServer } from "node:http";

// During a rotation there are two secrets, later one again.
const keys = process.env.WEBHOOK_SECRETS.split(" ").map((secret) => {
  const [kind, text] = secret.split("_");
  const bytes = Buffer.from(text ?? "", "base64");
  if (kind === "whsec" && bytes.length > 0) return { version: "v1", bytes };
  if (kind === "whpk" && bytes.length === 32) {
    const der = Buffer.concat([Buffer.from("302a300506032b6570032100", "hex"), bytes]);
    return { version: "v1a", key: createPublicKey({ key: der, format: "der", type: "spki" }) };
  }
  throw new Error("a secret is whsec_ or whpk_ and base64");
});

function signed(key, content, signature) {
  if (key.version === "v1a") return verifyEd25519(null, content, key.key, signature);
  const want = createHmac("sha256", key.bytes).update(content).digest();
  return signature.length === want.length && timingSafeEqual(signature, want);
}

// body is a Buffer, as it came: JSON that was parsed and printed again has another signature.
function verify(headers, body) {
  const { "webhook-id": id, "webhook-timestamp": timestamp, "webhook-signature": signatures = "" } = headers;
  if (!(Math.abs(Date.now() / 1000 - Number(timestamp)) <= 300)) {
    throw new Error("webhook-timestamp is missing or too far from now");
  }
  const content = Buffer.concat([Buffer.from(`${id}.${timestamp}.`), body]);
  for (const one of signatures.split(" ")) {
    const [version, text = ""] = one.split(",");
    const signature = Buffer.from(text, "base64");
    if (keys.some((key) => key.version === version && signed(key, content, signature))) return;
  }
  throw new Error("no signature is of a secret that we have");
}

async function receive(request) {
  const chunks = [];
  let size = 0;
  for await (const chunk of request) {
    if ((size += chunk.length) <= 1 << 20) chunks.push(chunk);
  }
  if (size > 1 << 20) return 413;
  try {
    verify(request.headers, Buffer.concat(chunks));
  } catch {
    return 401;
  }
  console.log(request.headers["webhook-id"]); // here: write it down, then answer
  return 204;
}

createServer((request, response) => {
  receive(request)
    .catch(() => 500)
    .then((status) => response.writeHead(status).end());
}).listen(Number(process.env.PORT), "127.0.0.1");
