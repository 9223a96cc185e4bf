{{/* The pod of a worker. Takes (dict "root" $ "name" POOL "pool" {…} "service" NAME). */}}
{{- define "espalier.workerPod" -}}
{{- $root := .root -}}
{{- $name := .name -}}
{{- $pool := .pool -}}
{{- $service := .service -}}
{{- $image := $root.Values.image.worker }}
{{- if $pool.image }}
{{- $image = merge (deepCopy $pool.image) (pick $root.Values.image.worker "repository") }}
{{- end }}
{{- $resources := deepCopy $pool.resources }}
{{- if eq $pool.device "cuda" }}
{{- $_ := set $resources "limits" (mergeOverwrite (deepCopy (default (dict) $resources.limits)) (dict $pool.gpuResource 1)) }}
{{- end }}
{{- with $pool.rdmaResource }}
{{- $_ := set $resources "limits" (mergeOverwrite (deepCopy (default (dict) $resources.limits)) (dict . 1)) }}
{{- end }}
metadata:
  labels:
    {{- include "espalier.podLabels" $root | nindent 4 }}
    app.kubernetes.io/component: worker
    espalier/pool: {{ $name }}
  {{- $annotations := deepCopy $pool.podAnnotations }}
  {{- if eq $pool.gang.type "volcano" }}
  {{- $_ := set $annotations "scheduling.k8s.io/group-name" $service }}
  {{- end }}
  {{- with $annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if eq $pool.gang.type "volcano" }}
  schedulerName: volcano
  {{- end }}
  {{- include "espalier.podSpec" $root | nindent 2 }}
  {{- with include "espalier.placement" $pool | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ $pool.terminationGracePeriodSeconds }}
  {{- with include "espalier.downloads" $root | trim }}
  initContainers:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: worker
      image: {{ include "espalier.image" (dict "root" $root "image" $image) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args:
        - --listen
        - 0.0.0.0:{{ $pool.port }}
        - --coordinator
        - {{ include "espalier.coordinatorAddress" $root }}
        - --advertise
        - {{ include "espalier.scheme" $root }}://$(POD_NAME).{{ $service }}.{{ $root.Release.Namespace }}.svc.{{ $root.Values.clusterDomain }}:{{ $pool.port }}
        - --pool
        - {{ $name }}
        - --group-size
        - {{ default (max 1 ($pool.replicas | int)) $pool.groupSize | quote }}
        {{- with $pool.peakFlops }}
        - --peak-flops
        - {{ . | quote }}
        {{- end }}
        - --device
        - {{ $pool.device }}
        - --threads
        - {{ $pool.threads | quote }}
        {{- include "espalier.rootArgs" $root | trim | nindent 8 }}
        - --drain-seconds
        - {{ $pool.drainSeconds | quote }}
        {{- with include "espalier.securityArgs" $root | trim }}
        {{- . | nindent 8 }}
        {{- end }}
      env:
        - name: POD_NAME
          valueFrom:
            fieldRef:
              fieldPath: metadata.name
        {{- include "espalier.telemetryEnv" $root | nindent 8 }}
        {{- with include "espalier.objectStoreEnv" $root | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- range $variable, $value := $pool.nccl }}
        - name: {{ $variable }}
          value: {{ $value | quote }}
        {{- end }}
        {{- with $pool.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - name: grpc
          containerPort: {{ $pool.port }}
          protocol: TCP
        {{- with include "espalier.metricsPort" $root }}
        - name: metrics
          containerPort: {{ . }}
          protocol: TCP
        {{- end }}
      {{- include "espalier.probes" (dict "root" $root "port" $pool.port "service" "espalier.v1.WorkerService") | nindent 6 }}
      resources:
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        {{- include "espalier.containerSecurityContext" $root | nindent 8 }}
      volumeMounts:
        {{- include "espalier.sharedMounts" $root | trim | nindent 8 }}
        {{- if $pool.sharedMemory }}
        - name: shared-memory
          mountPath: /dev/shm
        {{- end }}
  volumes:
    {{- include "espalier.sharedVolumes" (dict "root" $root "component" "worker" "temporarySize" $pool.temporarySize) | trim | nindent 4 }}
    {{- with $pool.sharedMemory }}
    - name: shared-memory
      emptyDir:
        medium: Memory
        sizeLimit: {{ . }}
    {{- end }}
{{- end -}}
