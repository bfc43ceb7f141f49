#!/bin/bash
# Runs Envoy so that it can be stopped without cutting streams: serve.sh ARGUMENTS-OF-ENVOY...
#
# By itself Envoy cuts every stream at SIGTERM. Here SIGTERM begins a drain instead:
#   1. Health fails: GET /health and /ready say 503, and whoever balances over Envoys sends new connections elsewhere.
#      Answers tell their connections to close.
#   2. Gateways and session replicas look at /ready; they end streams that came by this Envoy with `reconnect`.
#   3. After HERMESH_ENVOY_NOTICE_SECONDS the ports are closed, the mesh's own, too: also who looks at nothing goes
#      elsewhere now. A service that calls another one is told so by the next answer (GOAWAY), and finds the next Envoy.
#   4. Once nothing is under way on the public ports and no new call has come from the mesh for a second, or after
#      HERMESH_ENVOY_DRAIN_SECONDS in all, Envoy ends. The mesh's streams, which never end, are cut: they go on elsewhere.
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

count() { # PATTERN: prints the sum of the counters of that name
  local sum=0 line
  while read -r line; do
    [[ $line == http.*:* ]] && sum=$((sum + ${line##*: }))
  done < <(ask GET "/stats?filter=^http\.$1\$" | tr -d '\r')
  echo "$sum"
}

under_way() { count '(http|grpc)\.downstream_rq_active'; }

mesh_calls() { count 'mesh\.downstream_rq_total'; }

at_rest() { # looks for a second
  local before
  [ "$(under_way)" = 0 ] || return
  before=$(mesh_calls)
  pause
  pause
  [ "$(under_way)" = 0 ] && [ "$(mesh_calls)" = "$before" ]
}

drain() {
  # A second signal ends it at once.
  trap 'kill -TERM $envoy' TERM INT
  began=$SECONDS
  say draining
  ask POST /healthcheck/fail > /dev/null
  while ((SECONDS - began < notice && SECONDS - began < limit)); do pause; done
  ask POST '/drain_listeners?inboundonly' > /dev/null
  while ((SECONDS - began < limit)) && ! at_rest; do pause; done
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
