{{/* KubeRay makes longer names of a RayService's, such as that of the service, within 50 characters. */}}
{{- define "omni-ray.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "omni-ray.fullname" -}}
{{- $name := include "omni-ray.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Of pods. KubeRay gives app.kubernetes.io/name a value of its own, and a change of a pod's label makes new pods. */}}
{{- define "omni-ray.podLabels" -}}
app.kubernetes.io/part-of: {{ include "omni-ray.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "omni-ray.labels" -}}
{{ include "omni-ray.podLabels" . }}
app.kubernetes.io/name: {{ include "omni-ray.name" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "omni-ray.claim" -}}
{{- if eq .Values.cache.kind "existingClaim" }}{{ .Values.cache.existingClaim }}{{ else }}{{ include "omni-ray.fullname" . }}-cache{{ end }}
{{- end }}

{{- define "omni-ray.keysFile" -}}
/etc/omni-ray/keys/{{ .Values.apiKeys.key }}
{{- end }}
