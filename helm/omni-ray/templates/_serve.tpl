{{/* The file that `serve run` would take. */}}
{{- define "omni-ray.serveConfig" -}}
{{- $args := deepCopy .Values.args }}
{{- if .Values.apiKeys.secretName }}
{{- $_ := set $args "api" (set (default dict $args.api) "keys_file" (include "omni-ray.keysFile" .)) }}
{{- end }}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ .Values.http.port }}
  {{- with .Values.http.requestTimeoutSeconds }}
  request_timeout_s: {{ . }}
  {{- end }}
applications:
  - name: omni
    route_prefix: /
    import_path: omni_ray.app:build
    {{- with .Values.deployments }}
    deployments:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    args:
      {{- toYaml $args | nindent 6 }}
{{- end }}
