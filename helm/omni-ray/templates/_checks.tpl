{{/* Rules about more than one key, which the schema cannot say. */}}
{{- define "omni-ray.checks" -}}
{{- $fullname := include "omni-ray.fullname" . }}
{{- if not (regexMatch "^[a-z]" $fullname) }}
{{- fail (printf "fullnameOverride: the release would be called %q, but KubeRay needs a letter first; set it" $fullname) }}
{{- end }}
{{- $names := list }}
{{- range $i, $group := .Values.workers }}
{{- $where := printf "workers[%d]" $i }}
{{- if has $group.name $names }}
{{- fail (printf "%s.name: %q is the name of another group too; give it one of its own" $where $group.name) }}
{{- end }}
{{- $names = append $names $group.name }}
{{- if and $group.gpus (eq $.Values.image.build "cpu") }}
{{- fail (printf "image.build: cpu, but %s.gpus is %v; set image.build to gpu" $where $group.gpus) }}
{{- end }}
{{- $merged := include "omni-ray.workers" $group | fromYaml }}
{{- if gt (int $merged.minReplicas) (int $merged.maxReplicas) }}
{{- fail (printf "%s.minReplicas: %v is above maxReplicas %v; swap them" $where $merged.minReplicas $merged.maxReplicas) }}
{{- end }}
{{- if and $group.spread (eq $.Values.cache.kind "claim") (eq $.Values.cache.accessMode "ReadWriteOnce") }}
{{- fail (printf "cache.accessMode: ReadWriteOnce binds the volume to one machine, but %s.spread is true; set ReadWriteMany" $where) }}
{{- end }}
{{- include "omni-ray.checkMemory" (dict "where" $where "pod" $merged) }}
{{- end }}
{{- include "omni-ray.checkMemory" (dict "where" "head" "pod" .Values.head) }}
{{- range $kind := list "existingClaim" "hostPath" }}
{{- if and (eq $.Values.cache.kind $kind) (not (get $.Values.cache $kind)) }}
{{- fail (printf "cache.%s: is missing, but cache.kind is %s" $kind $kind) }}
{{- end }}
{{- end }}
{{- if eq .Values.upgrade.strategy "NewClusterWithIncrementalUpgrade" }}
{{- if not .Values.upgrade.gatewayClassName }}
{{- fail "upgrade.gatewayClassName: is missing, but upgrade.strategy is NewClusterWithIncrementalUpgrade; `kubectl get gatewayclass` lists them" }}
{{- end }}
{{- if not .Values.autoscaler.enabled }}
{{- fail "autoscaler.enabled: false, but upgrade.strategy NewClusterWithIncrementalUpgrade scales both clusters; set it to true" }}
{{- end }}
{{- end }}
{{- if and .Values.apiKeys.secretName (dig "api" "keys_file" "" .Values.args) }}
{{- fail "args.api.keys_file: apiKeys.secretName sets it; remove one of them" }}
{{- end }}
{{- end }}

{{- define "omni-ray.checkMemory" -}}
{{- if ge (int .pod.sharedMemoryGiB) (int .pod.memoryGiB) }}
{{- fail (printf "%s.sharedMemoryGiB: %v is part of memoryGiB %v and leaves nothing of it; lower it" .where .pod.sharedMemoryGiB .pod.memoryGiB) }}
{{- end }}
{{- end }}
