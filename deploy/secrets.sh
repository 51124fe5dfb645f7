#!/bin/sh
# Creates whatever is missing in deploy/secrets, for a first run on your own machine: a self-signed certificate for
# localhost, an API key and placeholders. In production the same files hold the real ones. Run by `make secrets`.
set -eu
umask 077
mkdir -p "$(dirname "$0")/secrets"
cd "$(dirname "$0")/secrets"

if [ ! -e tls_certificate ]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj /CN=localhost \
    -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout tls_key -out tls_certificate 2>/dev/null
fi
placeholder() { [ -e "$1" ] || printf %s "$2" >"$1"; }
placeholder smtp_password none
placeholder slack_url http://localhost:9/replace-me
placeholder pagerduty_key none
placeholder deadman_url http://localhost:9/replace-me
placeholder grafana_password "$(openssl rand -hex 16)"

# api_key is for callers such as `make smoke`; the folder api_keys, which the service mounts, holds its hash.
# Add more with: python -m serving.access add NAME deploy/secrets/api_keys/keys.toml
if [ ! -e api_keys/keys.toml ]; then
  mkdir -p api_keys
  openssl rand -hex 32 | tr -d '\n' >api_key
  printf '[first]\nsha256 = "%s"\n' "$(openssl dgst -sha256 -r api_key | cut -d' ' -f1)" >api_keys/keys.toml
fi

# Each container runs as its own user and mounts single files or the folder of keys, so their mode must let it read
# them. The folder around them keeps all other users of this machine out.
chmod 0755 api_keys
find . -type f -exec chmod 0644 {} +
