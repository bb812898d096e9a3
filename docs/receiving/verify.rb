# A receiver of webhooks that verifies them by Standard Webhooks, with Ruby (3.1 and later) and the gem webrick.
require "openssl"
require "webrick"

def parse(secret)
  kind, text = secret.split("_", 2)
  key = text.to_s.unpack1("m0")
  if kind == "whsec" && !key.empty?
    return ["v1", ->(content, signature) { OpenSSL.secure_compare(OpenSSL::HMAC.digest("SHA256", key, content), signature) }]
  end
  raise ArgumentError, "a secret is whsec_ or whpk_ and base64" unless kind == "whpk" && key.bytesize == 32

  public_key = OpenSSL::PKey.read(["302a300506032b6570032100"].pack("H*") + key)
  ["v1a", ->(content, signature) { signature.bytesize == 64 && public_key.verify(nil, signature, content) }]
end

# During a rotation there are two secrets, later one again.
KEYS = ENV.fetch("WEBHOOK_SECRETS").split.map { |secret| parse(secret) }

# Takes the body as it came: JSON that was parsed and printed again has another signature.
def verify(request, body)
  id, timestamp = request["webhook-id"], request["webhook-timestamp"].to_s
  if timestamp !~ /\A\d+\z/ || (Time.now.to_i - timestamp.to_i).abs > 300
    raise ArgumentError, "webhook-timestamp is missing or too far from now"
  end
  content = "#{id}.#{timestamp}.".b + body
  request["webhook-signature"].to_s.split.each do |one|
    version, text = one.split(",", 2)
    signature = text.to_s.unpack1("m0") rescue next
    return if KEYS.any? { |of, signed| of == version && signed.call(content, signature) }
  end
  raise ArgumentError, "no signature is of a secret that we have"
end

server = WEBrick::HTTPServer.new(BindAddress: "127.0.0.1", Port: ENV.fetch("PORT").to_i, AccessLog: [])
server.mount_proc "/" do |request, response|
  body = request.body.to_s.b
  raise WEBrick::HTTPStatus::RequestEntityTooLarge if body.bytesize > 1 << 20
  begin
    verify(request, body)
    puts request["webhook-id"] # here: write it down, then answer
    response.status = 204
  rescue ArgumentError => e
    response.status, response.body = 401, e.message
  end
end
trap("TERM") { server.shutdown }
$stdout.sync = true
server.start
