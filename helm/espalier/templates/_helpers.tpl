{{- define "espalier.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Prefix of all names; 40 characters leave room for "-worker-POOL" and a pod's number. */}}
{{- define "espalier.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change over an upgrade. */}}
{{- define "espalier.selectorLabels" -}}
app.kubernetes.io/name: {{ include "espalier.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "espalier.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "espalier.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* A pod's labels leave the chart's version out: a new one alone restarts nothing. */}}
{{- define "espalier.podLabels" -}}
{{ include "espalier.selectorLabels" . }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "espalier.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "espalier.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is needed when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Image reference. Takes (dict "root" $ "image" {repository, tag, digest}). */}}
{{- define "espalier.image" -}}
{{- $repository := .image.repository -}}
{{- with .root.Values.image.registry -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .) $repository -}}
{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "espalier.scheme" -}}
{{ ternary "https" "http" .Values.tls.enabled }}
{{- end -}}

{{- define "espalier.coordinatorAddress" -}}
{{ include "espalier.scheme" . }}://{{ include "espalier.fullname" . }}-coordinator.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:{{ .Values.coordinator.port }}
{{- end -}}

{{/* What coordinator and workers share of a pod's spec. */}}
{{- define "espalier.podSpec" -}}
serviceAccountName: {{ include "espalier.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .Values.securityContext.runAsUser }}
  runAsGroup: {{ .Values.securityContext.runAsGroup }}
  fsGroup: {{ .Values.securityContext.fsGroup }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{/* Where pods may and should run. Takes the values of the coordinator or of a pool. */}}
{{- define "espalier.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "espalier.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What the kubelet asks: gRPC itself, or where that is encrypted the port of the metrics. Takes
     (dict "port" N "service" NAME "path" PATH "root" $). */}}
{{- define "espalier.probe" -}}
{{- if .root.Values.tls.enabled -}}
httpGet:
  port: metrics
  path: {{ .path }}
{{- else -}}
grpc:
  port: {{ .port }}
  {{- with .service }}
  service: {{ . }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* Takes (dict "root" $ "port" N "service" NAME): the service is what makes the pod ready. */}}
{{- define "espalier.probes" -}}
{{- $probes := .root.Values.probes -}}
{{- $alive := dict "root" .root "port" .port "service" "" "path" "/healthz" -}}
{{- $ready := dict "root" .root "port" .port "service" .service "path" "/readyz" -}}
startupProbe:
  {{- include "espalier.probe" $alive | nindent 2 }}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: {{ $probes.startupFailureThreshold }}
readinessProbe:
  {{- include "espalier.probe" $ready | nindent 2 }}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: {{ $probes.failureThreshold }}
livenessProbe:
  {{- include "espalier.probe" $alive | nindent 2 }}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: {{ $probes.failureThreshold }}
{{- end -}}

{{- define "espalier.telemetryEnv" -}}
- name: ESPALIER_LOG_FORMAT
  value: {{ .Values.telemetry.logFormat }}
- name: RUST_LOG
  value: {{ .Values.telemetry.logFilter | quote }}
{{- with .Values.telemetry.otlpEndpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Environment of the object store. */}}
{{- define "espalier.objectStoreEnv" -}}
{{- with .Values.objectStore }}
{{- if .roots }}
- name: AWS_REGION
  value: {{ .region | quote }}
{{- with .endpoint }}
- name: AWS_ENDPOINT
  value: {{ . | quote }}
- name: AWS_ALLOW_HTTP
  value: {{ hasPrefix "http://" . | quote }}
{{- end }}
{{- if .secret }}
{{- $secret := .secret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom:
    secretKeyRef:
      name: {{ $secret }}
      key: {{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Arguments of TLS, tokens and metrics that both kinds of process take. */}}
{{- define "espalier.securityArgs" -}}
{{- if .Values.tls.enabled }}
- --tls-cert
- /etc/espalier/tls/tls.crt
- --tls-key
- /etc/espalier/tls/tls.key
- --tls-client-ca
- /etc/espalier/tls/ca.crt
- --tls-ca
- /etc/espalier/tls/ca.crt
{{- else if .Values.insecure }}
- --insecure
{{- end }}
{{- if include "espalier.metricsPort" . }}
- --metrics-listen
- 0.0.0.0:{{ include "espalier.metricsPort" . }}
{{- end }}
{{- end -}}

{{/* With TLS the probes need the port, whether or not anybody reads the metrics. */}}
{{- define "espalier.metricsPort" -}}
{{- if or .Values.telemetry.metrics.enabled .Values.tls.enabled -}}
{{ .Values.telemetry.metrics.port }}
{{- end -}}
{{- end -}}

{{- define "espalier.tlsSecret" -}}
{{- $given := ternary .root.Values.tls.coordinatorSecret .root.Values.tls.workerSecret (eq .component "coordinator") -}}
{{- if .root.Values.tls.certManager.enabled -}}
{{ default (printf "%s-%s-tls" (include "espalier.fullname" .root) .component) $given }}
{{- else -}}
{{ required (printf "tls.%sSecret is needed when tls.enabled is true and tls.certManager.enabled is not" .component) $given }}
{{- end -}}
{{- end -}}

{{/* Init containers that fill volumes, and the volumes' own kind. */}}
{{- define "espalier.downloads" -}}
{{- $root := . -}}
{{- range $name, $volume := .Values.volumes }}
{{- with $volume.download }}
- name: download-{{ $name }}
  image: {{ .image }}
  command:
    {{- toYaml .command | nindent 4 }}
  env:
    - name: HOME
      value: /tmp
    {{- with .env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with include "espalier.objectStoreEnv" $root | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- if and $root.Values.objectStore.roots $root.Values.objectStore.endpoint }}
    # As AWS' own command line calls it.
    - name: AWS_ENDPOINT_URL
      value: {{ $root.Values.objectStore.endpoint | quote }}
    {{- end }}
  resources:
    requests:
      cpu: 500m
      memory: 512Mi
    limits:
      cpu: "2"
      memory: 2Gi
  securityContext:
    {{- include "espalier.containerSecurityContext" $root | nindent 4 }}
  volumeMounts:
    - name: shared-{{ $name }}
      mountPath: {{ $volume.mountPath }}
    - name: tmp
      mountPath: /tmp
{{- end }}
{{- end }}
{{- end -}}

{{/* --root for each shared folder. */}}
{{- define "espalier.rootArgs" -}}
{{- range .Values.volumes }}
- --root
- {{ .mountPath }}
{{- end }}
{{- range .Values.objectStore.roots }}
- --root
- {{ . }}
{{- end }}
{{- end -}}

{{- define "espalier.sharedMounts" -}}
{{- range $name, $volume := .Values.volumes }}
- name: shared-{{ $name }}
  mountPath: {{ $volume.mountPath }}
  readOnly: {{ $volume.readOnly }}
{{- end }}
{{- if .Values.tls.enabled }}
- name: tls
  mountPath: /etc/espalier/tls
  readOnly: true
{{- end }}
- name: tmp
  mountPath: /tmp
{{- end -}}

{{/* Takes (dict "root" $ "component" NAME "temporarySize" SIZE). */}}
{{- define "espalier.sharedVolumes" -}}
{{- $fullname := include "espalier.fullname" .root -}}
{{- range $name, $volume := .root.Values.volumes }}
- name: shared-{{ $name }}
  {{- if $volume.download }}
  emptyDir:
    sizeLimit: {{ $volume.size }}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-%s" $fullname $name) $volume.existingClaim }}
    readOnly: {{ $volume.readOnly }}
  {{- end }}
{{- end }}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ include "espalier.tlsSecret" . }}
    defaultMode: 0440
{{- end }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .temporarySize }}
{{- end -}}

{{/* Whether `helm test` has a pod: where tokens are asked for, one must be given. */}}
{{- define "espalier.testHook" -}}
{{- if or (not .Values.tokensSecret) .Values.testTokenSecret -}}
true
{{- end -}}
{{- end -}}
