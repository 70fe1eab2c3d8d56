{{/* Parts of the head's and the engine's pods. Nothing here may differ between two releases of the
same values: a change inside rayClusterConfig replaces every pod. */}}

{{- define "shoal.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.security.runAsUser }}
runAsGroup: 100
fsGroup: 100
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "shoal.containerSecurity" -}}
allowPrivilegeEscalation: false
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "shoal.podMetadata" -}}
labels:
  {{- include "shoal.podLabels" . | nindent 2 }}
  {{- with .Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Pod fields that head and engine share. */}}
{{- define "shoal.podSpec" -}}
securityContext:
  {{- include "shoal.podSecurity" . | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with .Values.scheduling.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.scheduling.schedulerName }}
schedulerName: {{ . | quote }}
{{- end }}
{{- end }}

{{/* Where pods without a model go. */}}
{{- define "shoal.headPlace" -}}
{{- with .Values.head.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.head.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Takes (dict "root" $ "plan" $plan). HAProxy ends the streams of an old configuration after this. */}}
{{- define "shoal.env" -}}
- name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S
  value: {{ add 60 (int64 .plan.longest) | quote }}
{{- with .root.Values.extra.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* No tensor and no token goes through Ray's object store; by default it would take 30 % of a pod's
memory out of /dev/shm, which NCCL needs. */}}
{{- define "shoal.objectStoreBytes" -}}
"134217728"
{{- end }}

{{- define "shoal.weightsVolume" -}}
{{- $weights := .root.Values.weights -}}
name: models
{{- if eq .plan.source "pvc" }}
persistentVolumeClaim:
  claimName: {{ include "shoal.claimName" .root | quote }}
  {{- if $weights.pvc.readOnly }}
  readOnly: true
  {{- end }}
{{- else if eq .plan.source "image" }}
image:
  reference: {{ $weights.ociImage | quote }}
  pullPolicy: IfNotPresent
{{- else }}
emptyDir: {}
{{- end }}
{{- end }}

{{/* "true" where the engine's pod downloads its weights. */}}
{{- define "shoal.downloads" -}}
{{- $weights := .root.Values.weights -}}
{{- if and $weights.download.enabled (or (eq .plan.source "ephemeral") (and (eq .plan.source "pvc") (not $weights.pvc.readOnly))) -}}
true
{{- end -}}
{{- end }}
