{{/* A group of workers with what its values leave open. */}}
{{- define "omni-ray.workers" -}}
{{- $defaults := dict "replicas" 1 "cpus" 1 "memoryGiB" 4 "sharedMemoryGiB" 1 "gpus" 0 "gpuResource" "nvidia.com/gpu" "spread" false }}
{{- $group := deepCopy . }}
{{- range $key, $default := $defaults }}
{{- if not (hasKey $group $key) }}{{ $_ := set $group $key $default }}{{ end }}
{{- end }}
{{- range $key := list "minReplicas" "maxReplicas" }}
{{- if not (hasKey $group $key) }}{{ $_ := set $group $key $group.replicas }}{{ end }}
{{- end }}
{{- toYaml $group }}
{{- end }}

{{/* Half of the shared memory is Ray's object store. */}}
{{- define "omni-ray.objectStoreBytes" -}}
{{- div (mul (int64 .sharedMemoryGiB) 1073741824) 2 }}
{{- end }}

{{/* What `ray start`, Serve and the model libraries read. */}}
{{- define "omni-ray.env" -}}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_THROUGHPUT_OPTIMIZED, value: "1"}
- {name: RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH, value: "2147483647"}
- {name: RAY_SERVE_HAPROXY_BINARY_PATH, value: /opt/omni-ray/.venv/bin/omni-ray-haproxy}
- {name: RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER, value: 1s}
- {name: RAY_SERVE_HAPROXY_RETRY_ON, value: conn-failure empty-response}
- {name: RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S, value: "2"}
- {name: RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S, value: "2"}
{{- if eq .Values.auth.mode "disabled" }}
- {name: RAY_AUTH_MODE, value: disabled}
{{- end }}
{{- range $name, $value := .Values.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{/* What the model libraries keep. */}}
{{- define "omni-ray.workerEnv" -}}
- {name: HF_HOME, value: /cache/huggingface}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /cache/compiled}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
{{- with .Values.huggingFaceToken }}
{{- if .secretName }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .secretName }}, key: {{ .key }}}
{{- end }}
{{- end }}
{{- end }}

{{- define "omni-ray.volumeMounts" -}}
- {name: shared-memory, mountPath: /dev/shm}
{{- if .Values.apiKeys.secretName }}
- {name: api-keys, mountPath: /etc/omni-ray/keys, readOnly: true}
{{- end }}
{{- end }}

{{- define "omni-ray.volumes" -}}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: {{ .pod.sharedMemoryGiB }}Gi}
{{- with .root.Values.apiKeys.secretName }}
- name: api-keys
  secret: {secretName: {{ . }}}
{{- end }}
{{- end }}

{{- define "omni-ray.cacheVolume" -}}
- name: cache
  {{- if eq .Values.cache.kind "emptyDir" }}
  emptyDir: {}
  {{- else if eq .Values.cache.kind "hostPath" }}
  hostPath: {path: {{ .Values.cache.hostPath }}, type: DirectoryOrCreate}
  {{- else }}
  persistentVolumeClaim: {claimName: {{ include "omni-ray.claim" . }}}
  {{- end }}
{{- end }}

{{/* A pod of the head or of the group "pod" of workers. */}}
{{- define "omni-ray.podTemplate" -}}
{{- $root := .root }}{{ $pod := .pod }}{{ $isHead := eq .component "head" -}}
metadata:
  labels:
    {{- include "omni-ray.podLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with $pod.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $pod.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds }}
  {{- with $root.Values.serviceAccountName }}
  serviceAccountName: {{ . }}
  {{- end }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $pod.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" }}
  {{- with get $pod $key }}
  {{ $key }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- if $pod.spread }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: DoNotSchedule
      labelSelector:
        matchLabels:
          {{- include "omni-ray.podLabels" $root | nindent 10 }}
          app.kubernetes.io/component: {{ .component }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 1000
    runAsGroup: 1000
    fsGroup: 1000
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  containers:
    - name: ray
      image: {{ with $root.Values.image }}{{ .repository }}:{{ default (printf "%s-%s" $root.Chart.AppVersion .build) .tag }}{{ end }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        allowPrivilegeEscalation: false
        capabilities: {drop: [ALL]}
      env:
        {{- include "omni-ray.env" $root | nindent 8 }}
        {{- if not $isHead }}{{ include "omni-ray.workerEnv" $root | nindent 8 }}{{ end }}
      {{- with $root.Values.envFromSecrets }}
      envFrom:
        {{- range . }}
        - secretRef: {name: {{ . }}}
        {{- end }}
      {{- end }}
      {{- include (ternary "omni-ray.headContainer" "omni-ray.workerContainer" $isHead) $root | nindent 6 }}
      resources:
        requests:
          cpu: {{ $pod.cpus }}
          memory: {{ $pod.memoryGiB }}Gi
        limits:
          memory: {{ $pod.memoryGiB }}Gi
          {{- if $pod.gpus }}
          {{ $pod.gpuResource }}: {{ $pod.gpus }}
          {{- end }}
      volumeMounts:
        {{- include "omni-ray.volumeMounts" $root | nindent 8 }}
        {{- if not $isHead }}
        - {name: cache, mountPath: /cache}
        {{- end }}
  volumes:
    {{- include "omni-ray.volumes" (dict "root" $root "pod" $pod) | nindent 4 }}
    {{- if not $isHead }}{{ include "omni-ray.cacheVolume" $root | nindent 4 }}{{ end }}
{{- end }}

{{/*
A worker takes requests from when all models were ready, and as long as its proxy answers: a model that fails later
leaves the others reachable. A probe of the process would be passed before anything is loaded.
*/}}
{{- define "omni-ray.readiness" -}}
import pathlib, urllib.request

def get(address):
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{address}", timeout=4).read()

were_ready = pathlib.Path("/tmp/models-were-ready")
assert b"success" in get("52365/api/local_raylet_healthz")
get("{{ .Values.http.port }}/-/healthz" if were_ready.exists() else "{{ .Values.http.port }}/ready")
were_ready.touch()
{{- end }}

{{- define "omni-ray.headContainer" -}}
ports:
  - {name: gcs-server, containerPort: 6379}
  - {name: dashboard, containerPort: 8265}
  - {name: client, containerPort: 10001}
  - {name: serve, containerPort: {{ .Values.http.port }}}
  - {name: metrics, containerPort: 8080}
{{- end }}

{{- define "omni-ray.workerContainer" -}}
ports:
  - {name: serve, containerPort: {{ .Values.http.port }}}
  - {name: metrics, containerPort: 8080}
readinessProbe:
  exec:
    command:
      - /opt/omni-ray/.venv/bin/python
      - -ISc
      - |
        {{- include "omni-ray.readiness" . | nindent 8 }}
  initialDelaySeconds: 10
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 2
{{- end }}
