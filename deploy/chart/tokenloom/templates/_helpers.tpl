{{- define "tokenloom.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{/*
What runs the pods. A LeaderWorkerSet makes a Service of its own name, through which pods find their leader before it is
ready; ours, which has ready pods alone, is another.
*/}}
{{- define "tokenloom.workload" -}}
{{ include "tokenloom.name" . }}{{ if gt (int .Values.hosts) 1 }}-group{{ end }}
{{- end -}}

{{- define "tokenloom.selector" -}}
app.kubernetes.io/name: tokenloom
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tokenloom.labels" -}}
{{ include "tokenloom.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "tokenloom.ranks" -}}
{{ mul .Values.hosts (max 1 .Values.gpusPerHost) }}
{{- end -}}

{{/* Options that the scheduler has, whichever command starts it. */}}
{{- define "tokenloom.serverArgs" -}}
- --listen=0.0.0.0:{{ .Values.port }}
- --admin-listen=127.0.0.1:50052
- --metrics-listen=0.0.0.0:{{ .Values.metrics.port }}
- --log-format=json
- --grace-s={{ .Values.drain.graceSeconds }}
- --tensor-parallel={{ include "tokenloom.ranks" . }}
{{- with .Values.model.servedName }}
- --served-name={{ . }}
{{- end }}
{{- if .Values.tls.secret }}
- --tls-cert=/etc/tokenloom/tls/tls.crt
- --tls-key=/etc/tokenloom/tls/tls.key
{{- if .Values.tls.clientCertificates }}
- --tls-client-ca=/etc/tokenloom/tls/ca.crt
{{- end }}
{{- else }}
- --insecure
{{- end }}
{{- if .Values.tenants.secret }}
- --tenants=/etc/tokenloom/tenants/tenants.toml
{{- end }}
{{- with .Values.gpuHourPrice }}
- --gpu-hour-price={{ . }}
{{- end }}
{{- with .Values.otlpEndpoint }}
- --otlp-endpoint={{ . }}
{{- end }}
{{- with include "tokenloom.options" .Values.options }}
{{ . }}
{{- end }}
{{- end -}}

{{/* A map of options as flags; `true` is a flag without a value. Helm reads large numbers as floats. */}}
{{- define "tokenloom.options" -}}
{{- $flags := list -}}
{{- range $name, $value := . -}}
{{- if kindIs "bool" $value -}}
{{- $flags = append $flags (printf "--%s" $name) -}}
{{- else if and (kindIs "float64" $value) (eq (floor $value) $value) -}}
{{- $flags = append $flags (printf "--%s=%.0f" $name $value) -}}
{{- else -}}
{{- $flags = append $flags (printf "--%s=%v" $name $value) -}}
{{- end -}}
{{- end -}}
{{- with $flags }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{/* What the container that callers reach has: ports, probes, drain. */}}
{{- define "tokenloom.serverContainer" -}}
ports:
  - {name: grpc, containerPort: {{ .Values.port }}}
  - {name: metrics, containerPort: {{ .Values.metrics.port }}}
startupProbe:
  {{- include "tokenloom.probe" (list . "liveness") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
readinessProbe:
  {{- include "tokenloom.probe" (list . "") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  {{- include "tokenloom.probe" (list . "liveness") | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
lifecycle:
  preStop:
    exec:
      command: [/bin/sh, -c, "sleep {{ .Values.drain.delaySeconds }}; exec tokenloom drain 127.0.0.1:50052"]
{{- end -}}

{{/* Kubernetes asks for health by gRPC itself, but not through TLS. */}}
{{- define "tokenloom.probe" -}}
{{- $top := index . 0 -}}
{{- $service := index . 1 -}}
{{- if $top.Values.tls.secret -}}
exec:
  command:
    - tokenloom
    - health
    - 127.0.0.1:{{ $top.Values.port }}
    {{- with $service }}
    - --service={{ . }}
    {{- end }}
    - --tls-ca=/etc/tokenloom/tls/ca.crt
    - --tls-server-name={{ $top.Values.tls.serverName | default (printf "%s.%s.svc" (include "tokenloom.name" $top) $top.Release.Namespace) }}
    {{- if $top.Values.tls.clientCertificates }}
    - --tls-cert=/etc/tokenloom/tls/tls.crt
    - --tls-key=/etc/tokenloom/tls/tls.key
    {{- end }}
{{- else -}}
grpc:
  port: {{ $top.Values.port }}
  service: {{ $service | quote }}
{{- end -}}
{{- end -}}

{{- define "tokenloom.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- define "tokenloom.image" -}}
{{- $top := index . 0 -}}
{{- $image := index . 1 -}}
image: {{ printf "%s:%s" $image.repository ($image.tag | default $top.Chart.AppVersion) }}
imagePullPolicy: {{ $image.pullPolicy }}
{{- end -}}

{{- define "tokenloom.hubEnv" -}}
{{- with .Values.model.hubToken -}}
{{- if .secret -}}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .secret }}, key: {{ .key }}}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What every container needs: places to write to, the model. */}}
{{- define "tokenloom.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
{{- if .Values.model.volume }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end -}}

{{/* What the scheduler needs beside that. */}}
{{- define "tokenloom.serverMounts" -}}
{{ include "tokenloom.mounts" . }}
{{- if .Values.tls.secret }}
- {name: tls, mountPath: /etc/tokenloom/tls, readOnly: true}
{{- end }}
{{- if .Values.tenants.secret }}
- {name: tenants, mountPath: /etc/tokenloom/tenants, readOnly: true}
{{- end }}
{{- end -}}

{{- define "tokenloom.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if .Values.gpusPerHost -}}
{{- $limits := merge (dict .Values.gpuResource (toString .Values.gpusPerHost)) (default dict $resources.limits) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
resources:
  {{- toYaml $resources | nindent 2 }}
{{- end -}}

{{/* What all pods share: identity, volumes, placement. */}}
{{- define "tokenloom.pod" -}}
serviceAccountName: {{ include "tokenloom.name" . }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ add .Values.drain.delaySeconds .Values.drain.graceSeconds 30 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
volumes:
  - name: tmp
    emptyDir: {}
  - name: cache
    {{- .Values.cacheVolume | default (dict "emptyDir" dict) | toYaml | nindent 4 }}
  - name: shared-memory
    emptyDir: {medium: Memory, sizeLimit: {{ .Values.sharedMemory }}}
  {{- with .Values.model.volume }}
  - name: models
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tls.secret }}
  - name: tls
    secret: {secretName: {{ . }}, defaultMode: 0440}
  {{- end }}
  {{- with .Values.tenants.secret }}
  - name: tenants
    secret: {secretName: {{ . }}, defaultMode: 0440}
  {{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{/*
Labels and annotations of a pod; `component` tells those that callers reach from the others. No version of the chart: a
new one must not load every model again.
*/}}
{{- define "tokenloom.podMetadata" -}}
{{- $top := index . 0 -}}
{{- $component := index . 1 -}}
labels:
  {{- include "tokenloom.selector" $top | nindent 2 }}
  app.kubernetes.io/component: {{ $component }}
  {{- with $top.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $top.Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
