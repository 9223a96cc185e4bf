{{/* The port of a URL, or what its scheme stands for. Takes (dict "url" URL "plain" PORT-OF-HTTP). */}}
{{- define "espalier.urlPort" -}}
{{- $host := (urlParse .url).host -}}
{{- $port := regexFind ":[0-9]+$" $host | trimPrefix ":" -}}
{{- default (ternary "443" .plain (hasPrefix "https://" .url)) $port -}}
{{- end -}}

{{/* Ports outside the release that a pod needs, as text. Takes (dict "root" $ "component" NAME). */}}
{{- define "espalier.servicePorts" -}}
{{- $values := .root.Values -}}
{{- $ports := list -}}
{{- if and $values.postgres.secret (eq .component "coordinator") -}}
{{- $ports = append $ports (toString $values.networkPolicy.postgresPort) -}}
{{- end -}}
{{- with $values.objectStore -}}
{{- if .roots -}}
{{- $ports = append $ports (include "espalier.urlPort" (dict "url" (default "https://aws" .endpoint) "plain" "80")) -}}
{{- end -}}
{{- end -}}
{{- with $values.telemetry.otlpEndpoint -}}
{{- $ports = append $ports (include "espalier.urlPort" (dict "url" . "plain" "80")) -}}
{{- end -}}
{{- range $values.volumes -}}
{{- if .download -}}
{{- $ports = append $ports "443" -}}
{{- end -}}
{{- end -}}
{{- $ports | uniq | join " " -}}
{{- end -}}

{{- define "espalier.namesEgress" -}}
- to:
    - namespaceSelector: {}
  ports:
    - protocol: UDP
      port: 53
    - protocol: TCP
      port: 53
{{- end -}}

{{/* What every pod of a component may reach besides its own kind: names, and the services that it was told of. */}}
{{- define "espalier.commonEgress" -}}
{{ include "espalier.namesEgress" .root }}
{{- with include "espalier.servicePorts" . }}
- to:
    {{- toYaml $.root.Values.networkPolicy.services | nindent 4 }}
  ports:
    {{- range splitList " " . }}
    - protocol: TCP
      port: {{ . }}
    {{- end }}
{{- end }}
{{- with .root.Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}
