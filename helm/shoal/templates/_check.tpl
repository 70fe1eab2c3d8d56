{{/* What a schema cannot see. Every refusal begins with the key. Takes (dict "root" $ "plan" $plan). */}}
{{- define "shoal.check" -}}
{{- include "shoal.checkName" .root -}}
{{- include "shoal.checkAuth" .root.Values -}}
{{- include "shoal.checkModels" . -}}
{{- include "shoal.checkWeights" . -}}
{{- include "shoal.checkUpgrade" . -}}
{{- include "shoal.checkExpose" . -}}
{{- end }}

{{- define "shoal.checkName" -}}
{{- $name := include "shoal.name" . -}}
{{- if gt (len $name) 47 -}}
  {{- fail (printf "fullnameOverride: a name must have at most 47 characters (KubeRay adds its own), %q has %d" $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
  {{- fail (printf "fullnameOverride: a name must be lower-case letters, digits and dashes and begin with a letter, got %q" $name) -}}
{{- end -}}
{{- end }}

{{- define "shoal.checkAuth" -}}
{{- $secret := .auth.apiKeys.existingSecret -}}
{{- if and $secret .auth.allowAnonymous -}}
  {{- fail "auth.allowAnonymous: must be false where auth.apiKeys.existingSecret is set" -}}
{{- end -}}
{{- if not (or $secret .auth.allowAnonymous) -}}
  {{- fail "auth.apiKeys.existingSecret: is needed, the API would be open to everyone: name a Secret made by `shoal keys create NAME --secret SECRET`, or set auth.allowAnonymous" -}}
{{- end -}}
{{- end }}

{{- define "shoal.checkModels" -}}
{{- $names := list -}}
{{- $pods := 0 -}}
{{- range $index, $model := .plan.models -}}
  {{- $key := ternary (printf "models[%d]." $index) "model." (not (empty $.root.Values.models)) -}}
  {{- if not (regexMatch "^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$" $model.name) -}}
    {{- fail (printf "%soverrides.name: must be letters, digits and ._-/, got %q" $key $model.name) -}}
  {{- end -}}
  {{- if has (include "shoal.application" $model) $names -}}
    {{- fail (printf "%soverrides.name: another model has the name %q already" $key $model.name) -}}
  {{- end -}}
  {{- $names = append $names (include "shoal.application" $model) -}}
  {{- if lt (int $model.replicas.max) (int $model.replicas.min) -}}
    {{- fail (printf "%sreplicas.max: must be >= replicas.min (%d), got %d" (trimPrefix "model." $key) (int $model.replicas.min) (int $model.replicas.max)) -}}
  {{- end -}}
  {{- $pods = add $pods (include "shoal.pods" (dict "root" $.root "replicas" $model.replicas) | int) -}}
{{- end -}}
{{- if gt (int $.root.Values.ingressCopies) (int (mul 4 $pods)) -}}
  {{- fail (printf "ingressCopies: must be <= %d (4 for each engine pod), got %d" (mul 4 $pods) (int $.root.Values.ingressCopies)) -}}
{{- end -}}
{{- end }}

{{- define "shoal.checkWeights" -}}
{{- $weights := .root.Values.weights -}}
{{- if and (eq .plan.source "image") (not $weights.ociImage) -}}
  {{- fail "weights.ociImage: is needed with weights.from image" -}}
{{- end -}}
{{- if and (eq .plan.source "pvc") $weights.pvc.readOnly (not $weights.pvc.existingClaim) -}}
  {{- fail "weights.pvc.readOnly: a claim that the chart makes is empty; name one with weights in weights.pvc.existingClaim" -}}
{{- end -}}
{{- if include "shoal.downloads" . -}}
  {{- range .plan.models -}}
    {{- if not .repository -}}
      {{- fail (printf "weights.from: %s has no repository to download from; use baked" .name) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{- define "shoal.checkUpgrade" -}}
{{- $values := .root.Values -}}
{{- with $values.upgrade.incremental -}}
{{- if eq $.plan.upgrade "Incremental" -}}
  {{- if not .gatewayClassName -}}
    {{- fail "upgrade.incremental.gatewayClassName: is needed with upgrade.type Incremental" -}}
  {{- end -}}
  {{- if gt (int .stepPercent) (int .maxSurgePercent) -}}
    {{- fail (printf "upgrade.incremental.stepPercent: must be <= maxSurgePercent (%d), got %d" (int .maxSurgePercent) (int .stepPercent)) -}}
  {{- end -}}
  {{- if not $values.autoscaler.enabled -}}
    {{- fail "autoscaler.enabled: must be true with upgrade.type Incremental" -}}
  {{- end -}}
  {{- if ne $values.expose.type "none" -}}
    {{- fail "expose.type: must be none with upgrade.type Incremental, whose requests come in through KubeRay's own Gateway" -}}
  {{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "shoal.checkExpose" -}}
{{- with .root.Values.expose -}}
{{- if and (eq .type "httproute") (not .httproute.gateway.name) -}}
  {{- fail "expose.httproute.gateway.name: is needed with expose.type httproute" -}}
{{- end -}}
{{- if and .ingress.tlsSecret (not .host) -}}
  {{- fail "expose.host: is needed with expose.ingress.tlsSecret" -}}
{{- end -}}
{{- end -}}
{{- $ft := .root.Values.head.gcsFaultTolerance -}}
{{- if and $ft.enabled (not $ft.redisAddress) -}}
  {{- fail "head.gcsFaultTolerance.redisAddress: is needed with head.gcsFaultTolerance.enabled" -}}
{{- end -}}
{{- end }}
