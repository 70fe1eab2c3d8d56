{{/* Name of every object of the release. */}}
{{- define "shoal.name" -}}
{{- default .Release.Name .Values.fullnameOverride -}}
{{- end }}

{{/* Labels of the chart's objects; never used inside rayClusterConfig, where a change replaces pods. */}}
{{- define "shoal.labels" -}}
app.kubernetes.io/name: shoal
{{ include "shoal.podLabels" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels that stay the same over releases. Not app.kubernetes.io/name: on the head it is KubeRay's. */}}
{{- define "shoal.podLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/part-of: shoal
{{- end }}

{{- define "shoal.enginePodLabels" -}}
{{ include "shoal.podLabels" . }}
ray.io/group: engine
{{- end }}

{{/* Takes (dict "root" $ "plan" $plan). */}}
{{- define "shoal.image" -}}
{{- $image := .root.Values.image -}}
{{- $tag := default (printf "%s-%s" .root.Chart.AppVersion .plan.hardware.device) $image.tag -}}
{{- $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $tag }}{{ end -}}
{{- end }}

{{- define "shoal.claimName" -}}
{{- default (printf "%s-models" (include "shoal.name" .)) .Values.weights.pvc.existingClaim -}}
{{- end }}

{{- define "shoal.rayTokenSecret" -}}
{{- default (printf "%s-ray-token" (include "shoal.name" .)) .Values.auth.rayToken.existingSecret -}}
{{- end }}
