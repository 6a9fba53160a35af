{{/* Ports of the roles, and which of them have a model or pages. */}}
{{- define "qaq.ports" -}}
router: 7700
gateway: 8000
originals: 7720
worker: 7710
{{- end }}

{{- define "qaq.metricsPort" -}}9100{{- end }}

{{/* Arguments: a list of the root and a role. */}}
{{- define "qaq.name" -}}
{{ printf "%s-%s" (index . 0).Release.Name (index . 1) | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "qaq.secret" -}}
{{- $root := index . 0 -}}
{{ printf "%s-%s" (default $root.Release.Name $root.Values.secrets.prefix) (index . 1) }}
{{- end }}

{{- define "qaq.selector" -}}
app.kubernetes.io/name: qaq
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "qaq.labels" -}}
{{- $root := index . 0 -}}
{{ include "qaq.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{- define "qaq.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .user }}
runAsGroup: {{ .group }}
fsGroup: {{ .group }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "qaq.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* A health check by the role's own certificate: kubelet's gRPC probe knows no TLS. */}}
{{- define "qaq.probe" -}}
{{- $port := get (include "qaq.ports" . | fromYaml) .role | int -}}
{{- if eq .role "gateway" -}}
httpGet:
  path: /health
  port: main
  scheme: HTTPS
{{- else -}}
exec:
  command: [qaq, health, "127.0.0.1:{{ $port }}"]
{{- end }}
timeoutSeconds: 10
{{- end }}

{{- define "qaq.environment" -}}
{{- $own := index .root.Values .role -}}
{{- $port := get (include "qaq.ports" . | fromYaml) .role | int -}}
- name: QAQ_HOST
  value: 0.0.0.0
- name: QAQ_ADVERTISE_HOST
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: QAQ_PORT
  value: {{ $port | quote }}
- name: QAQ_METRICS_PORT
  value: {{ include "qaq.metricsPort" . | quote }}
- name: QAQ_TLS_CA
  value: /run/qaq/ca.pem
- name: QAQ_TLS_CERT
  value: /run/qaq/cert.pem
- name: QAQ_TLS_KEY
  value: /run/qaq/key.pem
- name: QAQ_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ include "qaq.secret" (list .root .role) }}
      key: redis-url
{{- if has .role (list "worker" "originals") }}
- name: QAQ_SECRET_FILE
  value: /run/qaq/pages-secret
{{- end }}
{{- if eq .role "router" }}
- name: QAQ_TENANTS_FILE
  value: /run/qaq/tenants.json
{{- end }}
{{- if has .role (list "worker" "router") }}
{{- with .root.Values.model }}
- name: QAQ_MODEL
  value: {{ . | quote }}
{{- end }}
- name: HF_TOKEN_PATH
  value: /run/qaq/hf-token
{{- end }}
{{- if and (eq .role "worker") .root.Values.worker.gpus }}
- name: QAQ_DEVICE
  value: cuda
{{- end }}
{{- range $name, $value := mergeOverwrite (deepCopy .root.Values.settings) $own.settings }}
- name: {{ printf "QAQ_%s" (upper $name) }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end }}
