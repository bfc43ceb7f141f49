#!/bin/bash
# Runs Envoy so that it can be stopped without cutting streams: serve.sh ARGUMENTS-OF-ENVOY...
#
# By itself Envoy cuts every stream at SIGTERM. Here SIGTERM begins a drain instead:
#   1. Health fails: GET /health and /ready say 503, and whoever balances over Envoys sends new connections elsewhere.
#      Answers tell their connections to close.
#   2. Gateways and session replicas look at /ready; they end streams that came by this Envoy with `reconnect`.
#   3. After HERMESH_ENVOY_NOTICE_SECONDS the public ports are closed: also who looks at nothing goes elsewhere now.
#   4. Once nothing is under way, or after HERMESH_ENVOY_DRAIN_SECONDS in all, Envoy ends.
# Its admin interface is asked by TCP, so that nothing but bash is needed.
set -u
notice=${HERMESH_ENVOY_NOTICE_SECONDS:-5}
limit=${HERMESH_ENVOY_DRAIN_SECONDS:-15}
admin=${HERMESH_ENVOY_ADMIN:-127.0.0.1/9901}

ask() { # METHOD PATH: prints the answer
  exec 3<>"/dev/tcp/$admin" || return 1
  printf '%s %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n' "$1" "$2" >&3
  cat <&3
  exec 3<&- 3>&-
}

say() { printf '{"event":"%s","service":"envoy"}\n' "$1" >&2; }

under_way() { # on the public ports
  local sum=0 line
  while read -r line; do
    [[ $line == http.*.downstream_rq_active:* ]] && sum=$((sum + ${line##*: }))
  done < <(ask GET '/stats?filter=^http\.(http|grpc)\.downstream_rq_active$' | tr -d '\r')
  echo "$sum"
}

drain() {
  # A second signal ends it at once.
  trap 'kill -TERM $envoy' TERM INT
  began=$SECONDS
  say draining
  ask POST /healthcheck/fail > /dev/null
  while ((SECONDS - began < notice && SECONDS - began < limit)); do pause; done
  ask POST '/drain_listeners?inboundonly' > /dev/null
  while ((SECONDS - began < limit)) && [ "$(under_way)" != 0 ]; do pause; done
  say "drained after $((SECONDS - began)) s, $(under_way) requests were under way"
  kill -TERM "$envoy" 2> /dev/null
}

# In pieces, and beside the signals: bash handles one only when a command has ended.
pause() {
  kill -0 "$envoy" 2> /dev/null || exit 1
  sleep 0.5
}

envoy "$@" &
envoy=$!
trap drain TERM INT
# A signal ends the first wait.
wait "$envoy"
status=$?
while kill -0 "$envoy" 2> /dev/null; do
  wait "$envoy"
  status=$?
done
exit "$status"
