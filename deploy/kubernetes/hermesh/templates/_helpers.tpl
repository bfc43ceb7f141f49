{{/* The name that every object begins with. */}}
{{- define "hermesh.fullname" -}}
{{- if contains "hermesh" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-hermesh" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of a component: (dict "root" $ "name" "agent"). */}}
{{- define "hermesh.selector" -}}
app.kubernetes.io/name: hermesh
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end -}}

{{/* The labels of a component's objects. */}}
{{- define "hermesh.labels" -}}
{{ include "hermesh.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | quote }}
{{- end -}}

{{/* repository:tag or repository@digest: (dict "image" ... "tag" "for an empty tag"). */}}
{{- define "hermesh.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .tag }}
{{- end -}}
{{- end -}}

{{/* A value as text; Helm itself would write 1048576 as 1.048576e+06. */}}
{{- define "hermesh.text" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end -}}

{{/* Which secrets a component reads, and their keys in the secret: (dict "root" $ "name" "agent"). */}}
{{- define "hermesh.secrets" -}}
{{- $keys := .root.Values.secrets.keys -}}
{{- if ne .name "migrate" }}
HERMESH_MESH_TOKEN: {{ $keys.meshToken }}
{{- end }}
{{- if has .name (list "session" "memory" "migrate") }}
HERMESH_DATABASE_URL: {{ $keys.databaseUrl }}
{{- with $keys.databaseDirectUrl }}
HERMESH_DATABASE_DIRECT_URL: {{ . }}
{{- end }}
{{- end }}
{{- if eq .name "session" }}
{{- with $keys.databaseStandbyUrl }}
HERMESH_DATABASE_STANDBY_URL: {{ . }}
{{- end }}
{{- with $keys.redisUrl }}
HERMESH_REDIS_URL: {{ . }}
{{- end }}
{{- with $keys.redisReadFrom }}
HERMESH_REDIS_READ_FROM: {{ . }}
{{- end }}
{{- end }}
{{- if and (eq .name "agent") $keys.llmApiKey }}
HERMESH_LLM_API_KEY: {{ $keys.llmApiKey }}
{{- end }}
{{- if eq .name "migrate" }}
HERMESH_API_KEY: {{ $keys.apiKey }}
{{- end }}
{{- end -}}

{{/* The variables that name its secrets' files. Files, since a process's environment is seen by its children. */}}
{{- define "hermesh.secretVariables" -}}
{{- range $variable, $key := include "hermesh.secrets" . | fromYaml }}
- {name: {{ $variable }}_FILE, value: /run/secrets/hermesh/{{ $key }}}
{{- end }}
{{- end -}}

{{/* The volume with those files and no others. */}}
{{- define "hermesh.secretVolume" -}}
name: secrets
secret:
  secretName: {{ required "secrets.existingSecret is not set: name the secret that holds the database's URL, the mesh's token and the first API key" .root.Values.secrets.existingSecret }}
  defaultMode: 0440
  items:
  {{- range $key := include "hermesh.secrets" . | fromYaml | values | sortAlpha }}
  - {key: {{ $key }}, path: {{ $key }}}
  {{- end }}
{{- end -}}

{{/* What a pod of this chart may do: nothing that it does not need ("restricted"). */}}
{{- define "hermesh.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "hermesh.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Pods apart from each other, each version by itself. */}}
{{- define "hermesh.spread" -}}
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {{- include "hermesh.selector" $ | nindent 6 }}
  matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end -}}

{{/* What a component may call, where networkPolicy.egress names it: (dict "root" $ "name" "agent"). */}}
{{- define "hermesh.egress" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- if hasKey $policy.egress .name -}}
policyTypes: [Ingress, Egress]
egress:
- to: {{- toYaml $policy.dns | nindent 2 }}
  ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
{{- if eq .name "envoy" }}
- to:
  {{- range $name := list "session" "agent" "tool" "memory" "gateway" }}
  - podSelector:
      matchLabels: {{- include "hermesh.selector" (dict "root" $.root "name" $name) | nindent 8 }}
  {{- end }}
  ports: [{port: http}, {port: grpc}]
{{- else if ne .name "migrate" }}
- to:
  - podSelector:
      matchLabels: {{- include "hermesh.selector" (dict "root" .root "name" "envoy") | nindent 8 }}
  ports: [{port: mesh}]
{{- end }}
{{- with index $policy.egress .name }}
{{ toYaml . }}
{{- end }}
{{- else -}}
policyTypes: [Ingress]
{{- end -}}
{{- end -}}

{{/* Where a pod goes: the values nodeSelector, tolerations, affinity, priorityClassName. */}}
{{- define "hermesh.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* The variables of every process of the mesh. */}}
{{- define "hermesh.meshVariables" -}}
- {name: HERMESH_MESH_ADDRESS, value: "{{ include "hermesh.fullname" . }}-mesh.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:50052"}
- {name: HERMESH_METRICS_LISTEN, value: "0.0.0.0:9464"}
- {name: HERMESH_ENVOY_STATUS_PORT, value: "9902"}
{{- end -}}

{{/* The variables of one service: (dict "root" $ "name" "agent"). */}}
{{- define "hermesh.serviceVariables" -}}
{{- $values := .root.Values -}}
{{- if eq .name "agent" }}
- {name: HERMESH_LLM_BASE_URL, value: {{ required "model.baseUrl is not set: name an OpenAI-compatible model server, with its /v1" $values.model.baseUrl | quote }}}
- {name: HERMESH_LLM_MODEL, value: {{ $values.model.name | quote }}}
- {name: HERMESH_LLM_TOOL_MODE, value: {{ $values.model.toolMode | quote }}}
- {name: HERMESH_LLM_PREFILL, value: {{ $values.model.prefill | quote }}}
{{- end }}
{{- if eq .name "tool" }}
- {name: HERMESH_OBJECT_STORE_URL, value: {{ $values.objectStoreUrl | quote }}}
{{- end }}
{{- end -}}
