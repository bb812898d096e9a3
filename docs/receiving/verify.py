"""A receiver of webhooks that verifies them by Standard Webhooks, with Python alone (3.8 and later).

ed25519 (secrets whpk_…) needs the package cryptography.
"""
import base64
import hashlib
import hmac
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def parse(secret):
    kind, _, text = secret.partition("_")
    key = base64.b64decode(text, validate=True)
    if kind == "whsec" and key:
        return "v1", lambda content, signature: hmac.compare_digest(hmac.new(key, content, hashlib.sha256).digest(), signature)
    if kind == "whpk":
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        public = Ed25519PublicKey.from_public_bytes(key)

        def signed(content, signature):
            try:
                public.verify(signature, content)
                return True
            except InvalidSignature:
                return False

        return "v1a", signed
    raise ValueError("a secret is whsec_ or whpk_ and base64")


# During a rotation there are two secrets, later one again.
keys = [parse(secret) for secret in os.environ["WEBHOOK_SECRETS"].split()]


def verify(headers, body):
    """Takes the body as it came, in bytes: JSON that was parsed and printed again has another signature."""
    timestamp = headers.get("webhook-timestamp", "")
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > 300:
        raise ValueError("webhook-timestamp is missing or too far from now")
    content = f"{headers.get('webhook-id')}.{timestamp}.".encode() + body
    for one in headers.get("webhook-signature", "").split():
        version, _, text = one.partition(",")
        try:
            signature = base64.b64decode(text, validate=True)
        except ValueError:
            continue
        if any(of == version and signed(content, signature) for of, signed in keys):
            return
    raise ValueError("no signature is of a secret that we have")


class Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        size = int(self.headers.get("content-length", 0))
        if size > 1 << 20:
            self.close_connection = True
            return self.answer(413)
        body = self.rfile.read(size)
        try:
            verify(self.headers, body)
        except ValueError as err:
            return self.answer(401, str(err))
        print(self.headers["webhook-id"], flush=True)  # here: write it down, then answer
        self.answer(204)

    def answer(self, status, why=""):
        self.send_response(status)
        if status != 204:
            self.send_header("content-length", str(len(why)))
        self.end_headers()
        self.wfile.write(why.encode())


ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Receiver).serve_forever()
