#!/bin/sh
# Makes what is missing in deploy/secrets, for a first run on one's own machine: a self-signed certificate for
# localhost and placeholders. In production the same files hold the real ones. Run by `make secrets`.
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

# Each container has a user of its own and is given single files: their mode must let it read. The folder keeps
# everyone else of this machine out.
chmod 0444 ./*
