{{/* The pod that holds one copy of a model. All take (dict "root" $ "plan" $plan). */}}

{{/* Pods for the copies of one model at the start. Takes (dict "root" $ "replicas" $replicas). */}}
{{- define "shoal.pods" -}}
{{- ternary .replicas.min .replicas.max .root.Values.autoscaler.enabled | int -}}
{{- end }}

{{/* Pods of the group. A running cluster never learns of new bounds: maxReplicas is roomy. */}}
{{- define "shoal.engineBounds" -}}
{{- $num := 0 -}}
{{- range .plan.models -}}
  {{- $num = add $num (include "shoal.pods" (dict "root" $.root "replicas" .replicas) | int) -}}
{{- end -}}
replicas: {{ $num }}
minReplicas: {{ $num }}
maxReplicas: {{ max $num (int .root.Values.autoscaler.maxPods) }}
{{- end }}

{{- define "shoal.engineSpec" -}}
{{- $values := .root.Values -}}
{{- $pod := .plan.hardware.pod -}}
{{ include "shoal.podSpec" .root }}
automountServiceAccountToken: false
terminationGracePeriodSeconds: {{ include "shoal.graceSeconds" .plan }}
{{- with $pod.runtime_class }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with $pod.node_selector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $values.scheduling.topologySpread }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "shoal.enginePodLabels" .root | nindent 8 }}
{{- end }}
{{- $downloads := include "shoal.downloads" . }}
{{- if or $downloads $values.extra.initContainers }}
initContainers:
  {{- with $values.extra.initContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- if $downloads }}
  {{- range $index, $model := .plan.models }}
  - {{ include "shoal.download" (merge (dict "model" $model "index" $index) $) | nindent 4 | trim }}
  {{- end }}
  {{- end }}
{{- end }}
containers:
  - {{ include "shoal.engine" . | nindent 4 | trim }}
volumes:
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ $pod.shm }}
  {{- if ne .plan.source "baked" }}
  - {{ include "shoal.weightsVolume" . | nindent 4 | trim }}
  {{- end }}
  {{- with $values.auth.apiKeys.existingSecret }}
  - name: keys
    secret:
      secretName: {{ . | quote }}
  {{- end }}
  {{- with $values.extra.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "shoal.engine" -}}
{{- $values := .root.Values -}}
{{- $pod := .plan.hardware.pod -}}
name: engine
image: {{ include "shoal.image" . }}
imagePullPolicy: {{ $values.image.pullPolicy }}
securityContext:
  {{- include "shoal.containerSecurity" .root | nindent 2 }}
ports:
  - {name: api, containerPort: 8000}
  - {name: metrics, containerPort: 8080}
env:
  {{- include "shoal.env" . | nindent 2 }}
  {{- range $name, $value := .plan.hardware.env }}
  - name: {{ $name }}
    value: {{ $value | quote }}
  {{- end }}
{{- with $values.extra.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  requests:
    cpu: {{ $pod.cpu | quote }}
    memory: {{ $pod.memory }}
    {{- if eq .plan.hardware.device "cuda" }}
    nvidia.com/gpu: {{ .plan.size | quote }}
    {{- end }}
  limits:
    memory: {{ $pod.memory }}
    {{- if eq .plan.hardware.device "cuda" }}
    nvidia.com/gpu: {{ .plan.size | quote }}
    {{- end }}
# Started once it can answer: until then a new pod gets no requests beside those that serve.
startupProbe:
  httpGet:
    path: /health/ready
    port: 8000
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 1000000
lifecycle:
  preStop:
    exec:
      command: [python, -m, cluster.drain]
volumeMounts:
  - {name: shm, mountPath: /dev/shm}
  {{- if ne .plan.source "baked" }}
  - name: models
    mountPath: /models
    {{- if not (include "shoal.downloads" .) }}
    readOnly: true
    {{- end }}
  {{- end }}
  {{- if $values.auth.apiKeys.existingSecret }}
  - {name: keys, mountPath: /etc/shoal/keys, readOnly: true}
  {{- end }}
  {{- with $values.extra.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Downloads what is not there yet; a second pod finds it complete. Takes "model" and "index" too. */}}
{{- define "shoal.download" -}}
{{- $values := .root.Values -}}
name: download-{{ .index }}
image: {{ include "shoal.image" . }}
imagePullPolicy: {{ $values.image.pullPolicy }}
command:
  - shoal
  - download
  - {{ .model.repository }}
  - {{ .model.path }}
  {{- with .model.revision }}
  - --revision
  - {{ . | quote }}
  {{- end }}
securityContext:
  {{- include "shoal.containerSecurity" .root | nindent 2 }}
{{- with $values.auth.hfToken }}
{{- if or .existingSecret $values.weights.download.endpoint $values.extra.env }}
env:
  {{- if .existingSecret }}
  - name: HF_TOKEN
    valueFrom:
      secretKeyRef:
        name: {{ .existingSecret | quote }}
        key: {{ .key | quote }}
  {{- end }}
  {{- with $values.weights.download.endpoint }}
  - name: HF_ENDPOINT
    value: {{ . | quote }}
  {{- end }}
  {{- with $values.extra.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end }}
{{- with $values.extra.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  requests: {cpu: 500m, memory: 1Gi}
  limits: {memory: 2Gi}
volumeMounts:
  - {name: models, mountPath: /models}
{{- end }}
