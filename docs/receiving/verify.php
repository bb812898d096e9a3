<?php
// A receiver of webhooks that verifies them by Standard Webhooks, with PHP alone (7.2 and later). To try it: php -S 127.0.0.1:3000 verify.php

function parse(string $secret): array
{
    [$kind, $text] = explode('_', $secret, 2) + ['', ''];
    $key = base64_decode($text, true);
    if ($kind === 'whsec' && $key) {
        return ['v1', $key];
    }
    if ($kind === 'whpk' && strlen($key) === SODIUM_CRYPTO_SIGN_PUBLICKEYBYTES) {
        return ['v1a', $key];
    }
    throw new InvalidArgumentException('a secret is whsec_ or whpk_ and base64');
}

function signed(array $key, string $content, string $signature): bool
{
    [$version, $bytes] = $key;
    if ($version === 'v1a') {
        return strlen($signature) === SODIUM_CRYPTO_SIGN_BYTES && sodium_crypto_sign_verify_detached($signature, $content, $bytes);
    }
    return hash_equals(hash_hmac('sha256', $content, $bytes, true), $signature);
}

// Takes the body as it came: JSON that was parsed and printed again has another signature.
function verify(array $keys, string $id, string $timestamp, string $signatures, string $body): bool
{
    if (!ctype_digit($timestamp) || abs(time() - (int) $timestamp) > 300) {
        return false;
    }
    foreach (explode(' ', $signatures) as $one) {
        [$version, $text] = explode(',', $one, 2) + ['', ''];
        $signature = base64_decode($text, true);
        foreach ($keys as $key) {
            if ($signature !== false && $key[0] === $version && signed($key, "$id.$timestamp.$body", $signature)) {
                return true;
            }
        }
    }
    return false;
}

// During a rotation there are two secrets, later one again.
$keys = array_map('parse', explode(' ', getenv('WEBHOOK_SECRETS')));
$body = file_get_contents('php://input', false, null, 0, (1 << 20) + 1);
$id = $_SERVER['HTTP_WEBHOOK_ID'] ?? '';
if (strlen($body) > 1 << 20) {
    http_response_code(413);
} elseif (!verify($keys, $id, $_SERVER['HTTP_WEBHOOK_TIMESTAMP'] ?? '', $_SERVER['HTTP_WEBHOOK_SIGNATURE'] ?? '', $body)) {
    http_response_code(401);
} else {
    error_log($id); // here: write it down, then answer
    http_response_code(204);
}
