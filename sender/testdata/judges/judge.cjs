// Reads requests as JSON from stdin, [{judge, headers, body, secret, want}] with the body in base64, and
// writes what each one's judge says: "" where it accepts the request, else why not.

const { deepStrictEqual } = require("node:assert");
const { createRequire } = require("node:module");
const from = createRequire(process.cwd() + "/"); // where the packages are installed
globalThis.require = from; // nfe-io looks for it there

const judges = {
  standardwebhooks: ({ headers, body, secret }) => new (from("standardwebhooks").Webhook)(secret).verify(body.toString(), headers),
  svix: ({ headers, body, secret }) => new (from("svix").Webhook)(secret).verify(body.toString(), headers),
  stripe: ({ headers, body, secret }) => {
    const Stripe = from("stripe");
    return new (Stripe.default ?? Stripe)("sk_test_none").webhooks.constructEvent(body, headers["stripe-signature"], secret);
  },
  octokit: async ({ headers, body, secret }) => {
    const { verify } = await import(process.cwd() + "/node_modules/@octokit/webhooks-methods/dist-node/index.js"); // a module of the new kind
    if (!(await verify(secret, body.toString(), headers["x-hub-signature-256"]))) throw new Error("not verified");
  },
  "nfe-io": ({ headers, body, secret }) => {
    const nfe = new (from("nfe-io").NfeClient)({ apiKey: "none" });
    if (!nfe.webhooks.validateSignature(body, headers["x-nfe-signature"], secret)) throw new Error("not verified");
  },
  cloudevents: ({ headers, body, want }) => {
    const events = [from("cloudevents").HTTP.toEvent({ headers, body: body.toString() })].flat();
    const found = events.map((e) => {
      e.validate();
      const { id, type, source, time, datacontenttype, partitionkey, sequence, data } = e;
      return { id, type, source, time: new Date(time).toISOString(), datacontenttype, partitionkey, sequence, data: ArrayBuffer.isView(data) ? Array.from(data) : data };
    });
    deepStrictEqual(found, want);
  },
};

async function main() {
  const chunks = [];
  for await (const chunk of process.stdin) chunks.push(chunk);
  const said = [];
  for (const request of JSON.parse(Buffer.concat(chunks))) {
    try {
      await judges[request.judge]({ ...request, body: Buffer.from(request.body, "base64") });
      said.push("");
    } catch (err) {
      said.push(String(err.message || err));
    }
  }
  process.stdout.write(JSON.stringify(said));
}

main();
