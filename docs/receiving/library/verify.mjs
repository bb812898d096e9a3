// A receiver of webhooks that verifies them with the library of Standard Webhooks: npm install standardwebhooks
import { createServer } from "node:http";
import { Webhook } from "standardwebhooks";

// One for each secret: during a rotation there are two.
const verifiers = process.env.WEBHOOK_SECRETS.split(" ").map((secret) => new Webhook(secret));

function verified(headers, body) {
  return verifiers.some((verifier) => {
    try {
      verifier.verify(body, headers);
      return true;
    } catch {
      return false;
    }
  });
}

async function receive(request) {
  const chunks = [];
  let size = 0;
  for await (const chunk of request) {
    if ((size += chunk.length) <= 1 << 20) chunks.push(chunk);
  }
  if (size > 1 << 20) return 413;
  if (!verified(request.headers, Buffer.concat(chunks))) return 401;
  console.log(request.headers["webhook-id"]); // here: write it down, then answer
  return 204;
}

createServer((request, response) => {
  receive(request)
    .catch(() => 500)
    .then((status) => response.writeHead(status).end());
}).listen(Number(process.env.PORT), "127.0.0.1");
